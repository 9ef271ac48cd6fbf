"""``vhost-user trace``: see what a front-end and a back-end say to each other."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, TextIO, cast

from .command import FAILURE, CommandParser, UsageError, ended_by_signals
from .info import add_device_argument

if TYPE_CHECKING:
    from ..trace.proxy import Sink

EXAMPLES = """\
examples:
  vhost-user trace --listen /tmp/traced.sock --connect /tmp/disk.sock
  vhost-user trace --listen /tmp/traced.sock --connect /tmp/disk.sock --ring --json trace.jsonl
  vhost-user trace --listen /tmp/traced.sock --connect /tmp/disk.sock --pcapng - | wireshark -k -i -

The front-end uses /tmp/traced.sock instead of /tmp/disk.sock; nothing else changes for either side.
Wireshark reads --pcapng files with the plugin that --print-dissector prints:
  vhost-user trace --print-dissector > ~/.local/lib/wireshark/plugins/vhost_user.lua
"""


def configure(parser: CommandParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("--listen", metavar="PATH", type=Path, help="where the front-end connects")
    parser.add_argument("--connect", metavar="PATH", type=Path, help="where the back-end listens")
    parser.add_argument("--ring", action="store_true", help="also show requests in the rings; nothing is written there")
    add_device_argument(parser)
    parser.add_argument("--json", metavar="FILE", help="write JSON lines to FILE; '-': to the output, instead of text")
    parser.add_argument("--pcapng", metavar="FILE", help="write packets for Wireshark to FILE; '-': as above")
    parser.add_argument("--quiet", action="store_true", help="show no text")
    parser.add_argument("--no-channel", action="store_true", help="do not look at the requests of the back-end")
    parser.add_argument("--once", action="store_true", help="end when the first front-end is gone")
    parser.add_argument("--print-dissector", action="store_true", help="print the plugin for Wireshark and exit")
    parser.set_defaults(action=_trace)


def _trace(arguments: argparse.Namespace) -> int:
    from ..trace import dissector
    from ..trace.model import Record
    from ..trace.proxy import Proxy

    if arguments.print_dissector:
        print(dissector.text(), end="")
        return 0
    if arguments.listen is None or arguments.connect is None:
        raise UsageError("say where the front-end connects, --listen, and where the back-end listens, --connect")
    if arguments.json == arguments.pcapng == "-":
        raise UsageError("only one of --json and --pcapng can go to the output")

    with ended_by_signals(status=0), contextlib.ExitStack() as files:
        sinks = _sinks(arguments, files)

        def show(record: Record) -> None:
            for sink in sinks:
                sink(record)

        with Proxy(
            arguments.listen,
            arguments.connect,
            show,
            channel=not arguments.no_channel,
            ring=arguments.ring,
            once=arguments.once,
            device=arguments.device,
        ) as proxy:
            print(_instructions(arguments), file=sys.stderr, flush=True)
            proxy.run()
    return FAILURE if arguments.once and proxy.failures else 0


def _instructions(arguments: argparse.Namespace) -> str:
    text = f"tracing {arguments.connect}: let the front-end connect to {arguments.listen}; Ctrl-C ends it"
    if arguments.connect.exists():
        return text
    return f"nothing is at {arguments.connect} yet: start the back-end before the front-end connects\n{text}"


def _sinks(arguments: argparse.Namespace, files: contextlib.ExitStack) -> list[Sink]:
    from ..trace.pcapng import Writer
    from ..trace.views import JsonLines, Lines

    sinks: list[Sink] = []
    if arguments.json is not None:
        out = sys.stdout if arguments.json == "-" else files.enter_context(_create(arguments.json, "w"))
        sinks.append(JsonLines(cast(TextIO, out)))
    if arguments.pcapng is not None:
        packets = sys.stdout.buffer if arguments.pcapng == "-" else files.enter_context(_create(arguments.pcapng, "wb"))
        sinks.append(Writer(cast("IO[bytes]", packets)))
    if not arguments.quiet and "-" not in (arguments.json, arguments.pcapng):
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        sinks.append(Lines(sys.stdout, colour=colour))
    return sinks


def _create(path: str, mode: str) -> IO[str] | IO[bytes]:
    return cast("IO[str] | IO[bytes]", open(path, mode))
