"""``vhost-user shell module:Class``: a shell in a Linux guest that has the device."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .. import guest
from ..device import Device
from ..ids import DeviceId
from ..reload import Reloader
from . import options, serving
from .command import FAILURE, INTERRUPTED, CommandParser, UsageError, ended_by_signals
from .load import load
from .terminal import STDIN, TerminalConsole

EXAMPLES = """\
examples:
  vhost-user shell rng.py:Rng
  vhost-user shell rng.py:Rng --reload
  vhost-user shell rng.py:Rng -c 'head -c 16 /dev/hwrng | od -x'
  vhost-user shell vhost_user.devices:Blk -o storage=64M

The guest is User-Mode Linux on this machine's own files, which it cannot change, and with this machine's programs. The
shell is in the current folder; /run is for files that last as long as the guest. Ctrl-D ends the shell, and the guest
with it; Ctrl-] three times within a second ends them whatever they are doing.

Exit status: that of the shell, or of COMMAND; 1 when the guest fails, 130 after Ctrl-] three times.
"""

#: Exit status after SIGTERM, as a shell has it.
TERMINATED = 143

#: Seconds that the drivers have to let go of their devices.
POWER_OFF = 2.0


def configure(parser: CommandParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument(
        "targets",
        metavar="MODULE:CLASS",
        nargs="+",
        help="a device class, as module:Class or path/to/file.py:Class; without :Class, the only one there",
    )
    parser.add_argument(
        "-o",
        dest="options",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="an argument of the constructor, with several classes as CLASS.KEY=VALUE; '-o help' lists them",
    )
    parser.add_argument("-c", dest="command", metavar="COMMAND", help="run COMMAND with /bin/sh instead of a shell")
    parser.add_argument(
        "--reload", action="store_true", help="load a class anew, under the running guest, when its file changes"
    )
    parser.add_argument("--kernel", metavar="PATH", type=Path, help="a User-Mode Linux kernel of your own")
    parser.set_defaults(action=_main)


def _main(arguments: argparse.Namespace) -> int:
    classes: list[type[Device]] = [load(target, Device) for target in arguments.targets]
    if "help" in arguments.options:
        print(*map(options.accepted, dict.fromkeys(classes)), sep="\n")
        return 0
    assignments = [_assignments(cls, classes, arguments.options) for cls in classes]
    try:
        with ended_by_signals(TERMINATED):
            devices = list(map(options.construct, classes, assignments))
            with _reloaded(devices) if arguments.reload else contextlib.nullcontext():
                if arguments.command is not None:
                    return _run(devices, arguments.command, arguments.kernel)
                if not os.isatty(STDIN):
                    return _run(devices, sys.stdin.read(), arguments.kernel)
                return _interact(devices, arguments.kernel)
    except guest.GuestError as error:
        print(f"{arguments.prog}: {error}", file=sys.stderr)
        return FAILURE


def _assignments(cls: type[Device], classes: Sequence[type[Device]], given: Sequence[str]) -> list[str]:
    """Those of the ``-o`` that are for `cls`."""
    if len(classes) == 1:
        return list(given)
    names = [other.__name__ for other in classes]
    for assignment in given:
        if assignment.partition("=")[0].partition(".")[0] not in names:
            raise UsageError(f"-o {assignment}: say for which class: {' or '.join(f'{n}.{assignment}' for n in names)}")
    prefix = f"{cls.__name__}."
    return [assignment.removeprefix(prefix) for assignment in given if assignment.startswith(prefix)]


def _run(devices: list[Device], command: str, kernel: Path | None) -> int:
    with _booted(devices, kernel) as linux:
        result = linux.run(_here(command), timeout=None, check=False)
        for stream, data in ((sys.stdout, result.stdout), (sys.stderr, result.stderr)):
            stream.flush()
            stream.buffer.write(data)
            stream.buffer.flush()
        return result.status


def _interact(devices: list[Device], kernel: Path | None) -> int:
    wants_away = False

    def escape() -> None:
        nonlocal wants_away
        wants_away = True
        if linux.pid is not None:
            os.killpg(linux.pid, signal.SIGKILL)

    console = TerminalConsole(escape)
    consoles = sum(device.device_id == DeviceId.CONSOLE for device in devices)
    shell = f"""
        exec <>/dev/hvc{consoles} >&0 2>&0
        export TERM={shlex.quote(os.environ.get("TERM", "dumb"))} PS1='guest# '
        shell=$(command -v bash) && shell="$shell --norc" || shell=sh
        # What a terminal does with each line costs a request each: so this is done in one that is not a device.
        command -v script >/dev/null && shell="script -q -e -c '$shell' /dev/null"
        eval "exec /bin/busybox setsid -c $shell"
    """
    # Its messages would be printed in the middle of the shell; a console among the devices is there to get them.
    parameters = [] if consoles else ["console=tty0"]
    with _booted([*devices, console], kernel, parameters) as linux:
        for line in _introduction(devices):
            print(line, file=sys.stderr)
        try:
            with console.use():
                return linux.run(_here(shell), timeout=None, check=False).status
        except guest.GuestError:
            if wants_away:
                return INTERRUPTED
            if linux.log.rstrip().endswith(("reboot: Power down", "reboot: System halted")):
                return 0
            raise


def _here(script: str) -> str:
    """`script`, to be run in this folder, if there is one of that name in the guest."""
    return f"cd {shlex.quote(os.getcwd())} 2>/dev/null\n{script}"


def _introduction(devices: list[Device]) -> Iterator[str]:
    for number, device in enumerate(devices):
        yield f"{type(device).__name__} is /sys/bus/virtio/devices/virtio{number}"
    yield "Ctrl-D ends this guest; Ctrl-] three times ends it whatever it is doing."


@contextlib.contextmanager
def _booted(devices: Sequence[Device], kernel: Path | None, parameters: Sequence[str] = ()) -> Iterator[guest.Uml]:
    """A guest that has `devices`."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="vhost-user-shell-"))
        remove: Callable[[], None] = lambda: shutil.rmtree(folder, ignore_errors=True)  # noqa: E731
        stack.callback(remove)
        attached = []
        for number, device in enumerate(devices):
            path = folder / f"{number}.sock"
            stack.callback(serving.stop, device.start(path))
            attached.append((path, device.device_id))
        # Also before the devices, since one that hangs ends this process then and there.
        stack.callback(remove)
        linux = guest.Uml(attached, kernel=kernel, extra_args=parameters)
        stack.callback(linux.stop, timeout=POWER_OFF)
        yield linux.start()


@contextlib.contextmanager
def _reloaded(devices: list[Device]) -> Iterator[None]:
    with Reloader(*devices, report=lambda line: print(line, file=sys.stderr, flush=True)):
        yield
