"""``vhost-user rng|blk|console|i2c``: the devices of `vhost_user.devices`, as programs."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import termios
import threading
import tty
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import devices
from ..devices import i2c as i2c_bus
from ..devices.console import StreamConsole
from ..ids import DeviceId
from . import options, serving
from .command import CommandParser, UsageError
from .load import load

if TYPE_CHECKING:
    from ..device import Device

STDIN, STDOUT = 0, 1
CHUNK = 1 << 16


def rng(parser: CommandParser) -> None:
    parser.epilog = "example:\n  vhost-user rng --socket-path /tmp/rng.sock\n"
    _configure(parser, DeviceId.RNG, lambda _: devices.Rng())


def blk(parser: CommandParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  vhost-user blk disk.img --socket-path /tmp/disk.sock --num-queues 4\n"
        "  vhost-user blk --memory 64M --socket-path /tmp/disk.sock\n"
    )
    storage = parser.add_mutually_exclusive_group(required=True)
    storage.add_argument("file", metavar="FILE", nargs="?", help="a disk image, or a block device")
    storage.add_argument("--blk-file", metavar="PATH", help="the same, as QEMU spells it")
    storage.add_argument(
        "--memory", metavar="SIZE", type=_integer, help="a disk of that many bytes that lives in memory"
    )
    parser.add_argument("--read-only", action="store_true", help="refuse to change the disk")
    parser.add_argument("--num-queues", metavar="N", type=_integer, default=1, help="number of queues (default: 1)")
    parser.add_argument("--serial", metavar="TEXT", default="", help="serial number, up to 20 bytes")
    _configure(parser, DeviceId.BLOCK, _disk, "blk-file", "read-only")


def _disk(arguments: argparse.Namespace) -> Device:
    return devices.Blk(
        arguments.memory or arguments.blk_file or arguments.file,
        read_only=arguments.read_only,
        num_queues=arguments.num_queues,
        serial=arguments.serial,
    )


def console(parser: CommandParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  vhost-user console --socket-path /tmp/console.sock          # then: screen /dev/pts/N, which it tells\n"
        "  vhost-user console --stdio --socket-path /tmp/console.sock\n"
    )
    other_end = parser.add_mutually_exclusive_group()
    other_end.add_argument("--pty", action="store_true", help="a pseudo-terminal; its path is printed (the default)")
    other_end.add_argument("--stdio", action="store_true", help="standard input and output of this program")
    other_end.add_argument("--console-socket", metavar="PATH", help="a UNIX socket that this program makes at PATH")
    _configure(parser, DeviceId.CONSOLE, _console)


def _console(arguments: argparse.Namespace) -> Device:
    if arguments.stdio:
        return StdioConsole()
    if arguments.console_socket:
        return devices.SocketConsole(arguments.console_socket)
    pty = devices.PtyConsole()
    print(f"The console is {pty.name}.", file=sys.stderr)
    return pty


class StdioConsole(StreamConsole):
    """A console whose other end is standard input and output, whatever these are."""

    def __init__(self) -> None:
        # Threads that wait, since these files may be shared with others and must not become non-blocking.
        self._ours, theirs = socket.socketpair()
        super().__init__(self._ours)
        self._printing = threading.Thread(target=_print_all, args=[theirs], daemon=True)
        self._typing = threading.Thread(target=_type_all, args=[theirs], daemon=True)
        self._terminal: list[Any] | None = None

    def on_start(self) -> None:
        if os.isatty(STDIN):
            self._terminal = termios.tcgetattr(STDIN)
            # The guest echoes. Ctrl-C remains.
            tty.setcbreak(STDIN)
        self._printing.start()
        self._typing.start()
        super().on_start()

    def on_stop(self) -> None:
        super().on_stop()
        self._ours.shutdown(socket.SHUT_WR)
        self._printing.join(1)
        if self._terminal is not None:
            termios.tcsetattr(STDIN, termios.TCSADRAIN, self._terminal)


def _print_all(stream: socket.socket) -> None:
    while data := stream.recv(CHUNK):
        while data:
            data = data[os.write(STDOUT, data) :]


def _type_all(stream: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := os.read(STDIN, CHUNK):
            stream.sendall(data)
        stream.shutdown(socket.SHUT_WR)


def i2c(parser: CommandParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  vhost-user i2c vhost_user.devices:Tmp102 --socket-path /tmp/i2c.sock\n"
        "  vhost-user i2c sensors.py:Lm75@0x48 sensors.py:Lm75@0x49 --socket-path /tmp/i2c.sock\n"
    )
    parser.add_argument(
        "targets",
        metavar="MODULE:CLASS[@ADDRESS]",
        nargs="*",
        help="a class derived from vhost_user.devices.i2c.Target",
    )
    _configure(parser, DeviceId.I2C_ADAPTER, _adapter)


def _adapter(arguments: argparse.Namespace) -> Device:
    return i2c_bus.Adapter(*map(_target, arguments.targets))


def _target(text: str) -> i2c_bus.Target:
    name, _, address = text.partition("@")
    target: i2c_bus.Target = options.construct(load(name, i2c_bus.Target), [])
    if address:
        try:
            target.address = options.integer(address)
        except ValueError as expected:
            raise UsageError(f"{text}: an address is {expected}, not {address!r}") from None
    return target


def _configure(
    parser: CommandParser, device_id: DeviceId, make: Callable[[argparse.Namespace], Device], *features: str
) -> None:
    def serve(arguments: argparse.Namespace) -> int:
        return serving.serve(lambda: _wrong_value_is_usage(make, arguments), arguments)

    serving.add_arguments(parser)
    parser.capabilities = lambda _: serving.capabilities(device_id, *features)
    parser.set_defaults(action=serve)


def _wrong_value_is_usage(make: Callable[[argparse.Namespace], Device], arguments: argparse.Namespace) -> Device:
    try:
        return make(arguments)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _integer(text: str) -> int:
    try:
        return options.integer(text)
    except ValueError as expected:
        raise argparse.ArgumentTypeError(f"expected {expected}, not {text!r}") from None
