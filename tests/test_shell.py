"""``vhost-user shell``: a real guest, at a real terminal."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

DEADLINE = 100.0
VHOST_USER = [sys.executable, "-u", "-m", "vhost_user"]

DEVICES = """
    import time
    import vhost_user as vu
    from vhost_user import devices

    class Rng(devices.Rng):
        def __init__(self, *, text: str = "x", delay: float = 0) -> None:
            self.text = text
            self.delay = delay

        def fill(self, request: vu.Request) -> None:
            time.sleep(self.delay)
            request.write((self.text.encode() * request.writable)[:request.writable])

    class Disk(devices.Blk):
        def __init__(self, *, size: int = 1 << 20, serial: str = "") -> None:
            super().__init__(size, serial=serial)

    class Talks(Rng):
        def fill(self, request: vu.Request) -> None:
            print("a line\\nanother")
            request.write(bytes(request.writable))
            raise RuntimeError("on purpose")

    class Terminal(devices.Console):
        def on_output(self, data: bytes) -> None:
            if b"marco" in data:
                self.write(b"polo")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "devices.py").write_text(textwrap.dedent(DEVICES))
    return tmp_path


def shell(folder: Path, *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    """``vhost-user shell`` to its end, without a terminal."""
    return subprocess.run(
        [*VHOST_USER, "shell", *arguments],
        cwd=folder,
        input=typed,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


# --- One command ------------------------------------------------------------------------------------------------------


def test_a_command_prints_and_ends_as_it_does_in_the_guest(folder: Path) -> None:
    command = "head -c 4 /dev/hwrng; printf '\\r\\n'; echo error >&2; exit 7"
    ended = subprocess.run(
        [*VHOST_USER, "shell", "devices.py:Rng", "-o", "text=ab", "-c", command],
        cwd=folder,
        capture_output=True,
        timeout=DEADLINE,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (7, b"abab\r\n", b"error\n")


def test_the_shell_is_in_the_folder_where_it_was_started(folder: Path) -> None:
    (folder / "it's here").mkdir()
    ended = shell(folder / "it's here", "../devices.py:Rng", "-c", "pwd")
    assert ended.stdout == f"{folder}/it's here\n"


def test_several_devices_have_arguments_of_their_own(folder: Path) -> None:
    targets = ["devices.py:Rng", "devices.py:Disk"]
    command = "head -c 2 /dev/hwrng; cat /sys/block/vda/serial; blockdev --getsize64 /dev/vda"
    options = ["-o", "Rng.text=ab", "-o", "Disk.size=64K", "-o", "Disk.serial=42\n"]
    assert shell(folder, *targets, *options, "-c", command).stdout == "ab42\n65536\n"


def test_an_argument_for_no_class_is_refused(folder: Path) -> None:
    ended = shell(folder, "devices.py:Rng", "devices.py:Disk", "-o", "text=ab")
    assert (ended.returncode, ended.stderr) == (
        2,
        "vhost-user shell: -o text=ab: say for which class: Rng.text=ab or Disk.text=ab\n",
    )


def test_arguments_of_all_classes_are_listed_on_request(folder: Path) -> None:
    ended = shell(folder, "devices.py:Rng", "devices.py:Disk", "-o", "help")
    assert ended.stdout.splitlines()[::3] == ["Rng takes", "Disk takes"]


def test_without_a_terminal_it_reads_a_script(folder: Path) -> None:
    ended = shell(folder, "devices.py:Rng", typed="head -c 3 /dev/hwrng\nexit 4\n")
    assert (ended.returncode, ended.stdout) == (4, "xxx")


def test_a_guest_that_is_missing_is_said_in_a_line(folder: Path) -> None:
    ended = shell(folder, "devices.py:Rng", "--kernel", "nowhere/linux", "-c", "true")
    assert (ended.returncode, ended.stderr) == (
        1,
        "vhost-user shell: nowhere/linux: no such program; it was given as the kernel\n",
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_a_signal_ends_a_command_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, status: int
) -> None:
    (folder / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(folder / "tmp"))
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "from vhost_user.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "shell", "devices.py:Talks", "-c", "head -c 1 /dev/hwrng; sleep 1000"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "a line\n"
        process.send_signal(number)
        assert process.wait(DEADLINE) == status
    assert guests_in(folder / "tmp") == []
    assert list((folder / "tmp").iterdir()) == []


def guests_in(folder: Path) -> list[str]:
    """The guests whose sockets are in a folder."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if f"virtio_uml.device={folder}" in Path("/proc", process, "cmdline").read_text():
                found.append(process)
    return found


# --- A session at a terminal ------------------------------------------------------------------------------------------


class Terminal:
    """A terminal of 100 by 30 characters with ``vhost-user shell`` in it."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.ours, self.theirs = pty.openpty()
        self.resize(100, 30)
        self.settings = termios.tcgetattr(self.theirs)
        self.process = subprocess.Popen(
            # It is the terminal of the process's session: Ctrl-C would be a signal, and a new size is one.
            ["setsid", "--ctty", *VHOST_USER, "shell", *arguments],
            cwd=folder,
            stdin=self.theirs,
            stdout=self.theirs,
            stderr=self.theirs,
            env={**os.environ, "TERM": "dumb"},
        )
        self.seen = b""
        self.introduction = ""

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def type(self, text: str | bytes) -> None:
        data = text.encode() if isinstance(text, str) else text
        while data:
            data = data[os.write(self.ours, data) :]

    def run(self, command: str) -> str:
        """Type a command at the prompt. Returns what it printed."""
        self.type(f"{command}\r")
        self.read_until("\n")
        printed = self.read_until("guest# ")
        return printed.removesuffix("guest# ").replace("\r\n", "\n")

    def read_until(self, mark: str) -> str:
        """What was printed up to `mark`, and that."""
        end = time.monotonic() + DEADLINE
        while mark.encode() not in self.seen:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.ours], [], [], left)[0]:
                raise AssertionError(f"no {mark!r} within {DEADLINE} s, but {self.seen[-2000:]!r}")
            self.seen += os.read(self.ours, 1 << 16)
        text, _, self.seen = self.seen.partition(mark.encode())
        return text.decode() + mark

    def end(self) -> tuple[int, str]:
        """The exit status, and what was printed until then."""
        end = time.monotonic() + DEADLINE
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it does not end: {self.seen[-2000:]!r}"
            if select.select([self.ours], [], [], 0.02)[0]:
                self.seen += os.read(self.ours, 1 << 16)
        while select.select([self.ours], [], [], 0)[0]:
            self.seen += os.read(self.ours, 1 << 16)
        return self.process.returncode, self.seen.decode()

    @property
    def is_raw(self) -> bool:
        return termios.tcgetattr(self.theirs) != self.settings

    def close(self) -> None:
        # Not SIGKILL: nobody would end the guest.
        self.process.terminate()
        self.process.wait(DEADLINE)
        os.close(self.ours)
        os.close(self.theirs)


Open = Callable[..., Terminal]


@pytest.fixture
def terminal(folder: Path) -> Iterator[Open]:
    """Opens a terminal with ``vhost-user shell`` and arguments in it, and waits for its first prompt."""
    with contextlib.ExitStack() as opened:

        def start(*arguments: str) -> Terminal:
            terminal = Terminal(folder, *arguments)
            opened.callback(terminal.close)
            terminal.introduction = terminal.read_until("guest# ").replace("\r\n", "\n")
            return terminal

        yield start


def test_a_session(terminal: Open, folder: Path) -> None:
    guest = terminal("devices.py:Rng", "-o", "text=ab")
    assert guest.is_raw
    assert guest.run("head -c 4 /dev/hwrng; echo") == "abab\n"
    assert guest.run("pwd") == f"{folder}\n"
    assert guest.run("stty size") == "30 100\n"
    assert guest.run("(exit 9)") == ""
    guest.type("\x04")
    status, _ = guest.end()
    assert (status, guest.is_raw) == (9, False)


def test_it_says_which_device_is_which_and_how_to_get_away(terminal: Open) -> None:
    guest = terminal("devices.py:Disk", "devices.py:Rng")
    assert guest.introduction == (
        "Disk is /sys/bus/virtio/devices/virtio0\n"
        "Rng is /sys/bus/virtio/devices/virtio1\n"
        "Ctrl-D ends this guest; Ctrl-] three times ends it whatever it is doing.\n"
        "guest# "
    )
    assert guest.run("cat /sys/bus/virtio/devices/virtio?/device") == "0x0002\n0x0004\n0x0003\n"


def test_the_window_may_be_resized(terminal: Open) -> None:
    guest = terminal("devices.py:Rng")
    guest.type("sh -c 'trap \"stty size\" WINCH; echo begun; while :; do sleep 0.01; done'\r")
    guest.read_until("\nbegun\r\n")
    for columns, rows in ((132, 43), (80, 25)):
        guest.resize(columns, rows)
        guest.read_until(f"{rows} {columns}\r\n")


def test_ctrl_c_and_ctrl_z_are_for_the_guest(terminal: Open) -> None:
    guest = terminal("devices.py:Rng")
    for key, shown in (("\x03", "^C\r\nguest# "), ("\x1a", "Stopped")):
        guest.type("sh -c 'echo begun; exec sleep 1000'\r")
        guest.read_until("\nbegun\r\n")
        guest.type(key)
        guest.read_until(shown)


def test_a_terminal_that_is_slow_gets_everything(terminal: Open) -> None:
    guest = terminal("devices.py:Rng")
    guest.type("seq 30000\r")
    time.sleep(1)
    guest.read_until("\n")
    assert guest.read_until("guest# ") == "".join(f"{number}\r\n" for number in range(1, 30001)) + "guest# "


def test_a_guest_that_is_slow_gets_everything(terminal: Open, folder: Path) -> None:
    guest = terminal("devices.py:Rng")
    # More than what fits in the buffers of the driver, which are a megabyte.
    lines = "".join(f"{number:040}\n" for number in range(50000))
    guest.type("stty -echo; echo begun; sha256sum; stty echo\r")
    guest.read_until("\nbegun\r\n")
    (machine,) = children(guest.process.pid, "linux")
    os.kill(machine, signal.SIGSTOP)
    threading.Timer(1, os.kill, [machine, signal.SIGCONT]).start()
    guest.type(lines + "\x04")
    assert guest.read_until("guest# ").split()[0] == hashlib.sha256(lines.encode()).hexdigest()


def children(parent: int, name: str) -> list[int]:
    every: list[int] = []
    for task in os.listdir(f"/proc/{parent}/task"):
        with contextlib.suppress(OSError):
            every += map(int, Path(f"/proc/{parent}/task/{task}/children").read_text().split())
    return [child for child in every if Path(f"/proc/{child}/exe").resolve().name == name]


def test_what_devices_print_begins_at_the_left(terminal: Open) -> None:
    guest = terminal("devices.py:Talks")
    guest.type("head -c 1 /dev/hwrng | od -x\r")
    guest.read_until("a line\r\nanother\r\n")
    assert re.search(r"[^\r]\n", guest.read_until("RuntimeError: on purpose")) is None


def test_a_console_among_the_devices_has_another_number(terminal: Open) -> None:
    guest = terminal("devices.py:Terminal")
    guest.run("exec 3<>/dev/hvc0; stty raw -echo <&3")
    assert guest.run("printf marco >&3; head -c 4 <&3; echo") == "polo\n"


def test_ctrl_bracket_three_times_ends_it_whatever_it_is_doing(terminal: Open) -> None:
    guest = terminal("devices.py:Rng", "-o", "delay=3")
    guest.type("trap '' INT HUP TERM; cat /dev/hwrng\r\x1d")
    # By the time the echo is there, what was typed with it was seen.
    guest.read_until("hwrng\r\n")
    time.sleep(1.1)
    guest.type("\x1d\x1d")
    time.sleep(0.3)
    assert guest.process.poll() is None
    guest.type("\x1d\x1d\x1d")
    status, _ = guest.end()
    assert (status in (1, 130), guest.is_raw) == (True, False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_terminal_is_itself_again_after_a_signal(terminal: Open, number: signal.Signals) -> None:
    guest = terminal("devices.py:Rng")
    guest.process.send_signal(number)
    status, _ = guest.end()
    assert (status, guest.is_raw) == (143, False)


@pytest.mark.parametrize(
    ("command", "expected", "words"),
    [("poweroff", 0, ""), ("halt", 0, ""), ("reboot", 1, "the guest rebooted while")],
)
def test_the_terminal_is_itself_again_when_the_guest_ends(
    terminal: Open, command: str, expected: int, words: str
) -> None:
    guest = terminal("devices.py:Rng")
    guest.type(f"busybox {command} -f\r")
    status, printed = guest.end()
    assert (status, words in printed, guest.is_raw) == (expected, True, False)


# --- New code under a running guest -----------------------------------------------------------------------------------

CHANGING_RNG = """
    import vhost_user as vu

    class Rng(vu.Device, device_id=vu.DeviceId.RNG):
        requestq = vu.Queue()
        requests = 0

        @requestq.handler
        def fill(self, request: vu.Request) -> None:
            request.write((b"%03d\\n" % VERSION * request.writable)[: request.writable // 4 * 4])
            self.requests += 1
            # The kernel has a buffer, and other uses for entropy: by now it was given to the command, too.
            if self.requests == 20:
                print("version VERSION", flush=True)

        def on_reload(self, old_class: type[vu.Device]) -> None:
            self.requests = 0
"""

CHANGING_DISK = """
    import time
    from vhost_user.devices import Blk

    class Disk(Blk):
        def on_connect(self) -> None:
            print("connected", flush=True)

        def write(self, request, offset: int, count: int) -> None:
            time.sleep(0.002)
            super().write(request, offset, count)  # VERSION
"""


@pytest.fixture
def reloading(folder: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Runs a command in a guest with a device that is loaded anew when its source changes."""
    with contextlib.ExitStack() as started:

        def start(*arguments: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [*VHOST_USER, "shell", "--reload", *arguments],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            started.callback(process.communicate)
            started.callback(process.terminate)
            return process

        yield start


def write(path: Path, source: str, version: int, end: str = "") -> None:
    new = path.with_suffix(".new")
    new.write_text(textwrap.dedent(source).replace("VERSION", str(version)) + end)
    # At once: whoever takes his time over the rest of a file has it loaded without.
    new.rename(path)


def test_every_read_succeeds_while_the_source_changes(
    folder: Path, reloading: Callable[..., subprocess.Popen[str]]
) -> None:
    source = folder / "rng.py"
    write(source, CHANGING_RNG, 0)
    read = "dd if=/dev/hwrng bs=64 count=1 2>/dev/null | head -n 1 || echo lost"
    process = reloading("rng.py:Rng", "-c", f"until [ -e {folder}/stop ]; do {read}; done")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "version 0\n"
    for version in range(1, 21):
        if version % 5 == 0:
            write(source, CHANGING_RNG, 999, "def (")
            report = "rng.py, line 18: SyntaxError: invalid syntax; Rng keeps its old code\n"
            assert process.stderr.readline() == report
        write(source, CHANGING_RNG, version)
        assert process.stderr.readline() == "rng.py: Rng has new code\n"
        assert process.stdout.readline() == f"version {version}\n"
    (folder / "stop").touch()
    printed, errors = process.communicate(timeout=DEADLINE)
    versions = [int(line) for line in printed.splitlines()]
    assert (process.returncode, errors) == (0, "")
    assert versions == sorted(versions)
    assert {*range(20)} <= {*versions} <= {*range(21)}


def test_no_write_is_lost_while_the_source_changes(
    folder: Path, reloading: Callable[..., subprocess.Popen[str]]
) -> None:
    source, image = folder / "disk.py", folder / "disk.img"
    write(source, CHANGING_DISK, 0)
    image.touch()
    os.truncate(image, 4 << 20)
    command = """
        cd /run
        head -c 4M /dev/urandom >data
        split -b 1M data
        for part in 0 1 2 3; do
            name=$(ls x?? | sed -n $((part + 1))p)
            dd if=$name of=/dev/vda bs=4k seek=$((part * 256)) oflag=direct conv=notrunc status=none &
        done
        wait
        sha256sum <data
    """
    process = reloading("disk.py:Disk", "-o", f"storage={image}", "-c", command)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "connected\n"
    versions = 0
    report = "disk.py: Disk has new code\n"
    while report == "disk.py: Disk has new code\n":
        versions += 1
        write(source, CHANGING_DISK, versions)
        report = process.stderr.readline()
    printed, _ = process.communicate(timeout=DEADLINE)
    assert (process.returncode, report) == (0, "")
    assert printed.split()[0] == hashlib.sha256(image.read_bytes()).hexdigest()
    assert versions > 5


def test_a_source_that_is_broken_is_told_at_the_terminal(terminal: Open, folder: Path) -> None:
    guest = terminal("devices.py:Rng", "--reload", "-o", "text=ab")
    with (folder / "devices.py").open("a") as source:
        source.write("import nothing_there\n")
    guest.read_until("ModuleNotFoundError: No module named 'nothing_there'; Rng keeps its old code\r\n")
    assert guest.run("head -c 4 /dev/hwrng; echo") == "abab\n"
