"""The command line: ``vhost-user COMMAND …``.

A command is a row of `COMMANDS`, and a function in a module that is imported only when the command is used. The
function adds the command's arguments to a parser, and sets the default ``action`` to a function that takes them parsed
and returns the exit status.

Exit status: 0 after a good end, also by SIGTERM or SIGHUP; 1 after a failure; 2 for wrong usage; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import command
from .command import CommandParser

__all__ = ["COMMANDS", "main"]


class Row(NamedTuple):
    """A command: what it does, in a line, and module:function of this package that configures its parser."""

    summary: str
    configure: str


COMMANDS = {
    "run": Row("serve a device class of your own", "run:configure"),
    "shell": Row("boot a Linux kernel with a device class of your own, for a shell in it", "shell:configure"),
    "rng": Row("serve an entropy source", "builtin:rng"),
    "blk": Row("serve a disk", "builtin:blk"),
    "console": Row("serve a console", "builtin:console"),
    "i2c": Row("serve an I2C adapter with targets written in Python", "builtin:i2c"),
    "demo": Row("boot a Linux kernel with four devices, and show what it saw", "demo:configure"),
    "info": Row("show what a back-end tells of itself", "info:configure"),
    "trace": Row("show what a front-end and a back-end say to each other", "trace:configure"),
    "replay": Row("send a recorded front-end's messages to a back-end, and compare its answers", "replay:configure"),
    "check": Row("check a back-end against the specification", "check:configure"),
    "bench": Row("put load on a back-end, and tell how fast it is", "bench:configure"),
}

EXAMPLES = """\
examples:
  vhost-user demo
  vhost-user run rng.py:Rng --socket-path /tmp/rng.sock
  vhost-user blk disk.img --socket-path /tmp/disk.sock

'vhost-user COMMAND --help' tells the rest of a command.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command with `arguments` (default: the process's) and return its exit status.

    A program name such as ``vhost-user-blk``, from a symbolic link, stands for its command, since a description file
    of QEMU (vhost-user.json) names a program and not arguments.
    """
    if arguments is None:
        name = Path(sys.argv[0]).name.removeprefix("vhost-user-")
        arguments = [name, *sys.argv[1:]] if name in COMMANDS else sys.argv[1:]
    return command.execute(_parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="vhost-user",
        description="Virtio devices that are Python classes, for real Linux drivers.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action=Version, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, row in COMMANDS.items():
        commands.add_parser(name, help=row.summary, description=f"{row.summary.capitalize()}.", configure=row.configure)
    return parser


class Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:  # noqa: A002
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print("vhost-user", version("vhost-user"))
        parser.exit()
