"""Load on a back-end, from the Rust driver: how much it does in a second, how long a request takes, and what it costs.

run = measure("/tmp/disk.sock", Disk("randread"), depth=8, seconds=2.0)
print(run.iops, run.latency["p99"])
"""

from __future__ import annotations

import os
import resource
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ._core import Load, LoadResult, Memory, TransportFeature
from .errors import VhostUserError
from .frontend import TIMEOUT, DriverQueue, Frontend
from .ids import DeviceId
from .info import inspect
from .server import PathLike

Access = Literal["read", "write", "rw", "randread", "randwrite", "randrw"]

#: Percentiles of the latency that are told.
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9, "max": 100.0}

#: Seconds between two calls of who watches.
INTERVAL = 0.25

MAX_DEPTH = 1 << 15
MAX_QUEUES = 256

SECTOR = 512
PAGE = 4096
DESCRIPTOR = 16

# Features of a disk. Virtio 1.3, section 5.2.3.
F_SIZE_MAX = 1 << 1
F_RO = 1 << 5
F_BLK_SIZE = 1 << 6


class BenchError(VhostUserError):
    """The back-end is not one that the load can be put on."""


@dataclass(frozen=True)
class Disk:
    """Reads and writes of a disk, in fio's words. Virtio 1.3, section 5.2.6."""

    rw: Access = "randread"
    """``rw`` and ``randrw`` are half reads, half writes."""
    block: int = 4096
    """Bytes of a request, a multiple of 512."""
    size: int | None = None
    """Bytes from the start of the disk that are used; None: all of it."""

    @property
    def reads(self) -> bool:
        return self.rw not in {"write", "randwrite"}

    @property
    def writes(self) -> bool:
        return self.rw not in {"read", "randread"}

    @property
    def parts(self) -> list[int]:
        return [16, self.block, 1]

    def make(self, frontend: Frontend, queues: Sequence[DriverQueue], depth: int, size: int) -> Load:
        random = self.rw.startswith("rand")
        rings = [queue._ring for queue in queues]
        return Load.disk(rings, depth, self.reads, self.writes, random, self.block, size // self.block)


@dataclass(frozen=True)
class Chain:
    """Requests to any device, by the sizes of their parts. What the device may read is zero."""

    readable: tuple[int, ...] = ()
    writable: tuple[int, ...] = ()

    @property
    def parts(self) -> list[int]:
        return [*self.readable, *self.writable]

    def make(self, queues: Sequence[DriverQueue], depth: int) -> Load:
        return Load.chains([queue._ring for queue in queues], depth, self.readable, self.writable)


@dataclass(frozen=True)
class Run:
    """What was measured once."""

    seconds: float
    requests: int
    """Completed ones, whatever their status."""
    sent: int
    """Bytes that the device took: of a disk, what was written."""
    received: int
    """Bytes that the device gave: of a disk, what was read."""
    errors: dict[int, int]
    """How often a disk answered with each status but 0."""
    latency: dict[str, float | None]
    """In µs: min, mean, p50, p90, p99, p99.9 and max. A percentile is told to within a 64th."""
    client_cpu: float
    """CPU time of this process, in percent of one CPU."""
    server_cpu: float | None
    """The same of the process that listens; None if that is this one, or cannot be seen."""
    interrupted: bool
    """Whether Ctrl-C ended it before its time."""

    @property
    def iops(self) -> float:
        """Completed requests in a second."""
        return self.requests / self.seconds if self.seconds else 0.0

    @property
    def mib_per_second(self) -> float:
        """Bytes both ways in a second, in MiB."""
        return (self.sent + self.received) / self.seconds / (1 << 20) if self.seconds else 0.0

    @property
    def figures(self) -> dict[str, float | None]:
        """What can be compared, by name."""
        return {
            "iops": self.iops,
            "mib_per_second": self.mib_per_second,
            **{f"latency_us.{name}": value for name, value in self.latency.items()},
            "cpu_percent.client": self.client_cpu,
            "cpu_percent.server": self.server_cpu,
        }

    def as_dict(self) -> dict[str, object]:
        """The same for JSON."""
        return {
            "seconds": self.seconds,
            "requests": self.requests,
            "bytes": {"sent": self.sent, "received": self.received},
            "errors": {str(status): count for status, count in self.errors.items()},
            "iops": self.iops,
            "mib_per_second": self.mib_per_second,
            "latency_us": self.latency,
            "cpu_percent": {"client": self.client_cpu, "server": self.server_cpu},
            "interrupted": self.interrupted,
        }


@dataclass(frozen=True)
class Spread:
    """One figure of several runs."""

    median: float
    least: float
    most: float

    def as_dict(self) -> dict[str, float]:
        """The same for JSON."""
        return {"median": self.median, "min": self.least, "max": self.most}


def spreads(runs: Sequence[Run]) -> dict[str, Spread | None]:
    """Every figure of `runs`; None where no run has it."""
    found: dict[str, Spread | None] = {}
    for name in runs[0].figures:
        values = [value for run in runs if (value := run.figures[name]) is not None]
        found[name] = Spread(statistics.median(values), min(values), max(values)) if values else None
    return found


def ratios(one: Sequence[Run], other: Sequence[Run]) -> dict[str, float | None]:
    """How many times the median of `one` that of `other` is, for each figure; None where that makes no sense."""
    first, second = spreads(one), spreads(other)
    found: dict[str, float | None] = {}
    for name in first:
        a, b = first[name], second[name]
        found[name] = b.median / a.median if a and b and a.median else None
    return found


def measure(
    path: PathLike,
    workload: Disk | Chain,
    *,
    seconds: float = 5.0,
    depth: int = 1,
    queue: int = 0,
    queues: int = 1,
    poll: bool = False,
    timeout: float = TIMEOUT,
    watch: Callable[[int, float], object] = lambda requests, elapsed: None,
) -> Run:
    """Connect to the back-end at `path`, and load it for so many `seconds`.

    `depth` requests are under way on each of `queues` queues, from `queue` on; a thread drives each of them, and waits
    for notifications or, with `poll`, looks for completions all the time. `watch` is called from time to time with the
    number of completed requests and the seconds. Ctrl-C ends it early.

    A disk that is written to loses its data.

    Raises:
        BenchError: the back-end is not a disk, or not one of this size; or it has fewer queues.
        PeerTimeout: the back-end completed no request, or did not answer a message, for `timeout` seconds.
        OSError: nobody listens there.
    """
    if not (0 < depth <= MAX_DEPTH and queue >= 0 and 0 < queues <= MAX_QUEUES - queue):
        raise BenchError(f"a load has 1 to {MAX_DEPTH} requests on each of 1 to {MAX_QUEUES} queues")
    with Frontend.connect(path, timeout=timeout) as frontend:
        size = 0
        if isinstance(workload, Disk):
            size = _look_at_disk(frontend, workload)
        else:
            frontend.negotiate()
        if frontend.queue_count is not None and queue + queues > frontend.queue_count:
            raise BenchError(f"{path}: the back-end has {frontend.queue_count} queues, not {queue + queues}")
        rings = _make_queues(frontend, workload.parts, depth, range(queue, queue + queues))
        if isinstance(workload, Disk):
            load = workload.make(frontend, rings, depth, size)
        else:
            load = workload.make(rings, depth)
        server = _Server(frontend)
        before = _own_cpu(), server.cpu()
        result, interrupted = _run(load, seconds, timeout, poll, watch)
        after = _own_cpu(), server.cpu()
    elapsed = result.seconds or 1.0
    served = after[1] - before[1] if after[1] is not None and before[1] is not None else None
    return Run(
        seconds=result.seconds,
        requests=result.requests,
        sent=result.sent,
        received=result.received,
        errors=result.errors,
        latency=_latency(result),
        client_cpu=100 * (after[0] - before[0]) / elapsed,
        server_cpu=None if served is None else 100 * served / elapsed,
        interrupted=interrupted,
    )


def _look_at_disk(frontend: Frontend, load: Disk) -> int:
    """Negotiate, and see that the device is a disk that can be loaded so. Returns how many bytes of it to use."""
    info = inspect(frontend)
    size, features, fields = load.size, info.features, info.fields
    if info.device.id == DeviceId.BLOCK:
        capacity = fields["capacity"] * SECTOR
        if size is not None and size > capacity:
            raise BenchError(f"the disk has {capacity} bytes; {size} were asked for")
        size = capacity if size is None else size
    elif info.device.id or size is None:
        raise BenchError(
            f"the back-end does not look like a disk: it is {info.device.name} ({info.reason}); describe requests to "
            "another device by their parts, and give the size of a disk that does not tell"
        )
    if load.writes and features & F_RO:
        raise BenchError("the disk is read-only")
    granule = fields.get("blk_size", SECTOR) if features & F_BLK_SIZE else SECTOR
    if load.block % (granule or SECTOR):
        raise BenchError(f"the disk has blocks of {granule} bytes; {load.block} is not a multiple")
    most = fields.get("size_max", 0) if features & F_SIZE_MAX else 0
    if most and load.block > most:
        raise BenchError(f"the disk takes up to {most} bytes in one piece, not {load.block}")
    if size < load.block:
        raise BenchError(f"a block of {load.block} bytes does not fit into {size} bytes")
    return size


def _make_queues(frontend: Frontend, parts: Sequence[int], depth: int, indices: range) -> list[DriverQueue]:
    """Start queues that are as large as they need to be, in memory that is."""
    indirect = len(parts) > 1 and bool(frontend.features & TransportFeature.INDIRECT_DESC)
    descriptors = depth if indirect else depth * len(parts)
    size = 1 << (descriptors - 1).bit_length()
    # Parts begin at multiples of their size up to a page, and requests at a page.
    request = sum(part + PAGE for part in parts) + DESCRIPTOR * len(parts) + PAGE
    ring = size * (DESCRIPTOR + 10) + 2 * PAGE
    frontend.share(Memory(len(indices) * (depth * request + ring)))
    return [frontend.queue(index, size) for index in indices]


def _run(
    load: Load, seconds: float, timeout: float, poll: bool, watch: Callable[[int, float], object]
) -> tuple[LoadResult, bool]:
    """The result, and whether Ctrl-C came before it was due."""
    outcome: list[LoadResult | BaseException] = []
    # Not join(), which takes a thread for ended when a signal interrupts it (CPython 3.11).
    over = threading.Event()
    ready = threading.Event()

    def work() -> None:
        ready.wait()
        try:
            outcome.append(load.run(seconds, timeout, poll))
        except BaseException as error:
            outcome.append(error)
        finally:
            over.set()

    # Signals are for the main thread, which is free to take them.
    worker = threading.Thread(target=work, name="vhost-user bench", daemon=True)
    interrupted = False
    worker.start()
    try:
        # The first request is a reason for Ctrl-C.
        begin = time.monotonic()
        ready.set()
        while not over.wait(INTERVAL):
            watch(load.requests, time.monotonic() - begin)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        load.stop()
        ready.set()
        over.wait()
        worker.join()
    (result,) = outcome
    if isinstance(result, BaseException):
        raise result
    return result, interrupted


def _latency(result: LoadResult) -> dict[str, float | None]:
    nanoseconds: dict[str, float | None] = {"min": result.least, "mean": result.mean}
    nanoseconds |= {name: result.percentile(percent) for name, percent in PERCENTILES.items()}
    return {name: None if value is None else value / 1000 for name, value in nanoseconds.items()}


class _Server:
    """The process that listens: the one that called listen(2), as unix(7) says of SO_PEERCRED."""

    def __init__(self, frontend: Frontend) -> None:
        with socket.socket(fileno=os.dup(frontend.fileno())) as connection:
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self._pid, _, _ = struct.unpack("3i", credentials)

    def cpu(self) -> float | None:
        """The seconds of CPU time that it has used."""
        if self._pid in {0, os.getpid()}:
            return None
        try:
            with open(f"/proc/{self._pid}/stat", "rb") as file:
                # The second field is a name in parentheses, which may contain anything.
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            return None
        user, system = fields[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
