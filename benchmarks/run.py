"""Measure everything that the performance page tells, against what others have, and write it down.

Called by `make bench`, with the interpreter that has the package's release build. Every figure is measured several
times, in turn with what it is compared with, because a machine is faster at some times than at others; what is told is
the median and the spread. Servers run on one processor and the load on another.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import report

import vhost_user as vu
from vhost_user import bench, guest

T = TypeVar("T")

HERE = Path(__file__).parent
ROOT = HERE.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
CRITERION = TARGET / "criterion" / "ring"
PEER = TARGET / "peer" / "release"

# Many short ones: a device and a driver that both look at a ring fall in and out of step, and go twice as fast in it.
RUNS = 11
SECONDS = 0.3
IMAGE_BYTES = 256 << 20

#: Where servers and the load run. With one processor there is nothing to choose.
CORES = sorted(os.sched_getaffinity(0))
SERVER, CLIENT = CORES[0], CORES[-1]

# The size is said because not every back-end can be seen to be a disk.
DISK_4K = bench.Disk("randread", block=4096, size=IMAGE_BYTES)
DISK_128K = bench.Disk("read", block=128 << 10, size=IMAGE_BYTES)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    group: str
    name: str
    unit: str
    #: The figure of each run; empty if it could not be measured.
    values: list[float] = field(default_factory=list)
    #: What it must reach, and whether that is the least or the most it may be.
    target: float | None = None
    at_least: bool = True
    #: Why it could not be measured.
    missing: str = ""

    @property
    def reached(self) -> bool | None:
        if not self.values or self.target is None:
            return None
        median = statistics.median(self.values)
        return median >= self.target if self.at_least else median <= self.target

    def as_dict(self) -> dict[str, object]:
        row = asdict(self)
        if self.values:
            row |= {"median": statistics.median(self.values), "min": min(self.values), "max": max(self.values)}
        return row | {"reached": self.reached}


class Missing(Exception):
    """Something that is needed to measure a row is not installed; the text says what to install."""


class Progress:
    def __init__(self) -> None:
        self.begin = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begin:4.0f} s] {text}", file=sys.stderr, flush=True)


progress = Progress()


# --- Servers ----------------------------------------------------------------------------------------------------------


def spawn(command: Sequence[str | Path], core: int | str) -> subprocess.Popen[bytes]:
    pinned = ["taskset", "--cpu-list", str(core), *(str(part) for part in command)]
    return subprocess.Popen(pinned, stdin=subprocess.DEVNULL)


@contextlib.contextmanager
def serving(command: Sequence[str | Path], path: Path, core: int | str = SERVER) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server that listens at `path`, in the block."""
    path.unlink(missing_ok=True)
    with spawn(command, core) as process:
        try:
            deadline = time.monotonic() + 20
            while not path.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command[0]} does not listen at {path}")
                time.sleep(0.005)
            yield process
        finally:
            process.terminate()
            path.unlink(missing_ok=True)


class Opponents:
    """How to start what is measured, each at a socket of its own."""

    def __init__(self, folder: Path, image: Path) -> None:
        self.folder = folder
        self.image = image
        self._count = 0

    def socket(self) -> Path:
        self._count += 1
        return self.folder / f"{self._count}.sock"

    def ours(self, name: str, *arguments: str | Path, core: int | str = SERVER) -> Server:
        path = self.socket()
        return Server(path, [sys.executable, HERE / "devices.py", name, path, *arguments], core)

    def rust_vmm(self, *arguments: str | Path, core: int = SERVER) -> Server:
        program = PEER / "peer"
        if not program.exists():
            raise Missing(
                "the rust-vmm device was not built: install Rust (rustup.rs), and let cargo reach its registry"
            )
        path = self.socket()
        return Server(path, [program, path, *arguments], core)

    def qemu(self, block_device: str, core: int = SERVER) -> Server:
        program = shutil.which("qemu-storage-daemon")
        if program is None:
            raise Missing("install qemu-system-common or qemu-utils, whichever has qemu-storage-daemon")
        path = self.socket()
        export = f"vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={path}"
        return Server(path, [program, "--blockdev", f"node-name=disk,{block_device}", "--export", export], core)


@dataclass(frozen=True)
class Server:
    path: Path
    command: list[str | Path]
    #: Or several, as in "0,1".
    core: int | str

    def running(self) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        return serving(self.command, self.path, self.core)


# --- Measuring --------------------------------------------------------------------------------------------------------


def take_turns(
    servers: Sequence[Server],
    workload: bench.Disk | bench.Chain,
    *,
    depth: int,
    queues: int = 1,
    poll: bool = False,
    seconds: float = SECONDS,
) -> list[list[bench.Run]]:
    """The runs of each server, A B A B …"""
    return _take_turns(servers, lambda server: _measure(server, workload, depth, poll, seconds, queues))


def _take_turns(servers: Sequence[Server], measure: Callable[[Server], T]) -> list[list[T]]:
    runs: list[list[T]] = [[] for _ in servers]
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.enter_context(server.running())
        for _ in range(RUNS):
            for server, own in zip(servers, runs, strict=True):
                own.append(measure(server))
    return runs


def _measure(
    server: Server, workload: bench.Disk | bench.Chain, depth: int, poll: bool, seconds: float, queues: int = 1
) -> bench.Run:
    deadline = time.monotonic() + 10
    while True:
        try:
            return bench.measure(server.path, workload, seconds=seconds, depth=depth, poll=poll, queues=queues)
        except (ConnectionError, vu.PeerClosed):
            # A server that serves one after the other may not be ready for the next.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


@dataclass(frozen=True)
class BlkioRun:
    """What benchmarks/peer/src/bin/blkio.rs prints."""

    iops: float
    mean: float
    p50: float


def libblkio(server: Server, *, depth: int, poll: bool) -> BlkioRun:
    """Random reads of 4 KiB by libblkio, as fio does them."""
    program = PEER / "blkio"
    if not program.exists():
        raise Missing("the load by libblkio was not built: install Rust (rustup.rs), and let cargo reach its registry")
    command = [str(program), str(server.path), "random", "4096", str(depth), "poll" if poll else "block", str(SECONDS)]
    deadline = time.monotonic() + 10
    while True:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode == 0:
            return BlkioRun(**json.loads(done.stdout))
        # A server that serves one after the other may not be ready for the next.
        if time.monotonic() > deadline:
            raise RuntimeError(f"the load by libblkio failed: {done.stderr.strip()}")
        time.sleep(0.02)


def ratio(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """How many times the second each of the first is, run by run; a run that has no figure is left out."""
    return [a / b for a, b in zip(first, second, strict=True) if a and b]


def iops(runs: Sequence[bench.Run | BlkioRun]) -> list[float]:
    return [run.iops for run in runs]


def server_ns(runs: Sequence[bench.Run]) -> list[float]:
    """CPU time of the server for each request, in nanoseconds."""
    return [(run.server_cpu or 0.0) / 100 * run.seconds / max(run.requests, 1) * 1e9 for run in runs]


def p50(runs: Sequence[bench.Run]) -> list[float]:
    return [run.latency["p50"] or 0.0 for run in runs]


# --- The rows ---------------------------------------------------------------------------------------------------------


def rings() -> Iterator[Row]:
    """What criterion has measured."""
    for descriptors in (1, 3):
        floor = _criterion("floor", descriptors, 1)
        peer = _criterion("virtio-queue", descriptors, 1)
        split = _criterion("split", descriptors, 1)
        name = f"{descriptors} descriptor" + ("s" if descriptors > 1 else "")
        yield Row("ring", f"{name}: split ring, pop and complete", "ns", [ns / 256 for ns in split])
        yield Row("ring", f"{name}: split / the floor", "x", ratio(split, floor), 3.0, at_least=False)
        yield Row("ring", f"{name}: rust-vmm's virtio-queue / split", "x", ratio(peer, split), 5.0)
        packed = ratio(_criterion("refilled packed", descriptors, 1), _criterion("refilled split", descriptors, 1))
        yield Row("ring", f"{name}: packed ring / split", "x", packed, 1.3, at_least=False)
        few, many = (_criterion("split", descriptors, regions) for regions in (4, 64))
        yield Row("ring", f"{name}: 4 regions / 1", "x", ratio(few, split), 1.15, at_least=False)
        yield Row("ring", f"{name}: 64 regions / 4", "x", ratio(many, few), 1.5, at_least=False)


def _criterion(name: str, descriptors: int, regions: int) -> list[float]:
    """Nanoseconds for a batch: the least, the median and the greatest of the middle half of the samples."""
    sample = CRITERION / f"{name}_{descriptors} descriptors_{regions} regions" / "new" / "sample.json"
    if not sample.exists():
        raise Missing("cargo bench has left no figures: install Rust (rustup.rs), and let cargo reach its registry")
    data = json.loads(sample.read_text())
    times = sorted(time / count for time, count in zip(data["times"], data["iters"], strict=True))
    return [times[len(times) * part // 8] for part in (2, 3, 4, 5, 6)]


def handlers(opponents: Opponents) -> Iterator[Row]:
    [runs] = take_turns([opponents.ours("empty")], bench.Chain(writable=(64,)), depth=256, poll=True)
    # No CPU time at all is a server that did not get to run within a clock tick.
    cpu = [value for value in server_ns(runs) if value]
    yield Row("handler", "nothing in Python, server CPU for each request", "ns", cpu, 250.0, at_least=False)
    each, together, theirs = take_turns(
        [opponents.ours("header"), opponents.ours("headers"), opponents.rust_vmm()],
        bench.Chain(readable=(16,), writable=(1,)),
        depth=256,
        poll=True,
    )
    for name, ours in (("header and status in Python", each), ("… by a batch handler", together)):
        yield Row("handler", f"{name} / rust-vmm's, requests/s", "x", ratio(iops(ours), iops(theirs)), 1.0)
        # Where the load is slower than both devices, only this tells them apart.
        yield Row("handler", "… server CPU a request / rust-vmm's", "x", ratio(server_ns(ours), server_ns(theirs)))


def disks(opponents: Opponents) -> Iterator[Row]:
    image = opponents.image
    rust, ours = opponents.rust_vmm(image), opponents.ours("blk", image)
    servers = [ours, rust]
    with contextlib.suppress(Missing):
        servers.append(opponents.qemu(f"driver=file,filename={image},aio=threads"))
    fast = take_turns(servers, DISK_4K, depth=32)
    yield Row("disk", "4 KiB random reads, depth 32", "k IOPS", [value / 1000 for value in iops(fast[0])])
    yield Row("disk", "… / rust-vmm's", "x", ratio(iops(fast[0]), iops(fast[1])), 1.0)
    yield Row(
        "disk", "… server CPU a request / rust-vmm's", "x", ratio(server_ns(fast[0]), server_ns(fast[1])), 1.0, False
    )
    yield _against_qemu("… / qemu-storage-daemon's", fast, 3.0)
    large = take_turns(servers, DISK_128K, depth=8)
    yield Row("disk", "128 KiB sequential reads, depth 8", "MiB/s", [run.mib_per_second for run in large[0]])
    yield Row("disk", "… / rust-vmm's", "x", ratio(iops(large[0]), iops(large[1])), 1.0)
    yield _against_qemu("… / qemu-storage-daemon's", large, None)


def _against_qemu(
    name: str, runs: Sequence[Sequence[bench.Run | BlkioRun]], target: float | None, group: str = "disk"
) -> Row:
    if len(runs) < 3:
        missing = "install qemu-system-common or qemu-utils, whichever has qemu-storage-daemon"
        return Row(group, name, "x", target=target, missing=missing)
    return Row(group, name, "x", ratio(iops(runs[0]), iops(runs[2])), target)


def own_disks(opponents: Opponents) -> Iterator[Row]:
    servers = [opponents.ours("null"), opponents.rust_vmm()]
    with contextlib.suppress(Missing):
        servers.append(opponents.qemu(f"driver=null-co,read-zeroes=off,size={1 << 30}"))
    runs = take_turns(servers, DISK_4K, depth=32)
    yield Row(
        "disk",
        "a handler of one's own that moves no data, 4 KiB, depth 32",
        "k IOPS",
        [v / 1000 for v in iops(runs[0])],
    )
    yield Row("disk", "… / rust-vmm's that moves none", "x", ratio(iops(runs[0]), iops(runs[1])), 0.7)
    yield _against_qemu("… / qemu-storage-daemon's null-co", runs, 1.5)


def by_libblkio(opponents: Opponents) -> Iterator[Row]:
    """The same disks under a load that is not ours. It submits each request by itself."""
    image = opponents.image
    file = opponents.ours("blk", image), opponents.rust_vmm(image)
    yield from _by_libblkio(opponents, "tmpfs file", file, f"driver=file,filename={image},aio=threads", (1.0, 3.0))
    null = opponents.ours("null"), opponents.rust_vmm()
    yield from _by_libblkio(
        opponents, "no data moved", null, f"driver=null-co,read-zeroes=off,size={1 << 30}", (0.7, 1.5)
    )
    if len(CORES) < 2:
        return
    for name, ours, arguments in (("tmpfs file", "polling-blk", [image]), ("no data moved", "polling-null", [])):
        servers = [opponents.ours(ours, *arguments), opponents.rust_vmm(*arguments)]
        each, theirs = ([run.p50 for run in runs] for runs in _turns_of_libblkio(servers, depth=1, poll=True))
        yield Row("libblkio", f"libblkio, {name}, depth 1, polling", "µs", each)
        yield Row("libblkio", "… / rust-vmm's", "x", ratio(each, theirs), 1.1, at_least=False)


def _by_libblkio(
    opponents: Opponents, name: str, servers: Sequence[Server], qemu: str, targets: tuple[float, float]
) -> Iterator[Row]:
    servers = list(servers)
    with contextlib.suppress(Missing):
        servers.append(opponents.qemu(qemu))
    for how, poll in (("blocking", False), ("polling", True)):
        runs = _turns_of_libblkio(servers, depth=32, poll=poll)
        title = f"libblkio, {name}, 4 KiB, depth 32, {how}"
        yield Row("libblkio", title, "k IOPS", [value / 1000 for value in iops(runs[0])])
        yield Row("libblkio", "… / rust-vmm's", "x", ratio(iops(runs[0]), iops(runs[1])), targets[0])
        yield _against_qemu("… / qemu-storage-daemon's", runs, targets[1], "libblkio")


def _turns_of_libblkio(servers: Sequence[Server], *, depth: int, poll: bool) -> list[list[BlkioRun]]:
    return _take_turns(servers, lambda server: libblkio(server, depth=depth, poll=poll))


def latency(opponents: Opponents) -> Iterator[Row]:
    """At depth 1: devices as they come, of which ours polls for a while and rust-vmm's never does; both without, on
    one processor, where the time to wake up is steady; and with a driver that polls.
    """
    image = opponents.image
    for name, ours, arguments in (("tmpfs file", "blk", [image]), ("no data moved", "null", [])):
        if len(CORES) > 1:
            both = [opponents.ours(ours, *arguments), opponents.rust_vmm(*arguments)]
            runs = take_turns(both, DISK_4K, depth=1)
            yield from _latency(f"depth 1, {name}", runs)
            yield Row(
                "latency", "… server CPU a request / rust-vmm's", "x", ratio(server_ns(runs[0]), server_ns(runs[1]))
            )
        both = [
            opponents.ours(f"sleeping-{ours}", *arguments, core=CLIENT),
            opponents.rust_vmm(*arguments, core=CLIENT),
        ]
        yield from _latency(f"depth 1, {name}, busy_poll = 0", take_turns(both, DISK_4K, depth=1))
        if len(CORES) > 1:
            both = [opponents.ours(f"polling-{ours}", *arguments), opponents.rust_vmm(*arguments)]
            runs = take_turns(both, DISK_4K, depth=1, poll=True)
            yield from _latency(f"depth 1, {name}, driver and device poll", runs)


def _latency(name: str, runs: Sequence[Sequence[bench.Run]]) -> Iterator[Row]:
    yield Row("latency", name, "µs", p50(runs[0]))
    yield Row("latency", "… / rust-vmm's", "x", ratio(p50(runs[0]), p50(runs[1])), 1.1, at_least=False)


def kick_to_call(opponents: Opponents) -> Iterator[Row]:
    program = PEER / "pingpong"
    if not program.exists():
        raise Missing("the eventfd ping-pong was not built: install Rust (rustup.rs)")
    server = opponents.ours("sleeping", core=CLIENT)
    ours, bare = [], []
    with server.running():
        for _ in range(RUNS):
            ours.append(_measure(server, bench.Chain(writable=(64,)), 1, False, SECONDS))
            command = [str(program), str(CLIENT), str(CLIENT), str(SECONDS)]
            bare.append(int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) / 1000)
    yield Row("latency", "kick to call with nothing to do", "µs", p50(ours))
    yield Row("latency", "… / an eventfd ping-pong", "x", ratio(p50(ours), bare), 1.2, at_least=False)


def bursts(opponents: Opponents) -> Iterator[Row]:
    for batch in (1, 16, 256):
        [runs] = take_turns(
            [opponents.ours("source", str(batch))], bench.Chain(writable=(64,)), depth=1024, poll=True, seconds=0.4
        )
        yield _burst(f"64-byte packets into buffers, pushed {batch} at once", runs, 5.0 if batch == 256 else None)
    [runs] = take_turns([opponents.ours("sink")], bench.Chain(readable=(64,)), depth=1024, poll=True)
    yield _burst("64-byte packets out of buffers, by a batch handler", runs, 5.0)


def _burst(name: str, runs: Sequence[bench.Run], target: float | None) -> Row:
    """By CPU time of the device: the load may be slower than the device."""
    return Row("bursts", name, "M/s a core", [1000 / value for value in server_ns(runs) if value], target)


def workers(opponents: Opponents) -> Iterator[Row]:
    """The device gets every processor, and the load, which has little to do, one of them."""
    if len(CORES) < 2:
        raise Missing("two workers need two processors")

    def speedup(device: str, chain: bench.Chain) -> list[float]:
        every = ",".join(map(str, CORES))
        servers = [opponents.ours(device, str(count), core=every) for count in (1, 2)]
        one, two = take_turns(servers, chain, depth=4, queues=2)
        return ratio(iops(two), iops(one))

    name = "two queues on two workers / on one, a handler that lets go of the interpreter"
    yield Row("workers", name, "x", speedup("digest", bench.Chain(readable=(1 << 18,), writable=(32,))), 1.7)
    name = "two queues on two workers / on one, a handler that is Python all the way"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        yield Row("workers", name, "x", speedup("checksum", bench.Chain(readable=(1 << 12,), writable=(4,))), 1.7)
    else:
        yield Row("workers", name, "x", missing="it takes a free-threaded Python: make PYTHON=python3.14t bench")


def start(opponents: Opponents) -> Iterator[Row]:
    bare, importing, connecting = [], [], []
    for _ in range(3 * RUNS):
        bare.append(_seconds("-c", "pass"))
        importing.append(_seconds("-c", "import vhost_user"))
    median = statistics.median(bare)
    yield Row("start", "import of the package", "ms", [1000 * (each - median) for each in importing], 40.0, False)
    server = opponents.ours("empty")
    for _ in range(RUNS):
        with server.running():
            connecting.append(1000 * _connect(server.path))
    yield Row("start", "first connection to DRIVER_OK, both ends", "ms", connecting, 5.0, at_least=False)
    try:
        guest.find_kernel()
    except guest.GuestNotFound as reason:
        raise Missing(str(reason)) from None
    shell = ("-m", "vhost_user", "shell", "vhost_user.devices:Rng", "-c", "test -e /dev/hwrng")
    booting = [1000 * _seconds(*shell) for _ in range(RUNS)]
    yield Row("start", "a command in a guest, by `vhost-user shell`", "ms", booting, 1000.0, at_least=False)


def _seconds(*arguments: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True)
    return time.perf_counter() - begin


def _connect(path: Path) -> float:
    memory = vu.Memory(1 << 20)
    begin = time.perf_counter()
    with vu.Frontend.connect(path) as frontend:
        frontend.negotiate()
        frontend.share(memory)
        frontend.queue(0, 64)
        return time.perf_counter() - begin


def memory(opponents: Opponents) -> Iterator[Row]:
    bare = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with bare:
        time.sleep(0.5)
        base = _resident(bare.pid)
        bare.terminate()
    server = opponents.ours("empty")
    with server.running() as process:
        time.sleep(0.5)
        idle = _resident(process.pid)
        _measure(server, bench.Chain(writable=(64,)), 256, True, 0.5)
        warm = _resident(process.pid)
        _measure(server, bench.Chain(writable=(64,)), 256, True, 2.0)
        after = _resident(process.pid)
    yield Row("memory", "idle device, over the bare interpreter", "MiB", [idle - base], 25.0, at_least=False)
    yield Row("memory", "… growth with a million requests", "MiB", [after - warm], 0.5, at_least=False)


def _resident(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has no memory")


# --- All of it --------------------------------------------------------------------------------------------------------

Rows = Callable[[Opponents], Iterator[Row]]
GROUPS: dict[str, Rows] = {
    "rings": lambda _: rings(),
    "handlers": handlers,
    "disks": disks,
    "own disks": own_disks,
    "libblkio": by_libblkio,
    "latency": latency,
    "kick to call": kick_to_call,
    "bursts": bursts,
    "workers": workers,
    "start": start,
    "memory": memory,
}


def measure_all(only: Sequence[str]) -> list[Row]:
    rows: list[Row] = []
    # A file system in memory, if there is one: the storage must not be what is measured.
    shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        image = Path(folder, "disk.img")
        with image.open("wb") as file:
            for _ in range(IMAGE_BYTES >> 20):
                file.write(os.urandom(1 << 20))
        opponents = Opponents(Path(folder), image)
        for name, group in GROUPS.items():
            if only and name not in only:
                continue
            progress.say(name)
            try:
                for row in group(opponents):
                    progress.say("    " + report.line(row.as_dict()))
                    rows.append(row)
            except Missing as reason:
                progress.say(f"    not measured: {reason}")
                rows.append(Row(name, name, "", missing=str(reason)))
            except (OSError, vu.VhostUserError, RuntimeError) as error:
                progress.say(f"    not measured: {error}")
                rows.append(Row(name, name, "", missing=f"it failed: {error}"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", default=[], choices=list(GROUPS), help="measure this alone")
    parser.add_argument("--json", type=Path, default=HERE / "results.json")
    parser.add_argument("--svg", type=Path, default=ROOT / "docs" / "performance.svg")
    options = parser.parse_args()
    os.sched_setaffinity(0, {CLIENT})
    rows = measure_all(options.only)
    results = {
        "machine": {
            "processor": _processor(),
            "processors": len(CORES),
            "kernel": platform.release(),
            "python": platform.python_version(),
        },
        "runs": RUNS,
        "rows": [row.as_dict() for row in rows],
    }
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    options.svg.write_text(report.picture(results))
    print(report.table(results))


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
