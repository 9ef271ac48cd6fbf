"""``vhost-user bench SOCKET``: how fast a back-end is, alone or beside another."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

from ..bench import Access, Chain, Disk, Run, Spread, measure, ratios, spreads
from ..frontend import TIMEOUT
from .command import FAILURE, INTERRUPTED, CommandParser, UsageError
from .options import integer

RUNTIME = 5.0
RUNS_OF_TWO = 5

EXAMPLES = """\
examples:
  vhost-user bench /tmp/disk.sock --rw randread --bs 4k --iodepth 32
  vhost-user bench /tmp/disk.sock --versus /tmp/other.sock --numjobs 2
  vhost-user bench /tmp/rng.sock --queue 0 --writable 64 --json

Without --readable and --writable the back-end is taken for a disk. What a device may read of --readable parts is zero.

Exit status: 0; 1 if the device answered with errors, or could not be measured; 130 after Ctrl-C, which prints what was
measured until then.
"""


def configure(parser: CommandParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("socket", metavar="SOCKET", type=Path, help="where the back-end listens")
    parser.add_argument("--versus", metavar="OTHER", type=Path, help="measure this one, too, in turn")
    disk = parser.add_argument_group("load on a disk, in fio's words")
    disk.add_argument("--rw", choices=get_args(Access), help="the kind of load (default: randread)")
    disk.add_argument("--bs", metavar="BYTES", type=_positive, help="bytes of a request (default: 4k)")
    disk.add_argument("--size", metavar="BYTES", type=_positive, help="use so much of the disk (default: all)")
    disk.add_argument("--allow-writes", action="store_true", help="let --rw overwrite what is on the disk")
    other = parser.add_argument_group("load on any device")
    other.add_argument("--readable", metavar="SIZES", type=_sizes, help="parts that the device may read: 16,4096")
    other.add_argument("--writable", metavar="SIZES", type=_sizes, help="parts that the device may write")
    how = parser.add_argument_group("how")
    how.add_argument("--queue", metavar="N", type=_natural, default=0, help="the queue, or the first (default: 0)")
    how.add_argument("--numjobs", metavar="N", type=_positive, default=1, help="queues to load (default: 1)")
    how.add_argument(
        "--iodepth", metavar="N", type=_positive, default=1, help="requests under way on each queue (default: 1)"
    )
    how.add_argument(
        "--runtime", metavar="SECONDS", type=_seconds, default=RUNTIME, help=f"of each run (default: {RUNTIME:g})"
    )
    how.add_argument(
        "--runs", metavar="N", type=_positive, help=f"how often to measure (default: 1, with --versus {RUNS_OF_TWO})"
    )
    how.add_argument("--poll", action="store_true", help="look for completions all the time, on a CPU for each queue")
    how.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=TIMEOUT,
        help=f"for an answer, and for a device that completes nothing (default: {TIMEOUT:g})",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.set_defaults(action=_main)


def _natural(text: str) -> int:
    number = _integer(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected a number from 0 on, not {text!r}")
    return number


def _positive(text: str) -> int:
    number = _integer(text)
    if not 0 < number < 1 << 63:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, not {text!r}")
    return number


def _integer(text: str) -> int:
    try:
        return integer(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected {error}, not {text!r}") from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds such as 0.5, not {text!r}")
    return seconds


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(_positive(part) for part in text.split(","))
    if max(sizes) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"a part has less than 4 GiB; {text!r} has more")
    return sizes


def _main(arguments: argparse.Namespace) -> int:
    workload = _workload(arguments)
    targets = [arguments.socket, *([arguments.versus] if arguments.versus else [])]
    count = arguments.runs or (RUNS_OF_TWO if arguments.versus else 1)
    results: list[list[Run]] = [[] for _ in targets]
    interrupted = False
    progress = _Progress(count * len(targets)) if sys.stderr.isatty() else None
    try:
        for _ in range(count):
            for target, runs in zip(targets, results, strict=True):
                run = _measure(target, workload, arguments, progress.start(target) if progress else None)
                runs.append(run)
                if run.interrupted:
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        interrupted = True
    finally:
        if progress:
            progress.clear()
    measured = [(target, runs) for target, runs in zip(targets, results, strict=True) if runs]
    if measured:
        if arguments.json:
            print(json.dumps(_as_dict(workload, arguments, measured), indent=2))
        else:
            print(*_report(workload, arguments, measured), sep="\n")
    if interrupted:
        return INTERRUPTED
    return FAILURE if any(run.errors for runs in results for run in runs) else 0


def _workload(arguments: argparse.Namespace) -> Disk | Chain:
    if arguments.readable or arguments.writable:
        if arguments.rw or arguments.bs or arguments.size:
            raise UsageError("--rw, --bs and --size are for disks; --readable and --writable for anything else")
        return Chain(arguments.readable or (), arguments.writable or ())
    disk = Disk(arguments.rw or "randread", arguments.bs or 4096, arguments.size)
    if disk.block % 512 or disk.block >= 1 << 32:
        raise UsageError(f"--bs {disk.block}: a disk takes multiples of 512 bytes, less than 4 GiB")
    if disk.writes and not arguments.allow_writes:
        disks = f"{arguments.socket} and {arguments.versus}" if arguments.versus else arguments.socket
        raise UsageError(f"--rw {disk.rw} overwrites the disk at {disks}; --allow-writes permits it")
    return disk


def _measure(
    target: Path, workload: Disk | Chain, arguments: argparse.Namespace, watch: Callable[[int, float], object] | None
) -> Run:
    return measure(
        target,
        workload,
        seconds=arguments.runtime,
        depth=arguments.iodepth,
        queue=arguments.queue,
        queues=arguments.numjobs,
        poll=arguments.poll,
        timeout=arguments.timeout,
        watch=watch or (lambda requests, elapsed: None),
    )


class _Progress:
    """A line of the terminal that tells how far it is."""

    def __init__(self, runs: int) -> None:
        self._runs = runs
        self._run = 0

    def start(self, target: Path) -> Callable[[int, float], None]:
        """The next run begins. Returns what is to be called as it goes on."""
        self._run += 1
        last = (0, time.monotonic())

        def show(requests: int, elapsed: float) -> None:
            nonlocal last
            now = time.monotonic()
            rate = (requests - last[0]) / max(now - last[1], 1e-9)
            last = (requests, now)
            line = f"run {self._run} of {self._runs}, {target}: {elapsed:.1f} s, {requests} requests, {rate:.0f} IOPS"
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

        return show

    def clear(self) -> None:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _as_dict(
    workload: Disk | Chain, arguments: argparse.Namespace, measured: list[tuple[Path, list[Run]]]
) -> dict[str, object]:
    load: dict[str, object]
    if isinstance(workload, Disk):
        load = {"rw": workload.rw, "bs": workload.block, "size": workload.size}
    else:
        load = {"readable": workload.readable, "writable": workload.writable}
    names = ["queue", "numjobs", "iodepth", "runtime", "poll"]
    return {
        "load": load | {name: getattr(arguments, name) for name in names},
        "targets": [
            {
                "socket": str(target),
                "runs": [run.as_dict() for run in runs],
                "figures": {name: spread and spread.as_dict() for name, spread in spreads(runs).items()},
            }
            for target, runs in measured
        ],
        "ratios": ratios(measured[0][1], measured[1][1]) if len(measured) > 1 else None,
    }


#: What is printed of the figures: a title, and digits after the point.
ROWS = {
    "iops": ("IOPS", 0),
    "mib_per_second": ("MiB/s", 1),
    "latency_us.min": ("latency min, µs", 1),
    "latency_us.mean": ("        mean", 1),
    "latency_us.p50": ("        p50", 1),
    "latency_us.p90": ("        p90", 1),
    "latency_us.p99": ("        p99", 1),
    "latency_us.p99.9": ("        p99.9", 1),
    "latency_us.max": ("        max", 1),
    "cpu_percent.client": ("CPU client, %", 0),
    "cpu_percent.server": ("    server, %", 0),
}


def _report(
    workload: Disk | Chain, arguments: argparse.Namespace, measured: list[tuple[Path, list[Run]]]
) -> Iterator[str]:
    if isinstance(workload, Disk):
        what = f"{workload.rw} of {workload.block} bytes"
    else:
        parts = [("readable", workload.readable), ("writable", workload.writable)]
        what = ", ".join(f"{kind} {'+'.join(map(str, sizes))}" for kind, sizes in parts if sizes)
    queues = f"queue {arguments.queue}" if arguments.numjobs == 1 else f"{arguments.numjobs} queues"
    how = "polled" if arguments.poll else "notified"
    yield f"{what}; {queues}, depth {arguments.iodepth}, {how}"
    for letter, (target, runs) in zip("AB", measured, strict=False):
        seconds = sum(run.seconds for run in runs)
        requests = sum(run.requests for run in runs)
        times = "" if len(runs) == 1 else f" in {len(runs)} runs"
        yield f"{letter}  {target}: {requests} requests, {seconds:.2f} s{times}"
        for status in sorted({status for run in runs for status in run.errors}):
            count = sum(run.errors.get(status, 0) for run in runs)
            yield f"   errors: {count} requests were answered with status {status} ({_status(status)})"
    yield ""
    columns = [spreads(runs) for _, runs in measured]
    compared = ratios(measured[0][1], measured[1][1]) if len(measured) > 1 else {}
    letters = "".join(f"{letter:>28}" for letter, _ in zip("AB", columns, strict=False))
    last = f"{'B / A':>10}" if compared else ""
    yield " " * 16 + letters + last
    for name, (title, digits) in ROWS.items():
        ratio = compared.get(name)
        last = "" if ratio is None else f"{ratio:10.3f}"
        yield f"{title:16}" + "".join(f"{_cell(column[name], digits):>28}" for column in columns) + last


def _status(status: int) -> str:
    return {1: "IOERR", 2: "UNSUPP", 255: "none was written"}.get(status, "unknown")


def _cell(spread: Spread | None, digits: int) -> str:
    if spread is None:
        return "-"
    median = f"{spread.median:.{digits}f}"
    if spread.least == spread.most:
        return median
    return f"{median} [{spread.least:.{digits}f}..{spread.most:.{digits}f}]"
