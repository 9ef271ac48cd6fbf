"""Boot a real Linux with vhost-user devices attached, and run commands in it.

    with Rng().start("/tmp/rng.sock"), Uml([("/tmp/rng.sock", DeviceId.RNG)]) as guest:
        print(guest.run("head -c 16 /dev/hwrng | od -x").text)

`Uml` is User-Mode Linux: a kernel that is an ordinary program, sees the host's files and boots in a fifth of a second.
`Qemu` is an emulated PC with Debian's own kernel: seconds to boot, but another front end and another kernel.

Both work alike. The guest's init is a shell that reads its script from a serial line, whose other end is a socket here.
A command is one more line of that script; its exit status and what it printed come back on the same line.
"""

from __future__ import annotations

import json
import math
import os
import select
import shlex
import signal
import socket
import subprocess
import tempfile
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

__all__ = ["CommandFailed", "CommandTimeout", "GuestError", "GuestNotFound", "Qemu", "Result", "Uml", "find_kernel"]

T = TypeVar("T")
StrPath = str | os.PathLike[str]

# The guest's first shell becomes one that listens. This text travels on the kernel's command line, so that the guest's
# root needs no file of ours: hence no double quote and no newline in it. With /proc, busybox runs its applets in a fork
# of its own, which takes a third of the time of starting programs.
_GREETING = b"\nthe guest listens\n"
_LISTEN = (
    "/bin/busybox mount -t proc proc /proc; exec <{line} 3>{line}; stty raw -echo; "
    f"printf '\\n{_GREETING.decode().strip()}\\n' >&3; "
    "sh {line}; poweroff -f"
)

# The first thing that it is told.
_PRELUDE = b"""
exec </dev/null
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TMPDIR=/run
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /run
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
ln -s /proc/self/fd /dev/fd
for number in 0:stdin 1:stdout 2:stderr; do ln -s fd/${number%:*} /dev/${number#*:}; done
cd /run
more() {
    command="$command$1"
    echo >&3
}
run() {
    rm -f .stdout .stderr
    /usr/bin/timeout -s KILL "$1" /bin/sh -c "$command" >.stdout 2>.stderr 3>&-
    set -- $? $(stat -c %s .stdout .stderr)
    command=
    echo "$*" >&3
}
part() {
    dd if="$1" bs=65536 skip="$2" count=1 2>/dev/null | head -c "$3" | cat >&3
}
echo >&3
"""

# A serial line of User-Mode Linux stays silent for ever once a buffer of its was full: the 4096 bytes of its input, or
# the socket that its output goes to. So both directions go in parts, the next one on request. A character of a command
# takes up to five bytes in quotes.
_COMMAND_PART = 600
_OUTPUT_PART = 65536  # also in the prelude


class GuestError(Exception):
    """The guest did not do what was asked of it. The message ends with its last kernel messages."""


class GuestNotFound(GuestError):
    """A kernel or a program that the guest needs is not on this machine. The message says how to get it."""


class CommandFailed(GuestError):
    """A command ended with an exit status other than 0; `result` has what it printed."""

    def __init__(self, headline: str, result: Result, kernel: str) -> None:
        stdout, stderr = (printed.decode(errors="replace") for printed in (result.stdout, result.stderr))
        super().__init__(_story(headline, stdout=stdout, stderr=stderr, kernel=kernel))
        self.result = result


class CommandTimeout(CommandFailed):
    """A command was killed at its deadline; `result` has what it printed until then."""


@dataclass(frozen=True)
class Result:
    """What a command in the guest came to."""

    command: str
    status: int
    """The exit status, or 128 + the number of the signal that ended it."""
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """`stdout` as text, without white space at its ends."""
        return self.stdout.decode(errors="replace").strip()


def find_kernel() -> Path:
    """The User-Mode Linux kernel to boot: ``$VHOST_USER_UML`` if set, else the one that `guest/build` made last.

    Raises:
        GuestNotFound: there is none.
    """
    if chosen := os.environ.get("VHOST_USER_UML"):
        return _program(chosen, "VHOST_USER_UML has to name a User-Mode Linux kernel")
    return _newest_build("uml-*/linux")


class Guest(ABC):
    """What `Uml` and `Qemu` share: a life, and a shell to run commands in. Goes in a ``with``, or `start` it."""

    #: The terminal that the guest's shell reads its script from.
    _LINE: ClassVar = "/dev/ttyS1"

    def __init__(self, extra_args: Sequence[str], boot_timeout: float) -> None:
        self.extra_args = list(extra_args)
        self.boot_timeout = boot_timeout
        self._machine: _Machine | None = None
        self._last_log = ""
        self._lock = threading.Lock()

    @abstractmethod
    def _command_line(self, channel: int, directory: Path) -> list[str]:
        """Starts the guest with the descriptor `channel` as /dev/ttyS1; `directory` is for files that die with it."""

    def _wait(self, machine: _Machine, descriptor: int, deadline: float) -> None:
        """Called before somebody waits until `deadline` for `descriptor` to become readable."""
        return

    def start(self) -> Self:
        """Boot, and return once the guest takes commands.

        Raises:
            GuestNotFound: a kernel or a program is missing.
            GuestError: a device is not there, or the guest ended or did not get ready within `boot_timeout` seconds.
        """
        if self._machine:
            raise GuestError("the guest is already running: stop it first")
        self._machine = _Machine(self._command_line, self._wait)
        try:
            self._machine.greet(self.boot_timeout)
        except BaseException:
            self.kill()
            raise
        return self

    def run(self, command: str, *, timeout: float | None = 30, check: bool = True) -> Result:
        """Run `command` in the guest with its /bin/sh, as root, and wait for its end.

        It starts in /run, a tmpfs, with an empty standard input and no more than PATH, HOME, LANG and TMPDIR in its
        environment. A process that it leaves in the background lives on; what that prints later is lost. Threads take
        turns.

        Args:
            command: a shell script, of any number of lines.
            timeout: seconds after which the command is killed; None: it may take as long as it likes.
            check: raise when the exit status is not 0.

        Raises:
            CommandFailed: the exit status is not 0, unless `check` is false.
            CommandTimeout: the command was killed at its deadline. The guest goes on.
            GuestError: the guest ended, or hangs. It takes no more commands then: `stop` it.
        """
        if "\0" in command:
            raise ValueError("a command cannot contain a null character")
        # timeout(1) takes 0 for no deadline.
        seconds = 0 if timeout is None else max(math.ceil(timeout), 1)
        with self._lock:
            machine = self._idle_machine()
            started = self._now()
            # The guest keeps the deadline, so that it outlives the command. Only a command that cannot be killed, since
            # a driver waits for its device, makes us lose patience with the guest.
            machine.expect(f"running {command!r}", within=seconds + 10 if seconds else math.inf)
            for start in range(0, len(command), _COMMAND_PART):
                machine.send(f"more {shlex.quote(command[start : start + _COMMAND_PART])}\n".encode())
                machine.read_until(b"\n")
            machine.send(f"run {seconds}\n".encode())
            status, out, err = machine.read_numbers(3)
            late = status == 128 + signal.SIGKILL and 0 < seconds <= self._now() - started
            result = Result(command, status, machine.read_file(".stdout", out), machine.read_file(".stderr", err))
            machine.doing = ""
        if late:
            raise CommandTimeout(f"{command!r} was killed after {seconds} s", result, machine.log())
        if check and status != 0:
            raise CommandFailed(f"{command!r} ended with exit status {status}", result, machine.log())
        return result

    def reboot(self) -> None:
        """Reboot the guest, and return once it takes commands again. Its process stays, and so do its connections."""
        with self._lock:
            machine = self._idle_machine()
            machine.expect("going down for a reboot", within=10)
            machine.send(b"reboot -f\n")
            machine.greet(self.boot_timeout)

    def stop(self, timeout: float = 10) -> bool:
        """Power off, so that the drivers let go of their devices. What is not off after `timeout` seconds is killed.

        A guest that did not come back from a command, because it hangs or the command was interrupted, is killed at
        once. Returns whether the guest went by itself, which it also did when it is not running.
        """
        machine = self._machine
        if machine is None:
            return True
        deadline = time.monotonic() + timeout
        others_are_done = self._lock.acquire(timeout=timeout)
        try:
            off = others_are_done and not machine.doing and machine.power_off(deadline - time.monotonic())
        finally:
            self.kill()
            if others_are_done:
                self._lock.release()
        return off

    def kill(self) -> None:
        """End the guest's processes at once: for its devices, the machine crashed. Nothing of it is left."""
        if machine := self._machine:
            self._machine = None
            self._last_log = machine.end()

    @property
    def log(self) -> str:
        """The kernel messages since the start of this guest, or of the last one when it is not running."""
        return self._machine.log() if self._machine else self._last_log

    @property
    def pid(self) -> int | None:
        """The guest's process, which leads a process group and session of its own; None when it is not running."""
        return self._machine.process.pid if self._machine else None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _now(self) -> float:
        """Seconds, as the guest counts them."""
        return time.monotonic()

    def _listen(self) -> str:
        return _LISTEN.format(line=self._LINE)

    def _idle_machine(self) -> _Machine:
        if self._machine is None:
            raise GuestError("the guest is not running: start it first")
        if self._machine.doing:
            raise GuestError(f"the guest did not come back from {self._machine.doing}: stop it")
        return self._machine


class Uml(Guest):
    """User-Mode Linux on the host's own files, with `devices` attached. Needs no privilege.

    Every program of the host runs in it. Its root is the host's, read-only: a command writes to /run, /dev/shm and its
    devices; ``extra_args=["rw"]`` lets it write to the host's files, with the rights of the host's user.

    Args:
        devices: socket, virtio device id and optionally the platform id of each device.
        memory: size of the guest's memory, as ``mem=`` of the kernel takes it.
        kernel: default: `find_kernel`.
        root: the folder that the guest has for its root. It needs /bin/busybox (of Debian's busybox-static), /bin/sh
            and /usr/bin/timeout.
        extra_args: more kernel parameters, such as ``time-travel``.
        boot_timeout: seconds until the guest has to take commands.
    """

    def __init__(
        self,
        devices: Sequence[tuple[StrPath, int] | tuple[StrPath, int, int]] = (),
        *,
        memory: str = "128M",
        kernel: StrPath | None = None,
        root: StrPath = "/",
        extra_args: Sequence[str] = (),
        boot_timeout: float = 30,
    ) -> None:
        super().__init__(extra_args, boot_timeout)
        self.devices = list(devices)
        self.memory = memory
        self.kernel = kernel
        self.root = root

    def _command_line(self, channel: int, directory: Path) -> list[str]:
        root = Path(self.root).absolute()
        _program(root / "bin/busybox", "the guest's init: apt-get install busybox-static")
        return [
            str(_program(self.kernel, "it was given as the kernel") if self.kernel else find_kernel()),
            f"mem={self.memory}",
            f"uml_dir={directory}",
            "rootfstype=hostfs",
            f"rootflags={root}",
            "ro",
            "con=null",
            "con0=null,fd:2",
            "ssl=null",
            "seccomp=auto",  # twice as fast as ptrace
            *self._channel_parameters(channel),
            *(self._parameter(*device) for device in self.devices),
            *self.extra_args,
            "init=/bin/busybox",
            "--",
            "sh",
            "-c",
            f'"{self._listen()}"',
        ]

    def _channel_parameters(self, channel: int) -> list[str]:
        return [f"ssl1=fd:{channel}"]

    @staticmethod
    def _parameter(path: StrPath, device_id: int, platform_id: int | None = None) -> str:
        path = _existing_socket(path)
        if any(character in ': "' for character in path):
            raise ValueError(
                f"{path}: the kernel parameter virtio_uml.device= has no way to write a colon, blank or quote"
            )
        return f"virtio_uml.device={path}:{int(device_id)}" + ("" if platform_id is None else f":{platform_id}")


class Qemu(Guest):
    """A PC that QEMU emulates, with Debian's kernel and busybox, and `devices` attached. Needs no privilege and no KVM.

    Args:
        devices: socket, virtio device id and optionally more properties of QEMU's device, such as ``"num-queues=4"``.
        memory: size of the guest's memory, as ``-m`` of QEMU takes it.
        cpus: number of processors.
        reconnect: seconds after which QEMU tries again to connect to a disk that is gone; 0: never. With its other
            devices QEMU does not get along when they come back, or come late.
        iommu: put the devices behind an IOMMU, as those need it that have :attr:`Device.iommu`. The guest's kernel
            tells of each buffer that it takes back (``iommu.strict=1``).
        files: folder with what `guest/build qemu` made; default: the newest.
        extra_args: more of QEMU's arguments.
        boot_timeout: seconds until the guest has to take commands.
    """

    DISK = 2

    # An emulated timer that is late, on a machine that is busy, is not a broken one: the kernel would panic.
    _PARAMETERS = "console=ttyS0 no_timer_check"
    _IOMMU_PARAMETERS = "intel_iommu=on iommu.strict=1"

    # The device models of QEMU. An id that has none gets the generic one, for which QEMU has to be told the numbers of
    # queues and of bytes of configuration space: as a property, or here.
    MODELS: ClassVar = {
        DISK: "vhost-user-blk-pci",
        3: "vhost-user-test-device-pci,virtio-id=3,num_vqs=2,config_size=12",
        4: "vhost-user-rng-pci",
        8: "vhost-user-scsi-pci",
        16: "vhost-user-gpu-pci",
        17: "vhost-user-rtc-pci",
        18: "vhost-user-input-pci",
        19: "vhost-user-vsock-pci",
        25: "vhost-user-snd-pci",
        26: "vhost-user-fs-pci",
        34: "vhost-user-i2c-pci",
        41: "vhost-user-gpio-pci",
        45: "vhost-user-spi-pci",
    }

    # Those of which a half is QEMU's own: another option that makes the half that speaks vhost-user, the model, and the
    # model's property that names that half. What a crypto device's driver may do with its rings, its back-end is not
    # told: so it may do nothing of it.
    HALVES: ClassVar = {
        1: ("-netdev", "vhost-user", "virtio-net-pci", "netdev"),
        20: ("-object", "cryptodev-vhost-user", "virtio-crypto-pci,event_idx=off,indirect_desc=off", "cryptodev"),
    }

    def __init__(
        self,
        devices: Sequence[tuple[StrPath, int] | tuple[StrPath, int, str]] = (),
        *,
        memory: str = "256M",
        cpus: int = 1,
        reconnect: float = 0,
        iommu: bool = False,
        files: StrPath | None = None,
        extra_args: Sequence[str] = (),
        boot_timeout: float = 120,
    ) -> None:
        super().__init__(extra_args, boot_timeout)
        self.devices = list(devices)
        self.memory = memory
        self.cpus = cpus
        self.reconnect = reconnect
        self.iommu = iommu
        self.files = files
        self._monitor_path: Path | None = None
        self._waits_for_guest = False

    def monitor(self, command: str, **arguments: object) -> Any:
        """Execute a command of the QEMU Machine Protocol, and return its result.

            guest.monitor("migrate-set-parameters", **{"max-bandwidth": 1 << 20})

        Raises:
            GuestError: QEMU refused the command, or is gone.
        """
        if self._machine is None or self._monitor_path is None:
            raise GuestError("the guest is not running: start it first")
        return _execute(self._monitor_path, command, arguments)

    def receiver(self, devices: Sequence[tuple[StrPath, int] | tuple[StrPath, int, str]]) -> Self:
        """Another QEMU like this one, with `devices` instead, for the guest to migrate to: :meth:`start` boots nothing.

        They have to be of the same types, in the same order.
        """
        other = type(self)(
            devices,
            memory=self.memory,
            cpus=self.cpus,
            reconnect=self.reconnect,
            iommu=self.iommu,
            files=self.files,
            extra_args=self.extra_args,
            boot_timeout=self.boot_timeout,
        )
        other._waits_for_guest = True
        return other

    def migrate(
        self,
        to: Self,
        during: Callable[[], object] = lambda: None,
        *,
        postcopy: bool = False,
        timeout: float = 60,
    ) -> None:
        """Move the guest to another QEMU, which :meth:`receiver` made: its commands run there afterwards, and this QEMU
        ends.

        `during` is called once all of the guest's memory was sent for the first time. What changes meanwhile is sent
        again; but a guest that does nothing for a moment may be gone before it returns: run no commands there.

        With `postcopy` the guest goes on in the other QEMU at once, and `during` is called while its memory follows: a
        page that somebody touches before it came is fetched. All devices there need :attr:`Device.postcopy`.

        Raises:
            GuestError: QEMU gave up, with its reason, or is not done within `timeout` seconds. A guest that did not go
                on there yet goes on here.
        """
        assert to._monitor_path is not None
        deadline = time.monotonic() + timeout
        address = f"unix:{to._monitor_path.parent}/guest"
        if postcopy:
            for machine in (self, to):
                machine._set_capability("postcopy-ram")
        # Or this QEMU would be done when the other one has got everything, whether it likes what it got or not.
        self._set_capability("return-path")
        to.monitor("migrate-incoming", uri=address)
        if postcopy:
            self._follow_with_memory(address, during, deadline)
        else:
            self._precede_with_memory(address, during, deadline)
        self._wait_for_migration(lambda state: state["status"] == "completed", deadline)
        while to.monitor("query-status")["status"] != "running":
            time.sleep(0.01)
        # What is left here is a paused guest, which would not power off.
        self.kill()

    def _precede_with_memory(self, address: str, during: Callable[[], object], deadline: float) -> None:
        # So little time for what is left that there is always more, while a guest does anything.
        self._set_migration(max_bandwidth=1 << 30, downtime_limit=0)
        self.monitor("migrate", uri=address)
        self._wait_for_migration(lambda state: state.get("ram", {}).get("dirty-sync-count", 0) > 1, deadline)
        self._set_migration(max_bandwidth=1 << 16)
        during()
        self._set_migration(max_bandwidth=1 << 30, downtime_limit=2000)

    def _follow_with_memory(self, address: str, during: Callable[[], object], deadline: float) -> None:
        # Next to nothing comes before it is asked for.
        self._set_migration(max_bandwidth=1 << 16, max_postcopy_bandwidth=1 << 20)
        self.monitor("migrate", uri=address)
        self._wait_for_migration(lambda state: state["status"] == "active", deadline)
        self.monitor("migrate-start-postcopy")
        self._wait_for_migration(lambda state: state["status"] == "postcopy-active", deadline)
        during()
        self._set_migration(max_postcopy_bandwidth=1 << 30)

    def _set_capability(self, name: str) -> None:
        self.monitor("migrate-set-capabilities", capabilities=[{"capability": name, "state": True}])

    def _set_migration(self, **parameters: int) -> None:
        self.monitor("migrate-set-parameters", **{name.replace("_", "-"): value for name, value in parameters.items()})

    def _wait_for_migration(self, reached: Callable[[dict[str, Any]], bool], deadline: float) -> None:
        while not reached(state := self.monitor("query-migrate")):
            if state.get("status") in ("failed", "cancelled") or time.monotonic() > deadline:
                raise GuestError(f"the guest did not migrate: {json.dumps(state)}")
            time.sleep(0.01)

    def start(self) -> Self:
        if not self._waits_for_guest:
            return super().start()
        self._machine = _Machine(self._command_line, self._wait)
        return self

    def _command_line(self, channel: int, directory: Path) -> list[str]:
        files = Path(self.files) if self.files else _newest_build("qemu-*/vmlinuz").parent
        self._monitor_path = directory / "monitor"
        command = [
            f"{files}/qemu-system-x86_64",
            *("-qmp", f"unix:{self._monitor_path},server=on,wait=off"),
            *(("-incoming", "defer") if self._waits_for_guest else ()),
            *("-nodefaults", "-no-user-config", "-display", "none"),
            *("-machine", "q35", "-accel", "tcg", "-cpu", "max"),
            # With one that could never be two, QEMU's emulator makes no barrier of `lock addl`: a driver misses that
            # the device wants to be kicked.
            *("-smp", f"{self.cpus},maxcpus={max(self.cpus, 2)}"),
            # A vhost-user device maps the guest's memory: it has to be a file that can be shared.
            *("-m", self.memory),
            *("-object", f"memory-backend-memfd,id=memory,size={self.memory},share=on", "-numa", "node,memdev=memory"),
            *("-kernel", f"{files}/vmlinuz", "-initrd", f"{files}/initramfs"),
            *(
                "-append",
                f'{self._PARAMETERS} {self._IOMMU_PARAMETERS if self.iommu else ""} -- sh -c "{self._listen()}"',
            ),
            *("-device", "pvpanic-pci"),  # a panic ends QEMU
            *("-chardev", "stdio,id=log,signal=off", "-device", "isa-serial,chardev=log"),
            *("-chardev", f"socket,id=channel,fd={channel}", "-device", "isa-serial,chardev=channel"),
        ]
        if self.iommu:
            # Before the devices that are behind it. Remapped interrupts are nothing that they need.
            command += ["-device", "intel-iommu,intremap=off,device-iotlb=on"]
        for number, device in enumerate(self.devices):
            command += self._device(f"device{number}", *device)
        return command + self.extra_args

    def _device(self, name: str, path: StrPath, device_id: int, properties: str = "") -> list[str]:
        chardev = f"socket,id={name},path={os.path.abspath(path).replace(',', ',,')}"
        if self.reconnect and device_id == self.DISK:
            chardev += f",reconnect-ms={math.ceil(self.reconnect * 1000)}"
        else:
            _existing_socket(path)
        options = ["-chardev", chardev]
        if device_id in self.HALVES:
            option, half, model, attribute = self.HALVES[device_id]
            options += [option, f"{half},id={name}-half,chardev={name}"]
            back_end = f"{attribute}={name}-half"
        else:
            model = self.MODELS.get(device_id, f"vhost-user-test-device-pci,virtio-id={int(device_id)}")
            back_end = f"chardev={name}"
        behind = ""
        if self.iommu:
            behind = "iommu_platform=on,ats=on"
            # A legacy driver of a disk would not know of it.
            model = model.replace("blk-pci", "blk-pci-non-transitional")
        return [*options, "-device", ",".join(filter(None, [model, back_end, behind, properties]))]


def _execute(path: Path, command: str, arguments: dict[str, object]) -> Any:
    """Have the QEMU whose monitor listens at `path` execute a command. It speaks in lines of JSON."""
    deadline = time.monotonic() + 30
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(30)
        # QEMU needs a moment to listen.
        while connection.connect_ex(str(path)):
            if time.monotonic() > deadline:
                raise GuestError(f"QEMU does not listen at {path}: it ended, or did not start")
            time.sleep(0.01)
        with connection.makefile("rw") as lines:
            try:
                for request in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                    lines.write(json.dumps(request) + "\n")
                    lines.flush()
                    answer: dict[str, Any] = {}
                    # It introduces itself, and tells of events.
                    while not {"return", "error"} & answer.keys():
                        answer = json.loads(lines.readline() or '{"error": {"desc": "it ended"}}')
            except OSError as error:
                raise GuestError(f"QEMU does not answer to {command}: {error}") from None
    if "error" in answer:
        raise GuestError(f"QEMU refused {command}: {answer['error']['desc']}")
    return answer["return"]


class _Machine:
    """A guest that runs: its process, the socket to its shell, its kernel log."""

    def __init__(
        self, command_line: Callable[[int, Path], list[str]], wait: Callable[[_Machine, int, float], None]
    ) -> None:
        self._wait = wait
        with ExitStack() as owned:
            directory = owned.enter_context(tempfile.TemporaryDirectory(prefix="vhost-user-guest-"))
            # Memory, not a pipe: a guest never waits for somebody to read its messages.
            self._log = owned.enter_context(open(os.memfd_create("guest-log"), "rb"))
            self._channel, theirs = map(owned.enter_context, socket.socketpair())
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * _OUTPUT_PART)
            # The guest puts its terminal in raw mode and signals its process group: it gets neither of ours.
            self.process = subprocess.Popen(
                command_line(theirs.fileno(), Path(directory)),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
            self._watcher = _Watcher(self.process.pid)
            owned.callback(_end, self.process, self._watcher)
            theirs.close()
            self.doing = ""  # what the guest is busy with, or was when it hung or we were interrupted
            self._deadline = 0.0
            self._received = bytearray()
            self._last_log = ""
            # Also when this object is collected and when the interpreter ends: a forgotten guest does not stay.
            self._release = weakref.finalize(self, owned.pop_all().close)

    def greet(self, timeout: float) -> None:
        self.expect("booting", within=timeout)
        self.read_until(_GREETING)
        self.send(_PRELUDE)
        self.read_until(b"\n")
        self.doing = ""

    def expect(self, doing: str, *, within: float) -> None:
        """From here on the guest is busy with that, for so many seconds at most."""
        self.doing = doing
        self._deadline = time.monotonic() + within

    def lose_patience(self) -> None:
        """What it does not say now counts as never."""
        self._deadline = min(self._deadline, time.monotonic())

    def send(self, data: bytes) -> None:
        self._answer(lambda: self._channel.sendall(data))

    def read_until(self, mark: bytes) -> bytes:
        while (end := self._received.find(mark)) < 0:
            self._receive()
        return self.read(end + len(mark))

    def read(self, size: int) -> bytes:
        while len(self._received) < size:
            self._receive()
        data = bytes(self._received[:size])
        del self._received[:size]
        return data

    def read_numbers(self, count: int) -> list[int]:
        words = self.read_until(b"\n").split()
        if len(words) != count:
            # A shell that starts says something else first.
            raise self._failure("rebooted")
        return [int(word) for word in words]

    def read_file(self, name: str, size: int) -> bytes:
        content = b""
        for number, start in enumerate(range(0, size, _OUTPUT_PART)):
            part = min(size - start, _OUTPUT_PART)
            self._deadline = time.monotonic() + 30
            self.send(f"part {name} {number} {part}\n".encode())
            content += self.read(part)
        return content

    def log(self) -> str:
        if self._log.closed:
            return self._last_log
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace").replace("\r\n", "\n")

    def power_off(self, timeout: float) -> bool:
        """Whether the process ended by itself within `timeout` seconds."""
        self.expect("powering off", within=timeout)
        with suppress(GuestError):
            self.send(b"exit\n")
        # Popen.wait would take the number of the process group away from us, see _end.
        pidfd = os.pidfd_open(self.process.pid)
        try:
            ended = select.poll()
            ended.register(pidfd, select.POLLIN)
            self._wait(self, pidfd, time.monotonic() + timeout)
            return bool(ended.poll(timeout * 1000))
        finally:
            os.close(pidfd)

    def end(self) -> str:
        """Kill what is left, and return the log."""
        try:
            _end(self.process, self._watcher)
            self._last_log = self.log()
        finally:
            self._release()
        return self._last_log

    def _receive(self) -> None:
        self._wait(self, self._channel.fileno(), self._deadline)
        data = self._answer(lambda: self._channel.recv(1 << 20))
        if not data:
            raise self._failure("ended")
        self._received += data

    def _answer(self, operation: Callable[[], T]) -> T:
        left = max(self._deadline - time.monotonic(), 0.001)
        self._channel.settimeout(None if left == math.inf else left)
        try:
            return operation()
        except TimeoutError:
            raise self._failure("hangs") from None
        except OSError:
            raise self._failure("ended") from None

    def _failure(self, verb: str) -> GuestError:
        return GuestError(_story(f"the guest {verb} while {self.doing}", kernel=self.log()))


class _Watcher:
    """A process that kills a process group when this one is gone, even by SIGKILL: a guest left alone never ends."""

    def __init__(self, group: int) -> None:
        # Its end of file is when the last who can write is gone: that is us, for nobody inherits it.
        reading, self._writing = os.pipe()
        try:
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                ["/bin/sh", "-c", f"read -r _; kill -KILL -{group}"],
                stdin=reading,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # What is typed at the terminal, or sent to our group, is not for it.
                start_new_session=True,
            )
        except BaseException:
            os.close(self._writing)
            os.killpg(group, signal.SIGKILL)
            raise
        finally:
            os.close(reading)

    def dismiss(self) -> None:
        """It is not needed any more."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            os.close(self._writing)


def _end(process: subprocess.Popen[bytes], watcher: _Watcher) -> None:
    if process.returncode is not None:
        return
    # Before the wait: until then the process exists, if only as a zombie, and the group's number is no one else's.
    os.killpg(process.pid, signal.SIGKILL)
    watcher.dismiss()
    process.wait()
    for _ in range(1000):  # its helpers are dead a moment later
        if not _lives(process.pid):
            break
        time.sleep(0.001)


def _lives(group: int) -> bool:
    """Whether a process of the group is more than a zombie, which whoever adopted it may keep for long."""
    for process in filter(str.isdigit, os.listdir("/proc")):  # not glob(): what ends meanwhile is an error to it
        with suppress(OSError):
            state, _, its_group = Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False


def _existing_socket(path: StrPath) -> str:
    path = os.path.abspath(path)
    if not Path(path).is_socket():
        raise GuestError(f"{path}: no device listens there; start it before the guest")
    return path


def _program(path: StrPath, purpose: str) -> Path:
    if not os.access(path, os.X_OK):
        raise GuestNotFound(f"{path}: no such program; {purpose}")
    return Path(path)


def _newest_build(pattern: str) -> Path:
    """The newest of the files that `guest/build` leaves in the cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vhost-user"
    builds = sorted(cache.glob(pattern), key=lambda path: path.parent.stat().st_mtime)
    if not builds:
        raise GuestNotFound(f"{cache}/{pattern}: no such guest kernel; `make guest` in the project's source builds it")
    return builds[-1]


def _story(headline: str, /, **sections: str) -> str:
    """`headline`, and the last lines of each section that has any. A panic is shown from its first line on."""
    story = headline
    for title, text in sections.items():
        lines = text.strip().splitlines()
        panics = (at for at, line in enumerate(lines) if "Kernel panic" in line)
        start = min(max(len(lines) - 40, 0), next(panics, len(lines)))
        if excerpt := lines[start : start + 120]:
            story += f"\n--- {title}\n" + "\n".join(excerpt)
    return story
