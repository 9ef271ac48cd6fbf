"""``vhost-user replay``: a recorded front-end against a back-end of today."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .command import FAILURE, CommandParser
from .info import add_device_argument

EXAMPLES = """\
examples:
  vhost-user replay trace.jsonl --connect /tmp/disk.sock
  vhost-user replay trace.pcapng --connect /tmp/disk.sock --show

Memory of the recorded size, eventfds and sockets are made anew; no driver makes requests. Every answer has to be the
recorded one, except how far a ring got, which GET_VRING_BASE tells. The exit status is 1 if any is another.
"""


def configure(parser: CommandParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("file", metavar="FILE", type=Path, help="what 'vhost-user trace' wrote, as JSON or pcapng")
    parser.add_argument("--connect", metavar="PATH", type=Path, required=True, help="where the back-end listens")
    parser.add_argument("--connection", metavar="N", type=int, help="which one of the trace (default: the first)")
    add_device_argument(parser)
    parser.add_argument("--timeout", metavar="SECONDS", type=float, default=5.0, help="for every answer (default: 5)")
    parser.add_argument("--show", action="store_true", help="show the new session, as 'vhost-user trace' does")
    parser.set_defaults(action=_replay)


def _replay(arguments: argparse.Namespace) -> int:
    from ..trace.model import Record
    from ..trace.read import read
    from ..trace.replay import replay
    from ..trace.views import Lines

    def ignore(_: Record) -> None:
        pass

    outcome = replay(
        read(arguments.file),
        arguments.connect,
        connection=arguments.connection,
        timeout=arguments.timeout,
        show=Lines(sys.stdout) if arguments.show else ignore,
        device=arguments.device,
    )
    for difference in outcome.differences:
        print(difference)
    verdict = f"{len(outcome.differences)} differences" if outcome.differences else "no differences"
    print(f"{outcome.messages} messages sent, {outcome.answers} answers as recorded, {verdict}")
    return FAILURE if outcome.differences else 0
