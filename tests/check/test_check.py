"""``vhost-user check``: what it says of our own devices and of QEMU's, and how it says it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

import vhost_user as vu
from check.backend import Disk, Server, Session
from specimens import Serve
from storage_daemon import arguments, storage_daemon
from vhost_user.check import CHECKS, Suite, Target, Verdict, selected
from vhost_user.check.reports import tap
from vhost_user.devices import Blk, Console, Rng, Tmp102, i2c
from vhost_user.features import by_name

CHECK = [sys.executable, "-m", "vhost_user", "check"]

#: What qemu-storage-daemon 10 does that the text does not allow. It dies of a table of 2^32 - 1 regions, of queues that
#: do not exist, and of a dirty log that is too short or ends behind its file; GET_CONFIG has the first bytes whatever
#: its offset.
QEMU_FAILS = {
    "memory.table-of-thousands",
    "config.read-part",
    "config.read-far-past-end",
    "log.smaller-than-memory",
    "log.larger-than-its-file",
    "errors.index-of-vring-num",
    "errors.index-of-vring-base",
    "errors.index-of-vring-addr",
    "errors.index-of-get-vring-base",
}

DEVICES: dict[str, Callable[[], vu.Device]] = {
    "blk": lambda: Blk(1 << 20, num_queues=2),
    "rng": Rng,
    "console": Console,
    "i2c": lambda: i2c.Adapter(Tmp102()),
}


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CHECK, *map(str, words)], capture_output=True, text=True, check=False, timeout=60)


#: What a device offers only when it is asked to.
OPTIONAL = ("packed_rings", "in_order", "in_band", "iommu", "cross_endian", "postcopy")


@pytest.mark.parametrize(
    ("name", "options", "workers"),
    [*((name, options, 0) for name in DEVICES for options in ((), OPTIONAL)), ("blk", OPTIONAL, 2)],
    ids=lambda value: ("as-it-is", "with-all-options")[bool(value)] if isinstance(value, tuple) else value,
)
def test_nothing_of_ours_fails(
    serve: Serve, caplog: pytest.LogCaptureFixture, name: str, options: tuple[str, ...], workers: int
) -> None:
    caplog.set_level(logging.CRITICAL)
    device = DEVICES[name]()
    device.workers = workers
    for option in options:
        assert getattr(device, option) is False
        setattr(device, option, True)
    with contextlib.closing(Target(str(serve(device)))) as target:
        results = list(Suite(target, by_name(name)).run(selected([]), forced=True))
    wrong = [result for result in results if result.verdict in {Verdict.FAIL, Verdict.ERROR}]
    assert wrong == []
    assert sum(result.verdict is Verdict.PASS for result in results) > 130
    # Nothing that was asked for is left out: one of each group needs nothing of the device's type.
    skipped = {result.check.name for result in results if result.verdict is Verdict.SKIP}
    asked_for = {"packed.completes-requests", "in-band.notifies", "inflight.layout-of-packed-rings", "log.packed"}
    assert asked_for & skipped == (set() if options else asked_for)


def test_a_device_of_a_type_of_its_own_is_checked_as_well(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    class Strange(vu.Device, device_id=200):
        queue = vu.Queue()

        @queue.handler
        def work(self, request: vu.Request) -> None:
            request.write(request.read())

    caplog.set_level(logging.CRITICAL)
    with contextlib.closing(Target(str(serve(Strange())))) as target:
        suite = Suite(target)
        results = {result.check.name: result.verdict for result in suite.run(selected([]))}
    assert suite.device.name == "unknown"
    assert {Verdict.FAIL, Verdict.ERROR}.isdisjoint(results.values())
    assert results["ring.completes-a-request"] is results["memory.two-regions"] is Verdict.PASS


def test_what_is_found_in_qemu_is_found_each_time(tmp_path: Path) -> None:
    command = shlex.join(arguments(tmp_path, "{socket}", queues=2))
    for _ in range(2):
        with contextlib.closing(Target(None, command=command)) as target:
            results = list(Suite(target).run(selected([])))
        assert {result.check.name for result in results if result.verdict is Verdict.FAIL} == QEMU_FAILS
        assert not [result for result in results if result.verdict is Verdict.ERROR]


def test_a_back_end_that_dies_is_told_from_those_that_do_not_answer(tmp_path: Path) -> None:
    command = shlex.join(arguments(tmp_path, "{socket}"))
    with contextlib.closing(Target(None, command=command)) as target:
        died, next_one = Suite(target).run(["errors.index-of-vring-num", "framing.reply-id"])
    assert died.reason.startswith("the back-end was killed by SIGSEGV")
    assert next_one.verdict is Verdict.PASS
    with storage_daemon(tmp_path) as path, contextlib.closing(Target(str(path))) as target:
        died, next_one = Suite(target).run(["errors.index-of-vring-num", "framing.reply-id"])
    assert died.verdict is Verdict.FAIL
    assert (next_one.verdict, next_one.reason) == (
        Verdict.ERROR,
        "the back-end is gone since errors.index-of-vring-num",
    )


def test_a_back_end_that_serves_once_has_to_be_started_for_each_check(tmp_path: Path) -> None:
    once = f"{sys.executable} -m vhost_user rng --once --socket-path"
    path = tmp_path / "once.sock"
    with subprocess.Popen([*once.split(), path], stderr=subprocess.DEVNULL) as process:
        try:
            while not path.exists():
                time.sleep(0.01)
            refused = run(path, "--only", "framing.reply-id")
        finally:
            process.terminate()
    assert refused.returncode == 2
    assert "the back-end serves one connection only" in refused.stderr
    started = run("--command", f"{once} {{socket}}", "--device", "rng", "--only", "framing.reply-*")
    assert started.returncode == 0, started.stdout
    assert started.stdout.endswith("5 checks: 5 pass\n")


def test_a_back_end_that_makes_its_socket_anew_for_each_connection_is_not_taken_for_dead(tmp_path: Path) -> None:
    path = tmp_path / "anew.sock"
    over = threading.Event()

    def serve_each_with_a_socket_of_its_own() -> None:
        while not over.is_set():
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
                listener.listen()
                connection = listener.accept()[0]
            path.unlink()
            Session(connection, Disk()).serve(forever)
            time.sleep(0.02)

    forever = os.eventfd(0)
    server = threading.Thread(target=serve_each_with_a_socket_of_its_own)
    server.start()
    try:
        while not path.exists():
            time.sleep(0.001)
        ended = run(path, "--only", "framing.reply-*", "--only", "robustness.next-connection")
    finally:
        over.set()
        while server.is_alive():
            # It waits for one more front-end, or does so no more.
            with socket.socket(socket.AF_UNIX) as last, contextlib.suppress(OSError):
                last.connect(str(path))
            server.join(0.01)
        os.close(forever)
    assert ended.stdout.endswith("6 checks: 6 pass\n"), ended.stdout + ended.stderr


def test_a_back_end_where_as_many_wait_as_may_is_not_taken_for_dead(tmp_path: Path) -> None:
    path = tmp_path / "crowded.sock"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(str(path))
        listener.listen(0)
        waiting.connect(str(path))
        accepted: list[socket.socket] = []
        timer = threading.Timer(0.1, lambda: accepted.append(listener.accept()[0]))
        timer.start()
        with contextlib.closing(Target(str(path))) as target:
            target.connect().close()
        timer.join()
        accepted[0].close()


def test_results_are_told_in_every_form(tmp_path: Path) -> None:
    with storage_daemon(tmp_path) as path:
        text = run(path, "--only", "config", "--junit", tmp_path / "junit.xml")
        as_json = json.loads(run(path, "--only", "config", "--json").stdout)
        lines = run(path, "--only", "config", "--tap").stdout.splitlines()
    assert text.returncode == 1
    assert (
        "\nFAIL     config.read-part\n           What is read at an offset is the same as in the whole.\n"
        in text.stdout
    )
    assert "see       vhost-user: VHOST_USER_GET_CONFIG\n" in text.stdout
    verdicts = {row["name"]: row["verdict"] for row in as_json}
    assert (verdicts["config.read"], verdicts["config.read-part"]) == ("pass", "fail")
    assert lines[:2] == ["TAP version 14", f"1..{len(as_json)}"]
    assert "ok 1 - config.read" in lines
    assert "not ok 3 - config.read-part" in lines
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert suite.get("tests") == str(len(as_json))
    assert suite.get("failures") == str(sum(verdict == "fail" for verdict in verdicts.values()))
    failed = {case.get("name") for case in suite if case.find("failure") is not None}
    assert failed == {"read-part", "read-far-past-end"}


def test_what_differs_does_not_fail_in_any_form(tmp_path: Path) -> None:
    with storage_daemon(tmp_path) as path:
        ended = run(path, "--only", "framing.version")
        with contextlib.closing(Target(str(path))) as target:
            (_, _, line, *_) = tap(Suite(target).run(["framing.version"]))
    assert ended.returncode == 0
    assert "\ndiffers  framing.version\n" in ended.stdout
    assert line.startswith("not ok 1 - framing.version # TODO differs: ")


def test_the_checks_are_listed_with_their_sections() -> None:
    listed = run("--list").stdout
    assert listed.count("\n") == 3 * len(CHECKS)
    assert (
        "framing.reply-id\n    An answer carries the id of its request.\n    vhost-user: Header\n"
        in run("--list", "--only", "framing").stdout
    )
    assert all(check.sentence.endswith(".") and check.section for check in CHECKS.values())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say what to check: SOCKET, or --command"),
        (["x.sock", "--only", "nothing"], "no check matches nothing; --list prints them"),
        (["x.sock", "--device", "toaster"], "expected balloon, blk, "),
        (["/nowhere/x.sock"], "/nowhere/x.sock: No such file or directory"),
        (["--command", "false {socket}"], "false does not listen at "),
        (["--command", "no-such-program {socket}"], "no-such-program: No such file or directory"),
    ],
)
def test_what_cannot_be_checked_is_told_in_a_line(words: list[str], said: str) -> None:
    ended = run(*words)
    assert ended.returncode == 2
    assert ended.stderr.startswith("vhost-user check: ")
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_a_socket_of_something_else_is_not_checked(tmp_path: Path) -> None:
    class Mumbles(Session):
        def get_features(self, payload: bytes, descriptors: list[int]) -> bytes:
            return b"hello"

    with contextlib.closing(Server(tmp_path / "other.sock", Mumbles)):
        ended = run(tmp_path / "other.sock")
    assert ended.returncode == 2
    assert "GET_FEATURES was not answered with eight bytes: no vhost-user back-end?" in ended.stderr


def test_an_interrupted_check_leaves_nothing_behind(tmp_path: Path) -> None:
    class Sleeps(Session):
        def set_owner(self, payload: bytes, descriptors: list[int]) -> None:
            time.sleep(0.2)

    with (
        contextlib.closing(Server(tmp_path / "slow.sock", Sleeps)),
        subprocess.Popen([*CHECK, tmp_path / "slow.sock"], stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        process.stdout.readline()
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 1
