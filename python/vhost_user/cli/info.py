"""``vhost-user info SOCKET``: what a back-end tells of itself."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..features import TYPES, DeviceType, by_name, protocol_feature_names
from ..frontend import TIMEOUT, Frontend
from ..info import Info, inspect
from .command import CommandParser

EXAMPLES = """\
examples:
  vhost-user info /tmp/disk.sock
  vhost-user info /tmp/sensor.sock --device i2c --json

The type of a device is not part of the protocol. It is guessed where features and configuration space make it plain.
"""


def configure(parser: CommandParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("socket", metavar="SOCKET", type=Path, help="where the back-end listens")
    add_device_argument(parser)
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=float, default=TIMEOUT, help=f"for each answer (default: {TIMEOUT:g})"
    )
    parser.set_defaults(action=_main)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """``--device``: what a back-end is to be taken for."""
    parser.add_argument("--device", metavar="TYPE", type=_device, help="the device type: blk, net, … or its number")


def _device(name: str) -> DeviceType:
    try:
        return by_name(name)
    except KeyError:
        known = ", ".join(sorted(known.name for known in TYPES.values()))
        raise argparse.ArgumentTypeError(f"expected {known}, or a number, not {name!r}") from None


def _main(arguments: argparse.Namespace) -> int:
    with Frontend.connect(arguments.socket, timeout=arguments.timeout) as frontend:
        info = inspect(frontend, arguments.device)
    if arguments.json:
        print(json.dumps(info.as_dict(), indent=2))
    else:
        print(*_report(info), sep="\n")
    return 0


def _report(info: Info) -> Iterator[str]:
    number = f" ({info.device.id})" if info.device.id else ""
    yield f"device             {info.device.name}{number}: {info.reason}"
    yield from _words("features", info.features, info.device.feature_names(info.features))
    if info.protocol_features is None:
        yield "protocol features  not offered (feature bit 30)"
    else:
        yield from _words("protocol features", info.protocol_features, protocol_feature_names(info.protocol_features))
    yield f"queues             {'not told (MQ is not offered)' if info.queues is None else info.queues}"
    slots = "8 (CONFIGURE_MEM_SLOTS is not offered)" if info.memory_slots is None else info.memory_slots
    yield f"memory slots       {slots}"
    if not info.config:
        yield "configuration      none"
        return
    yield f"configuration      {len(info.config)} bytes"
    fields = info.fields
    width = max(map(len, fields), default=0)
    for name, value in fields.items():
        yield f"  {name:{width}}  {value}"
    if not fields:
        yield from (f"  {at:#05x}  {row}" for at, row in _rows(info.config))


def _words(title: str, value: int, names: Sequence[str]) -> Iterator[str]:
    yield f"{title:17}  {value:#x}"
    line = ""
    for name in names:
        if line and len(line) + len(name) > 100:
            yield f"  {line}"
            line = ""
        line += f" {name}" if line else name
    if line:
        yield f"  {line}"


def _rows(space: bytes) -> Iterator[tuple[int, str]]:
    """Sixteen bytes a row, without the zeroes at the end."""
    space = space.rstrip(b"\0")
    for at in range(0, max(len(space), 1), 16):
        yield at, space[at : at + 16].hex(" ") or "all zero"
