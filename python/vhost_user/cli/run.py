"""``vhost-user run module:Class``: serve a device class."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..device import Device
from . import options, serving
from .command import CommandParser
from .load import load

EXAMPLES = """\
examples:
  vhost-user run rng.py:Rng --socket-path /tmp/rng.sock
  vhost-user run drivers.disk:Disk --socket-path /tmp/disk.sock -o size=64M -o read_only
  vhost-user run drivers.disk:Disk -o help

A value is converted to the type that the constructor declares: int (512, 0x200, 64K), bool (yes or no; the key alone
is yes), float, str, Path, an enumeration, and lists with commas.
"""


def configure(parser: CommandParser) -> None:
    _add_arguments(parser)
    parser.epilog = EXAMPLES
    parser.capabilities = _capabilities
    parser.set_defaults(action=_run)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="MODULE:CLASS",
        help="the device class, as module:Class or path/to/file.py:Class; without :Class, the only one there",
    )
    parser.add_argument(
        "-o",
        dest="options",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="an argument of the constructor; '-o help' lists them",
    )
    serving.add_arguments(parser)


def _run(arguments: argparse.Namespace) -> int:
    device_class: type[Device] = load(arguments.target, Device)
    if "help" in arguments.options:
        print(options.accepted(device_class))
        return 0
    return serving.serve(lambda: options.construct(device_class, arguments.options), arguments)


def _capabilities(arguments: Sequence[str]) -> dict[str, object]:
    parser = argparse.ArgumentParser(prog="vhost-user run", add_help=False)
    _add_arguments(parser)
    known, _ = parser.parse_known_args(arguments)
    device_class: type[Device] = load(known.target, Device)
    return serving.capabilities(device_class.device_id)
