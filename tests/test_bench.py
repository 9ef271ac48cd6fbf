"""``vhost-user bench``: load on our devices in this process, and on QEMU's disk."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import vhost_user as vu
from specimens import NO_TYPE, Hold, Reverse, Serve
from storage_daemon import storage_daemon
from vhost_user.bench import Access, BenchError, Chain, Disk, Run, measure, ratios, spreads
from vhost_user.cli import main
from vhost_user.devices import Blk, Rng

COMMAND = [sys.executable, "-m", "vhost_user", "bench"]
SHORT = 0.1


@pytest.fixture
def qemu_disk(tmp_path: Path) -> Iterator[Path]:
    with storage_daemon(tmp_path, queues=2) as path:
        yield path


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=30, check=False)


class Broken(Blk):
    """A disk that cannot be read."""

    def read(self, request: vu.Request, offset: int, count: int) -> None:
        raise OSError(errno.EIO, "lost")


class Seen(Blk):
    """A disk that remembers what it was asked for."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int]] = []

    def read(self, request: vu.Request, offset: int, count: int) -> None:
        self.reads.append((offset, count))
        super().read(request, offset, count)

    def write(self, request: vu.Request, offset: int, count: int) -> None:
        self.writes.append((offset, count))
        super().write(request, offset, count)


class Silent(vu.Device, device_id=vu.DeviceId.BLOCK):
    """A disk that completes requests without a status."""

    requestq = vu.Queue()

    @requestq.handler
    def ignore(self, request: vu.Request) -> None: ...


class Named(vu.Device, device_id=NO_TYPE):
    """Says when it is asked for the first time after another one was."""

    requestq = vu.Queue()

    def __init__(self, name: str, order: list[str]) -> None:
        self.name = name
        self.order = order

    @requestq.handler
    def answer(self, request: vu.Request) -> None:
        if self.order[-1:] != [self.name]:
            self.order.append(self.name)
        request.write(bytes(request.writable))


@pytest.mark.parametrize("poll", [False, True])
def test_every_read_of_a_disk_is_accounted_for(serve: Serve, poll: bool) -> None:
    disk = Seen(1 << 20)
    run = measure(serve(disk), Disk("randread", block=8192), seconds=SHORT, depth=4, poll=poll)
    assert run.requests > 0
    assert run.seconds >= SHORT
    # Requests that were under way at the end are not counted.
    assert run.requests <= len(disk.reads) <= run.requests + 4
    assert (run.received, run.sent, run.errors) == (8192 * run.requests, 0, {})
    assert run.iops == run.requests / run.seconds
    latency = [value for value in run.latency.values() if value is not None]
    assert list(run.latency) == ["min", "mean", "p50", "p90", "p99", "p99.9", "max"]
    assert latency[0] <= latency[2]
    assert latency[2:] == sorted(latency[2:])
    assert latency[0] > 0
    assert latency[-1] < 1e6 * (run.seconds + 1)
    assert (run.server_cpu, run.interrupted) == (None, False)


@pytest.mark.parametrize(
    ("access", "reads", "writes"),
    [
        ("read", True, False),
        ("write", False, True),
        ("rw", True, True),
        ("randread", True, False),
        ("randwrite", False, True),
        ("randrw", True, True),
    ],
)
def test_a_load_is_of_its_kind_and_stays_in_its_part_of_the_disk(
    serve: Serve, access: Access, reads: bool, writes: bool
) -> None:
    disk = Seen(1 << 20)
    path = serve(disk)
    # On a busy machine a short time may be that of a few requests.
    for seconds in (SHORT, 1.0, 8.0):
        del disk.reads[:], disk.writes[:]
        run = measure(path, Disk(access, block=512, size=8 * 512 + 100), seconds=seconds)
        if run.requests >= 100:
            break
    assert (bool(disk.reads), bool(disk.writes), bool(run.received), bool(run.sent)) == (reads, writes, reads, writes)
    offsets = [offset for offset, _ in disk.reads + disk.writes]
    assert {count for _, count in disk.reads + disk.writes} == {512}
    assert set(offsets) == set(range(0, 8 * 512, 512))
    in_order = [number % 8 * 512 for number in range(len(offsets))]
    if reads != writes:
        assert (offsets == in_order) is not access.startswith("rand")


def test_what_is_written_is_not_zero_and_ends_where_it_should(serve: Serve, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"x" * (1 << 16))
    measure(serve(Blk(image)), Disk("write", block=4096, size=8192), seconds=SHORT)
    content = image.read_bytes()
    assert content[8192:] == b"x" * ((1 << 16) - 8192)
    assert all(len(set(content[start : start + 4096])) > 100 for start in (0, 4096))


def test_requests_that_a_disk_refuses_are_counted_and_told(serve: Serve) -> None:
    path = serve(Broken(1 << 20))
    ended = bench(path, "--rw", "randrw", "--allow-writes", "--runtime", SHORT, "--json")
    (run,) = json.loads(ended.stdout)["targets"][0]["runs"]
    assert ended.returncode == 1
    assert list(run["errors"]) == ["1"]
    assert 0 < run["errors"]["1"] < run["requests"]
    assert run["bytes"] == {"sent": 4096 * (run["requests"] - run["errors"]["1"]), "received": 0}
    told = bench(path, "--runtime", SHORT).stdout
    assert "requests were answered with status 1 (IOERR)" in told


def test_a_status_that_was_not_written_is_an_error(serve: Serve) -> None:
    run = measure(serve(Silent()), Disk(size=4096), seconds=SHORT)
    assert run.errors == {255: run.requests}
    assert run.requests > 0


def test_any_queue_is_loaded_by_the_shape_of_its_chains(serve: Serve) -> None:
    ended = bench(serve(Rng()), "--queue", 0, "--writable", 64, "--iodepth", 3, "--runtime", SHORT, "--json")
    told = json.loads(ended.stdout)
    (run,) = told["targets"][0]["runs"]
    assert (ended.returncode, ended.stderr) == (0, "")
    assert run["requests"] > 0
    assert run["bytes"] == {"sent": 0, "received": 64 * run["requests"]}
    assert told["load"] == {
        "readable": [],
        "writable": [64],
        "queue": 0,
        "numjobs": 1,
        "iodepth": 3,
        "runtime": SHORT,
        "poll": False,
    }


def test_a_chain_has_the_parts_that_were_asked_for(serve: Serve) -> None:
    run = measure(serve(Reverse()), Chain(readable=(16, 4096), writable=(1,)), seconds=SHORT, depth=2)
    assert run.requests > 0
    assert (run.sent, run.received) == (4112 * run.requests, run.requests)


def test_qemus_disk_is_measured_on_all_its_queues(qemu_disk: Path) -> None:
    ended = bench(qemu_disk, "--numjobs", 2, "--iodepth", 8, "--bs", "16k", "--runtime", 0.3, "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    told = json.loads(ended.stdout)
    (target,) = told["targets"]
    (run,) = target["runs"]
    assert told["ratios"] is None
    assert target["socket"] == str(qemu_disk)
    assert run["requests"] > 16
    assert run["bytes"] == {"sent": 0, "received": 16384 * run["requests"]}
    assert run["mib_per_second"] == pytest.approx(run["bytes"]["received"] / run["seconds"] / (1 << 20))
    assert run["errors"] == {}
    assert run["interrupted"] is False
    assert run["cpu_percent"]["client"] > 0
    assert run["cpu_percent"]["server"] > 0
    assert target["figures"]["iops"] == {"median": run["iops"], "min": run["iops"], "max": run["iops"]}


def test_two_back_ends_are_measured_in_turn(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []
    one, other = (str(serve(Named(name, order))) for name in "ab")
    load = ["--writable", "8", "--runtime", "0.05", "--runs", "3"]
    assert main(["bench", one, "--versus", other, *load, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert order == ["a", "b"] * 3
    assert [(target["socket"], len(target["runs"])) for target in told["targets"]] == [(one, 3), (other, 3)]
    medians = [target["figures"]["iops"]["median"] for target in told["targets"]]
    assert medians == [sorted(run["iops"] for run in target["runs"])[1] for target in told["targets"]]
    assert told["ratios"]["iops"] == medians[1] / medians[0]
    assert told["ratios"]["cpu_percent.server"] is None
    assert main(["bench", one, "--versus", other, *load]) == 0
    shown = capsys.readouterr().out
    assert "B / A\n" in shown
    assert f"B  {other}: " in shown
    assert " in 3 runs\n" in shown


def test_a_spread_is_the_median_and_both_ends() -> None:
    def run(requests: int, server_cpu: float | None) -> Run:
        return Run(1.0, requests, 0, 0, {}, {"p50": None}, 0.0, server_cpu, False)

    slow, fast = [run(10, None), run(30, 40.0), run(20, None)], [run(60, 20.0)]
    found = spreads(slow)["iops"]
    assert found
    assert found.as_dict() == {"median": 20.0, "min": 10.0, "max": 30.0}
    assert spreads(slow)["latency_us.p50"] is None
    ratio = ratios(slow, fast)
    assert (ratio["iops"], ratio["cpu_percent.server"], ratio["cpu_percent.client"]) == (3.0, 0.5, None)


@pytest.mark.parametrize("access", ["write", "rw", "randwrite", "randrw"])
def test_a_disk_is_not_overwritten_unless_that_is_allowed(serve: Serve, access: str) -> None:
    disk = Seen(1 << 20)
    path = serve(disk)
    ended = bench(path, "--rw", access, "--runtime", SHORT)
    refusal = f"vhost-user bench: --rw {access} overwrites the disk at {path}; --allow-writes permits it\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", refusal)
    assert disk.writes == []


@pytest.mark.parametrize("poll", [False, True])
def test_a_device_that_hangs_ends_the_load_with_an_error(serve: Serve, poll: bool) -> None:
    device = Hold()
    path = serve(device)
    expected = "queue 0: the device has 2 requests, and completed none of them within 1.5 s"
    with pytest.raises(vu.PeerTimeout, match=expected):
        measure(path, Chain(writable=(8,)), seconds=30, depth=2, timeout=1.5, poll=poll)
    device.held.clear()


def test_a_back_end_that_does_not_answer_ends_the_command(tmp_path: Path) -> None:
    path = tmp_path / "hung.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        ended = bench(path, "--timeout", 0.2)
    assert ended.returncode == 1
    assert ended.stderr.endswith("the back-end did not answer in time\n")


def test_ctrl_c_prints_what_was_measured(serve: Serve) -> None:
    answered = threading.Semaphore(0)

    class Counting(Reverse):
        requestq = vu.Queue()

        @requestq.handler
        def count(self, request: vu.Request) -> None:
            request.write(bytes(request.writable))
            answered.release()

    path = serve(Counting())
    command = [*COMMAND, str(path), "--writable", "8", "--runtime", "60", "--runs", "2", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            for _ in range(10):
                assert answered.acquire(timeout=60)
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, errors.splitlines()) == (130, [])
    (run,) = json.loads(output)["targets"][0]["runs"]
    assert run["interrupted"] is True
    assert run["requests"] >= 9
    assert 0 < run["seconds"] < 60


def test_a_terminal_is_told_how_far_it_is(serve: Serve) -> None:
    path = serve(Rng())
    terminal, other_end = pty.openpty()
    try:
        command = [*COMMAND, str(path), "--writable", "8", "--runtime", "1.5"]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=other_end, timeout=60, check=True)
        os.set_blocking(terminal, False)
        shown = os.read(terminal, 1 << 16).decode()
    finally:
        os.close(terminal)
        os.close(other_end)
    assert re.search(rf"run 1 of 1, {re.escape(str(path))}: [01]\.", shown)
    assert shown.endswith("\r\x1b[K")


def test_what_cannot_be_loaded_is_refused_with_the_reason(serve: Serve) -> None:
    def refusal(device: vu.Device, load: Disk | Chain, queues: int = 1) -> str:
        with pytest.raises(BenchError) as refused:
            measure(serve(device), load, seconds=SHORT, queues=queues)
        return str(refused.value)

    assert "does not look like a disk: it is unknown" in refusal(Rng(), Disk())
    assert refusal(Blk(1 << 20, read_only=True), Disk("write")) == "the disk is read-only"
    assert refusal(Blk(8192), Disk(size=8193)) == "the disk has 8192 bytes; 8193 were asked for"
    assert refusal(Blk(8192), Disk(block=16384)) == "a block of 16384 bytes does not fit into 8192 bytes"
    assert "blocks of 4096 bytes; 512 is not" in refusal(Blk(8192, block_size=4096), Disk(block=512))
    assert "the back-end has 1 queues, not 2" in refusal(Rng(), Chain(writable=(1,)), queues=2)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rw", "read", "--writable", "1"], "--rw, --bs and --size are for disks"),
        (["--bs", "1000"], "--bs 1000: a disk takes multiples of 512 bytes"),
        (["--bs", "4x"], "expected a number such as 512, 0x200 or 64K, not '4x'"),
        (["--readable", "1,0"], "expected a number from 1 on, not '0'"),
        (["--runtime", "nan"], "expected seconds such as 0.5, not 'nan'"),
        (["--iodepth", "0"], "expected a number from 1 on, not '0'"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_connected(
    tmp_path: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: object = main(["bench", str(tmp_path / "none.sock"), *arguments])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert told in capsys.readouterr().err
