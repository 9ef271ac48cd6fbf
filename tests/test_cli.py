"""The command line, as processes that a shell, a service manager or a virtual machine manager starts."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import stat
import struct
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from devices.vmms import CloudHypervisor, Crosvm, Monitor, monitors
from vhost_user import DeviceId
from vhost_user.guest import Uml, _newest_build

DEADLINE = 30.0
VHOST_USER = [sys.executable, "-m", "vhost_user"]

HEADER = struct.Struct("=III")
GET_FEATURES, SET_OWNER = 1, 3
F_RO = 1 << 5
VERSION_1 = 1 << 32

#: Where they are in what termios.tcgetattr() returns.
LOCAL_MODES = 3

DEVICES = """
    from __future__ import annotations
    import dataclasses, enum, os, time
    from pathlib import Path
    import vhost_user as vu, vhost_user.extensions

    class Colour(enum.Enum):
        RED = 1
        GREEN = 2

    @dataclasses.dataclass
    class NeedsItsModule:
        size: int

    class Rng(vu.Device, device_id=vu.DeviceId.RNG):
        requestq = vu.Queue()

        @requestq.handler
        def fill(self, request):
            request.write(os.urandom(request.writable))

    class Disk(Rng, device_id=vu.DeviceId.PMEM):
        eventq = vu.Queue()
        serial = vu.config.raw(20)

        def __init__(self, file: Path, *, size: int = 4096, read_only: bool = False, colour: Colour = Colour.RED):
            print(file, size, read_only, colour.name, flush=True)

    class Cipher(vu.extensions.CryptoSessions, device_id=vu.DeviceId.CRYPTO):
        dataq = vu.Queue()

        def on_buffers(self, queue):
            pass

    class Strange(Rng, device_id=200):
        pass

    class Hangs(Rng):
        def on_connect(self):
            print("hangs", flush=True)
            time.sleep(600)

    class Raises(Rng):
        def on_start(self):
            raise RuntimeError("no disk today")

    class Impossible(vu.Device, device_id=4):
        pass

    no_device = 1
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "devices.py").write_text(textwrap.dedent(DEVICES))
    (tmp_path / "lonely.py").write_text(
        "import vhost_user as vu\nclass Only(vu.Device, device_id=4):\n  q = vu.Queue()\n"
    )
    return tmp_path


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts ``vhost-user`` with arguments, in a folder with some devices."""
    with contextlib.ExitStack() as started:
        # A shell starts the tests in the background with Ctrl-C ignored, which processes inherit.
        ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
        started.callback(signal.signal, signal.SIGINT, ignored)

        def start(
            *arguments: str,
            program: Sequence[str] = VHOST_USER,
            pass_fds: Sequence[int] = (),
            stdin: int = subprocess.DEVNULL,
        ) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [*program, *arguments],
                cwd=folder,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                pass_fds=pass_fds,
            )
            started.enter_context(process)
            started.callback(process.kill)
            return process

        yield start


@pytest.fixture
def sock(folder: Path) -> Path:
    return folder / "device.sock"


Start = Callable[..., subprocess.Popen[str]]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``vhost-user`` to its end."""
    return subprocess.run(
        [*VHOST_USER, *arguments], cwd=folder, capture_output=True, text=True, timeout=DEADLINE, check=False
    )


def features_of(connection: socket.socket) -> int:
    """Say hello as a front-end does, and ask for the features."""
    connection.settimeout(DEADLINE)
    connection.sendall(HEADER.pack(SET_OWNER, 1, 0) + HEADER.pack(GET_FEATURES, 1, 0))
    reply = connection.recv(HEADER.size + 8, socket.MSG_WAITALL)
    request, flags, size, features = struct.unpack("=IIIQ", reply)
    assert (request, flags, size) == (GET_FEATURES, 5, 8)
    return int(features)


def connect(path: Path) -> socket.socket:
    """A connection to the device at `path`, once it listens there."""
    deadline = time.monotonic() + DEADLINE
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            assert time.monotonic() < deadline, f"nobody listens at {path}"
            time.sleep(0.01)
        else:
            return connection


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def wait_for_instructions(process: subprocess.Popen[str]) -> list[str]:
    """The five lines that say where the device is and how to attach it."""
    assert process.stderr is not None
    return [process.stderr.readline().rstrip("\n") for _ in range(5)]


# --- What is served ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["devices:Rng", "devices.py:Rng", "./devices.py:Rng", "lonely", "lonely.py"])
def test_run_serves_a_class(start: Start, sock: Path, target: str) -> None:
    start("run", target, "--socket-path", str(sock))
    with connect(sock) as connection:
        assert features_of(connection) & VERSION_1


def test_the_script_looks_for_modules_in_the_current_folder(start: Start, sock: Path) -> None:
    start("run", "devices:Rng", "--socket-path", str(sock), program=[str(script_path())])
    with connect(sock) as connection:
        assert features_of(connection) & VERSION_1


def test_one_front_end_follows_another(start: Start, sock: Path) -> None:
    start("run", "devices:Rng", "--socket-path", str(sock))
    for _ in range(2):
        with connect(sock) as connection:
            assert features_of(connection) & VERSION_1


def test_options_reach_the_constructor_as_what_it_declares(start: Start, sock: Path) -> None:
    options = ["-o", "file=a/b", "-o", "size=0x10K", "-o", "read-only", "-o", "colour=green"]
    process = start("run", "devices:Disk", *options, "--socket-path", str(sock))
    assert process.stdout is not None
    assert process.stdout.readline() == "a/b 16384 True GREEN\n"


@pytest.mark.parametrize("arguments", [["--blk-file", "disk"], ["disk"], ["--memory", "1M"]])
def test_blk_serves_a_disk(start: Start, folder: Path, sock: Path, arguments: list[str]) -> None:
    (folder / "disk").write_bytes(bytes(4096))
    start("blk", *arguments, "--socket-path", str(sock))
    with connect(sock) as connection:
        assert not features_of(connection) & F_RO


def test_a_disk_that_is_read_only_says_so(start: Start, folder: Path, sock: Path) -> None:
    (folder / "disk").write_bytes(bytes(4096))
    start("blk", "disk", "--read-only", "--socket-path", str(sock))
    with connect(sock) as connection:
        assert features_of(connection) & F_RO


def test_rng_serves_an_entropy_source(start: Start, sock: Path) -> None:
    start("rng", "--socket-path", str(sock))
    with connect(sock) as connection:
        assert features_of(connection) & VERSION_1


def test_a_console_is_a_terminal_whose_path_is_told(start: Start, sock: Path) -> None:
    process = start("console", "--socket-path", str(sock))
    assert process.stderr is not None
    said = process.stderr.readline()
    assert said.startswith("The console is /dev/pts/")
    assert Path(said.split()[-1].rstrip(".")).is_char_device()
    with connect(sock) as connection:
        assert features_of(connection) & VERSION_1


def test_a_console_may_be_a_socket(start: Start, folder: Path, sock: Path) -> None:
    start("console", "--console-socket", str(folder / "tty.sock"), "--socket-path", str(sock))
    with connect(sock) as connection, connect(folder / "tty.sock"):
        assert features_of(connection) & VERSION_1


def test_a_console_may_be_standard_input_and_output(start: Start, folder: Path, sock: Path) -> None:
    redirect = ["bash", "-c", 'exec "$@" >printed', "bash", *VHOST_USER]
    arguments = ["console", "--stdio", "--once", "--socket-path", str(sock)]
    process = start(*arguments, program=redirect, stdin=subprocess.PIPE)
    assert process.stdin is not None
    wait_for_instructions(process)
    with Uml([(sock, DeviceId.CONSOLE)]) as guest:
        guest.run("(exec 3<>/dev/hvc0; stty raw -echo <&3; echo ready >&3; read -r line <&3; echo $line >got) &")
        # Linux drops what is typed before its driver is ready.
        wait_for(lambda: "ready\n" in (folder / "printed").read_text())
        process.stdin.write("an order\n")
        process.stdin.close()
        assert guest.run("until [ -s got ]; do sleep 0.01; done; cat got").text == "an order"
        guest.run("seq 2000 >/dev/hvc0")
    assert process.wait(DEADLINE) == 0
    printed = (folder / "printed").read_text().split("ready\n")[1]
    assert printed.split()[:2000] == [str(number) for number in range(1, 2001)]


def test_a_terminal_is_left_as_it_was_found(start: Start, sock: Path) -> None:
    with contextlib.ExitStack() as files:
        ours, theirs = os.openpty()
        for end in (ours, theirs):
            files.callback(os.close, end)
        before = termios.tcgetattr(theirs)
        process = start("console", "--stdio", "--socket-path", str(sock), stdin=theirs)
        wait_for_instructions(process)
        assert termios.tcgetattr(theirs)[LOCAL_MODES] & (termios.ECHO | termios.ICANON | termios.ISIG) == termios.ISIG
        process.terminate()
        assert process.wait(DEADLINE) == 0
        assert termios.tcgetattr(theirs) == before


def test_i2c_serves_targets_at_their_addresses(start: Start, sock: Path) -> None:
    start("i2c", *("vhost_user.devices:Tmp102", "vhost_user.devices:Tmp102@0x49"), "--socket-path", str(sock))
    with connect(sock) as connection:
        assert features_of(connection) & VERSION_1


def test_two_targets_cannot_share_an_address(folder: Path, sock: Path) -> None:
    ended = run(folder, "i2c", *(["vhost_user.devices:Tmp102"] * 2), "--socket-path", str(sock))
    assert (ended.returncode, "0x48 is the address of" in ended.stderr) == (2, True)


# --- Where it is served -----------------------------------------------------------------------------------------------


def test_an_inherited_descriptor_may_listen(start: Start, sock: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(sock))
        listener.listen()
        start("run", "devices:Rng", "--fd", str(listener.fileno()), pass_fds=[listener.fileno()])
    for _ in range(2):
        with connect(sock) as connection:
            assert features_of(connection) & VERSION_1


def test_an_inherited_connection_is_served_to_its_end(start: Start) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = start("run", "devices:Rng", "--fd", str(theirs.fileno()), pass_fds=[theirs.fileno()])
        assert features_of(ours) & VERSION_1
    assert process.wait(DEADLINE) == 0


def test_systemd_passes_a_socket_that_listens(start: Start, sock: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(sock))
        listener.listen()
        activation = f'exec 3<&{listener.fileno()}; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'
        program = ["bash", "-c", activation, "bash", *VHOST_USER]
        start("run", "devices:Rng", program=program, pass_fds=[listener.fileno()])
    with connect(sock) as connection:
        assert features_of(connection) & VERSION_1


def test_a_device_connects_to_a_front_end_that_listens(start: Start, sock: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(sock))
        listener.listen()
        listener.settimeout(DEADLINE)
        process = start("run", "devices:Rng", "--connect", str(sock))
        connection, _ = listener.accept()
    with connection:
        assert features_of(connection) & VERSION_1
    assert process.wait(DEADLINE) == 0


def test_once_ends_with_the_first_front_end(start: Start, sock: Path) -> None:
    process = start("run", "devices:Rng", "--once", "--socket-path", str(sock))
    with connect(sock) as connection:
        features_of(connection)
    assert (process.wait(DEADLINE), sock.exists()) == (0, False)


@pytest.mark.parametrize(("mode", "expected"), [([], 0o600), (["--mode", "660"], 0o660)])
def test_the_socket_has_the_permissions_that_were_asked_for(
    start: Start, sock: Path, mode: list[str], expected: int
) -> None:
    wait_for_instructions(start("run", "devices:Rng", "--socket-path", str(sock), *mode))
    assert stat.S_IMODE(sock.stat().st_mode) == expected


def test_a_stale_socket_is_replaced(start: Start, sock: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(sock))
    start("run", "devices:Rng", "--socket-path", str(sock))
    with connect(sock) as connection:
        assert features_of(connection) & VERSION_1


# --- How it ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_it_cleanly(start: Start, sock: Path, number: signal.Signals, status: int) -> None:
    process = start("run", "devices:Rng", "--socket-path", str(sock))
    wait_for_instructions(process)
    with connect(sock) as connection:
        features_of(connection)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=DEADLINE)
        assert connection.recv(1) == b""
    assert (process.returncode, stderr, sock.exists()) == (status, "", False)


def test_a_handler_that_hangs_does_not_keep_the_process(start: Start, sock: Path) -> None:
    process = start("run", "devices:Hangs", "--socket-path", str(sock))
    wait_for_instructions(process)
    with connect(sock):
        assert process.stdout is not None
        assert process.stdout.readline() == "hangs\n"
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=DEADLINE)
    assert (process.returncode, "a handler hangs" in stderr) == (1, True)


def test_impatience_does_not_make_it_hang(start: Start, sock: Path) -> None:
    process = start("run", "devices:Hangs", "--socket-path", str(sock))
    wait_for_instructions(process)
    with connect(sock):
        assert process.stdout is not None
        assert process.stdout.readline() == "hangs\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=DEADLINE)
    assert (process.returncode, "Traceback" in stderr) == (1, False)


# --- What goes wrong --------------------------------------------------------------------------------------------------

SERVE = ["--socket-path", "s"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "vhost-user: the following arguments are required: COMMAND; see 'vhost-user --help'"),
        (["run", "nowhere:Rng", *SERVE], "there is no module nowhere here or installed"),
        (["run", "os.nowhere:Rng", *SERVE], "there is no module os.nowhere here or installed"),
        (["run", "nowhere.py:Rng", *SERVE], "there is no file nowhere.py"),
        (["run", "devices:Nobody", *SERVE], "devices has no class Nobody; derived from Device there: Rng, Disk, "),
        (["run", "devices:no_device", *SERVE], "devices:no_device is not a class derived from Device"),
        (["run", "devices", *SERVE], "say which class of devices, as in devices:Class; derived from Device there: Rng"),
        (["run", ":Rng", *SERVE], "expected module:Class or path/to/file.py:Class, not ''"),
        (["run", "devices:Rng"], "say where to serve the device: --socket-path, --fd or --connect"),
        (["run", "devices:Rng", *SERVE, "--fd", "3"], "argument --fd: not allowed with argument --socket-path"),
        (["run", "devices:Rng", *SERVE, "--mode", "9"], "expected permissions in octal, from 0 to 777, not '9'"),
        (["run", "devices:Rng", *SERVE, "-o", "size=1"], "-o size=1: there is no size; Rng takes no options"),
        (["run", "devices:Disk", *SERVE], "-o file=… is missing; Disk takes\n  file: pathlib.Path, required\n"),
        (["run", "devices:Disk", *SERVE, "-o", "flie=x"], "-o flie=x: there is no flie; did you mean file? Disk takes"),
        (["run", "devices:Disk", *SERVE, "-o", "size=big"], "-o size=big: expected a number such as 512, 0x200 or 64K"),
        (
            ["run", "devices:Disk", *SERVE, "-o", "colour=blue"],
            "-o colour=blue: expected one of red, green, not 'blue'",
        ),
        (["blk", *SERVE], "one of the arguments FILE --blk-file --memory is required"),
        (["blk", "--memory", "1M", "--num-queues", "0", *SERVE], "a disk has at least one queue, not 0"),
        (["i2c", "vhost_user.devices:Tmp102@home", *SERVE], "an address is a number such as"),
    ],
)
def test_wrong_usage_is_told_in_a_line(folder: Path, arguments: list[str], message: str) -> None:
    ended = run(folder, *arguments)
    assert message in ended.stderr
    assert (ended.returncode, ended.stdout, "Traceback" in ended.stderr) == (2, "", False)


def test_wrong_options_are_answered_with_the_right_ones(folder: Path) -> None:
    ended = run(folder, "run", "devices:Disk", *SERVE, "-o", "x=1")
    assert ended.stderr == textwrap.dedent("""\
        vhost-user run: -o x=1: there is no x; Disk takes
          file: pathlib.Path, required
          size: int, default 4096
          read_only: bool, default False
          colour: devices.Colour, default <Colour.RED: 1>
        """)


def test_a_path_that_cannot_be_bound_is_named(folder: Path) -> None:
    ended = run(folder, "run", "devices:Rng", "--socket-path", "/nowhere/at/all.sock")
    assert (ended.returncode, ended.stderr) == (1, "vhost-user run: /nowhere/at: No such file or directory\n")


def test_a_live_socket_is_left_alone(start: Start, folder: Path, sock: Path) -> None:
    wait_for_instructions(start("run", "devices:Rng", "--socket-path", str(sock)))
    ended = run(folder, "run", "devices:Rng", "--socket-path", str(sock))
    assert (ended.returncode, ended.stderr) == (
        1,
        f"vhost-user run: {sock}: another process is listening there; stop it, or choose another path\n",
    )
    with connect(sock) as connection:
        assert features_of(connection) & VERSION_1


def test_a_file_that_is_not_a_socket_is_left_alone(folder: Path) -> None:
    ended = run(folder, "run", "devices:Rng", "--socket-path", "devices.py")
    assert (ended.returncode, "devices.py: the file is not a socket" in ended.stderr) == (1, True)
    assert (folder / "devices.py").read_text().startswith("\nfrom __future__")


def test_a_descriptor_that_is_not_a_socket_is_refused(folder: Path) -> None:
    ended = run(folder, "run", "devices:Rng", "--fd", "1")
    assert (ended.returncode, ended.stderr.startswith("vhost-user run: descriptor 1 is not a socket")) == (1, True)


def test_an_impossible_device_says_what_is_wrong_with_it(folder: Path) -> None:
    ended = run(folder, "run", "devices:Impossible", *SERVE)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert "Impossible declares no queue" in ended.stderr


def test_an_exception_of_the_device_is_told_with_its_place(folder: Path) -> None:
    line = DEVICES.splitlines().index('            raise RuntimeError("no disk today")') + 1
    ended = run(folder, "run", "devices:Raises", *SERVE)
    assert (ended.returncode, ended.stderr) == (
        1,
        f"vhost-user run: RuntimeError: no disk today ({folder}/devices.py, line {line}; -v shows the way there)\n",
    )


def test_verbose_shows_the_traceback(folder: Path) -> None:
    ended = run(folder, "run", "devices:Raises", "-v", *SERVE)
    assert "Traceback (most recent call last):" in ended.stderr


def test_a_module_that_cannot_be_imported_says_why(folder: Path) -> None:
    (folder / "broken.py").write_text("import nothing_of_that_name\n")
    ended = run(folder, "run", "broken:Rng", *SERVE)
    assert ended.returncode == 1
    assert f"No module named 'nothing_of_that_name' ({folder}/broken.py, line 1" in ended.stderr


def test_verbose_logs_what_front_ends_do(start: Start, sock: Path) -> None:
    process = start("run", "devices:Rng", "-v", "--once", "--socket-path", str(sock))
    with connect(sock) as connection:
        features_of(connection)
    _, stderr = process.communicate(timeout=DEADLINE)
    assert "INFO vhost_user.device: Rng: a front-end connected\n" in stderr


# --- What it tells ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "capabilities"),
    [
        ("rng", {"type": "rng", "features": []}),
        ("blk", {"type": "block", "features": ["blk-file", "read-only"]}),
        ("console", {"type": "console", "features": []}),
        ("i2c", {"type": "i2c", "features": []}),
    ],
)
def test_capabilities_are_told_whatever_else_is_there(folder: Path, command: str, capabilities: object) -> None:
    ended = run(folder, command, "--fd", "nonsense", "--num-queues=x", "--nonsense", "--print-capabilities", "--mode")
    assert (ended.returncode, ended.stderr, json.loads(ended.stdout)) == (0, "", capabilities)


@pytest.mark.parametrize(("target", "name"), [("devices:Rng", "rng"), ("devices:Strange", "virtio-200")])
def test_capabilities_of_a_class_are_those_of_its_type(folder: Path, target: str, name: str) -> None:
    ended = run(folder, "run", target, "--nonsense", "--print-capabilities")
    assert (ended.returncode, json.loads(ended.stdout)) == (0, {"type": name, "features": []})


def test_options_of_a_class_are_listed_on_request(folder: Path) -> None:
    ended = run(folder, "run", "devices:Disk", "-o", "help")
    assert (ended.returncode, ended.stdout.splitlines()[:2]) == (0, ["Disk takes", "  file: pathlib.Path, required"])


def test_the_script_and_the_module_are_the_same(folder: Path) -> None:
    script = subprocess.run([script_path(), "--help"], capture_output=True, text=True, check=True)
    assert script.stdout == run(folder, "--help").stdout


def test_a_link_named_after_a_device_is_its_program(folder: Path) -> None:
    (folder / "vhost-user-rng").symlink_to(script_path())
    ended = subprocess.run([folder / "vhost-user-rng", "--print-capabilities"], stdout=subprocess.PIPE, check=True)
    assert json.loads(ended.stdout)["type"] == "rng"


def script_path() -> Path:
    return Path(sys.executable).parent / "vhost-user"


def test_the_instructions_are_what_to_paste(start: Start, sock: Path) -> None:
    said, qemu, cloud_hypervisor, crosvm, uml = wait_for_instructions(
        start("run", "devices:Disk", "-o", "file=x", "--socket-path", str(sock))
    )
    assert said == f"Disk is served at {sock}; Ctrl-C ends it. To attach it:"
    assert qemu == (
        "  QEMU             -m 1G -object memory-backend-memfd,id=mem,size=1G,share=on -numa node,memdev=mem "
        f"-chardev socket,id=disk,path={sock} "
        "-device vhost-user-test-device-pci,virtio-id=27,num_vqs=2,config_size=20,chardev=disk"
    )
    assert cloud_hypervisor == (
        "  cloud-hypervisor --memory size=1G,shared=on "
        f"--generic-vhost-user 'device_type=27,queue_sizes=[256,256],socket={sock}'"
    )
    assert crosvm == "  crosvm           (has no name for devices of type 27)"
    assert uml == f"  User-Mode Linux  virtio_uml.device={sock}:27"


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "devices:Disk", "-o", "file=x"],
        ["rng"],
        ["blk", "--memory", "1M", "--num-queues", "2"],
        ["i2c", "vhost_user.devices:Tmp102"],
        ["console", "--console-socket", "tty.sock"],
        ["run", "devices:Cipher"],
    ],
)
def test_qemu_takes_what_is_to_be_pasted(start: Start, folder: Path, arguments: list[str]) -> None:
    path = folder / "a,comma and blank.sock"
    _, line, *_ = wait_for_instructions(start(*arguments, "--socket-path", str(path)))
    qemu = _newest_build("qemu-*/vmlinuz").parent / "qemu-system-x86_64"
    machine = [
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-machine",
        "q35",
        "-S",
        "-monitor",
        "stdio",
        "-smp",
        "4",
    ]
    ended = subprocess.run(
        [qemu, *machine, *shlex.split(line)[1:]],
        input="info virtio\nquit\n",
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "[virtio" in ended.stdout or "[vhost" in ended.stdout


@monitors(CloudHypervisor, Crosvm)
@pytest.mark.parametrize(
    "arguments", [["rng"], ["blk", "--memory", "1M", "--num-queues", "2"], ["console", "--console-socket", "tty.sock"]]
)
def test_a_monitor_takes_what_is_to_be_pasted(
    start: Start, folder: Path, kind: type[Monitor], bare: Path, arguments: list[str]
) -> None:
    process = start(*arguments, "-v", "--socket-path", str(folder / "a,comma and blank.sock"))
    _, _, cloud_hypervisor, crosvm, _ = wait_for_instructions(process)
    words = shlex.split({CloudHypervisor: cloud_hypervisor, Crosvm: crosvm}[kind])[1:]
    monitor: list[str] = {
        CloudHypervisor: ["--kernel", str(bare), "--serial", "off", "--console", "off", *words],
        Crosvm: ["run", "--disable-sandbox", "--no-rng", *words, str(bare)],
    }[kind]
    with subprocess.Popen([kind.program(), *monitor], stdin=subprocess.DEVNULL) as running:
        try:
            assert process.stderr is not None
            assert "a front-end connected" in process.stderr.readline()
        finally:
            running.kill()


def test_user_mode_linux_takes_what_is_to_be_pasted(start: Start, sock: Path) -> None:
    *_, line = wait_for_instructions(start("rng", "--socket-path", str(sock)))
    with Uml(extra_args=[line.split()[-1]]) as guest:
        assert len(guest.run("head -c 32 /dev/hwrng").stdout) == 32


def test_a_type_that_makes_qemu_abort_is_pointed_out(start: Start, sock: Path) -> None:
    _, line, *_ = wait_for_instructions(start("run", "devices:Strange", "--socket-path", str(sock)))
    assert line == "  QEMU             (has no name for devices of type 200, and refuses them)"


def test_a_path_that_user_mode_linux_cannot_be_told_is_pointed_out(start: Start, folder: Path) -> None:
    *_, line = wait_for_instructions(start("rng", "--socket-path", str(folder / "a b.sock")))
    assert "choose another path" in line


def test_the_version_is_the_packages(folder: Path) -> None:
    from importlib.metadata import version

    assert run(folder, "--version").stdout == f"vhost-user {version('vhost-user')}\n"


def test_help_imports_no_command() -> None:
    code = "import sys; from vhost_user.cli import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = ended.stdout.splitlines()[-1].split()
    assert not {"vhost_user.cli.run", "vhost_user.cli.builtin", "vhost_user.devices", "vhost_user.guest"} & {*loaded}
