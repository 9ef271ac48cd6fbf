"""``vhost-user check SOCKET``: what a back-end does that the text does not allow."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from .. import check
from ..check import CHECKS, Suite, Target, Verdict, reports, selected
from .command import FAILURE, WRONG_USAGE, CommandParser, UsageError, ended_by_signals
from .info import add_device_argument

EXAMPLES = """\
examples:
  vhost-user check /tmp/disk.sock
  vhost-user check /tmp/sensor.sock --device i2c --only framing --only 'ring.*'
  vhost-user check --device blk --command 'qemu-storage-daemon … addr.path={socket}'
  vhost-user check --list

Verdicts: pass; FAIL, wrong by the text; differs, the text leaves room and implementations differ; skip; error.

Nothing is written to a disk. A back-end that a check kills is started anew with --command; without it, the rest of the
checks are errors. It should serve nobody else meanwhile.

Exit status: 0 if nothing failed, 1 if something did, 2 if nothing could be checked.
"""


def configure(parser: CommandParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("socket", metavar="SOCKET", nargs="?", help="where the back-end listens")
    add_device_argument(parser)
    parser.add_argument(
        "--command",
        metavar="COMMAND",
        help="start the back-end with COMMAND, in which {socket} is where it shall listen",
    )
    parser.add_argument(
        "--only",
        metavar="GLOB",
        action="append",
        default=[],
        help="check only what matches, or a group; may be repeated",
    )
    parser.add_argument("--list", action="store_true", help="print the checks, and where the text says so")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--tap", action="store_true", help="print the results in the Test Anything Protocol")
    form.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--junit", metavar="FILE", type=Path, help="write the results to FILE as JUnit XML")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=float,
        default=check.TIMEOUT,
        help=f"for an answer, or a request (default: {check.TIMEOUT:g})",
    )
    parser.set_defaults(action=_main)


def _main(arguments: argparse.Namespace) -> int:
    names = selected(arguments.only)
    if not names:
        raise UsageError(f"no check matches {' or '.join(arguments.only)}; --list prints them")
    if arguments.list:
        print(*reports.catalogue(CHECKS[name] for name in names), sep="\n")
        return 0
    if arguments.socket is None and arguments.command is None:
        raise UsageError("say what to check: SOCKET, or --command")
    target = Target(arguments.socket, command=arguments.command, timeout=arguments.timeout)
    with contextlib.closing(target), ended_by_signals(FAILURE):
        try:
            return _check(Suite(target, arguments.device), names, arguments)
        except check.TargetError as error:
            print(f"{arguments.prog}: {error}", file=sys.stderr)
            return WRONG_USAGE


def _check(suite: Suite, names: list[str], arguments: argparse.Namespace) -> int:
    talks = not arguments.tap and not arguments.json
    if talks:
        print(f"device   {suite.device.name}{f': {suite.reason}' if suite.reason else ''}")
    results = []
    # Whoever names a check that may kill the back-end wants it.
    for result in suite.run(names, forced=len(names) == 1):
        results.append(result)
        if talks:
            print(*reports.lines(result), sep="\n", flush=True)
    if talks:
        print(reports.summary(results))
    elif arguments.tap:
        print(*reports.tap(results), sep="\n")
    else:
        print(reports.as_json(results))
    if arguments.junit:
        arguments.junit.write_bytes(reports.junit(results))
    return int(any(result.verdict in {Verdict.FAIL, Verdict.ERROR} for result in results))
