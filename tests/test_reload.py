"""New code for a device that is served: what the driver notices of it, which is nothing."""

from __future__ import annotations

import asyncio
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

import raw
import vhost_user as vu
from specimens import NO_TYPE, Connect, Serve
from vhost_user.cli.load import load
from vhost_user.reload import Reloader, swap

DEADLINE = 30


class First(vu.Device, device_id=NO_TYPE):
    """Counts its requests, and says how it is called."""

    requestq = vu.Queue()
    level = vu.config.u16(3, writable=True)

    count = 0

    @requestq.handler
    def answer(self, request: vu.Request) -> None:
        self.count += 1
        request.write(b"first %d" % self.count)

    @level.on_write
    def _level(self, old: int, new: int) -> None:
        self.heard = ("first", old, new)

    def tick(self) -> str:
        return "first"


class Second(vu.Device, device_id=NO_TYPE):
    requestq = vu.Queue()
    level = vu.config.u16(7, writable=True)

    count = 0

    @requestq.handler
    def renamed(self, request: vu.Request) -> None:
        self.count += 1
        request.write(b"second %d" % self.count)

    @level.on_write
    def _renamed(self, old: int, new: int) -> None:
        self.heard = ("second", old, new)

    def tick(self) -> str:
        return "second"


class Driver:
    """A driver of one queue."""

    def __init__(self, front: raw.FrontEnd, memory: raw.Memory) -> None:
        front.negotiate(raw.PROTOCOL_FEATURES | raw.VERSION_1, raw.REPLY_ACK | raw.MQ | raw.CONFIG)
        front.share(memory)
        self.front = front
        self.ring = raw.Ring(memory)
        front.start(self.ring)

    def ask(self) -> bytes:
        return self.front.exchange(self.ring, b"", 32)


Drive = Callable[[vu.Device], Driver]


@pytest.fixture
def drive(serve: Serve, connect: Connect, memory: raw.Memory) -> Drive:
    return lambda device: Driver(connect(serve(device)), memory)


# --- What is new, and what stays --------------------------------------------------------------------------------------


def test_the_next_request_meets_the_new_code_and_the_old_state(drive: Drive) -> None:
    device: vu.Device = First()
    driver = drive(device)
    answers = [driver.ask()]
    swap(device, Second).result(DEADLINE)
    answers.append(driver.ask())
    swap(device, First).result(DEADLINE)
    answers.append(driver.ask())
    assert answers == [b"first 1", b"second 2", b"first 3"]


def test_configuration_space_keeps_its_values_and_gets_the_new_hooks(drive: Drive) -> None:
    device = First()
    driver = drive(device)
    device.level = 5
    swap(device, Second).result(DEADLINE)
    assert driver.front.get_config(0, 2) == b"\x05\0"
    driver.front.set_config(0, b"\x09\0")
    assert device.heard == ("second", 5, 9)


def test_a_device_that_is_not_served_may_be_swapped(drive: Drive) -> None:
    device = First()
    swap(device, Second).result(0)
    assert drive(device).ask() == b"second 1"


def test_a_method_that_the_loop_calls_is_the_new_one(drive: Drive) -> None:
    heard: list[str] = []

    class Old(First):
        def on_start(self) -> None:
            self.readable, writable = os.pipe()
            self.writable = writable
            self.watch = self.loop.watch(self.readable, self.ready)

        def ready(self) -> None:
            os.read(self.readable, 1)
            heard.append("old")
            os.close(self.writable)

    class New(Old):
        def ready(self) -> None:
            self.watch.close()
            os.close(self.readable)
            heard.append("new")
            os.close(self.writable)

    device = Old()
    drive(device)
    swap(device, New).result(DEADLINE)
    os.write(device.writable, b"x")
    raw.wait_until(lambda: heard, "the watch to be called")
    assert heard == ["new"]


def test_queues_may_get_a_handler_and_lose_it(drive: Drive) -> None:
    class Waits(vu.Device, device_id=NO_TYPE):
        requestq = vu.Queue()
        level = vu.config.u16()

    device: vu.Device = Waits()
    driver = drive(device)
    chain = driver.ring.add([], [32])
    driver.front.kick(driver.ring)
    swap(device, Second).result(DEADLINE)
    ((_, length),) = driver.ring.wait(1)
    assert chain.written(length) == b"second 1"
    swap(device, Waits).result(DEADLINE)
    driver.ring.add([], [32])
    driver.front.kick(driver.ring)
    raw.wait_until(lambda: device.queues[0].available, "a buffer")
    device.queues[0].push(b"pushed")
    assert len(driver.ring.wait(1)) == 1


# --- Requests in flight -----------------------------------------------------------------------------------------------


def test_a_request_in_flight_is_finished_by_the_old_code(drive: Drive) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Base(First):
        def name(self) -> bytes:
            return b"old"

    class Slow(Base):
        @First.requestq.handler
        def answer(self, request: vu.Request) -> None:
            begun.set()
            go_on.wait(DEADLINE)
            request.write(super().name())

    device: vu.Device = Slow()
    driver = drive(device)
    chains = [driver.ring.add([], [32]) for _ in range(3)]
    driver.front.kick(driver.ring)
    assert begun.wait(DEADLINE)
    changed = swap(device, Second)
    assert not changed.done()
    go_on.set()
    changed.result(DEADLINE)
    lengths = dict(driver.ring.wait(3))
    assert chains[0].written(lengths[chains[0].head]) == b"old"
    assert driver.ask() == b"second 1"


def test_coroutines_are_finished_by_the_old_code_and_what_comes_meanwhile_gets_the_new(drive: Drive) -> None:
    begun = threading.Event()

    class Base(First):
        def name(self) -> bytes:
            return b"old"

    class Old(Base):
        async def answer(self, request: vu.Request) -> None:  # type: ignore[override]
            begun.set()
            await asyncio.sleep(0.2)
            request.write(super().name())

    class New(First):
        async def answer(self, request: vu.Request) -> None:  # type: ignore[override]
            request.write(b"new")

    device: vu.Device = Old()
    driver = drive(device)
    first = driver.ring.add([], [32])
    driver.front.kick(driver.ring)
    assert begun.wait(DEADLINE)
    changed = swap(device, New)
    second = driver.ring.add([], [32])
    driver.front.kick(driver.ring)
    lengths = dict(driver.ring.wait(2))
    assert (first.written(lengths[first.head]), second.written(lengths[second.head])) == (b"old", b"new")
    assert changed.result(DEADLINE) is None


def test_a_coroutine_that_does_not_end_holds_nobody_up_for_long(drive: Drive) -> None:
    class Old(First):
        async def answer(self, request: vu.Request) -> None:  # type: ignore[override]
            self.release = asyncio.Event()
            await self.release.wait()

    class New(Old):
        async def answer(self, request: vu.Request) -> None:  # type: ignore[override]
            request.write(b"new")
            self.release.set()

    device = Old()
    driver = drive(device)
    driver.ring.add([], [32])
    driver.front.kick(driver.ring)
    raw.wait_until(lambda: hasattr(device, "release"), "the first request")
    changed = swap(device, New)
    driver.ring.add([], [32])
    driver.front.kick(driver.ring)
    changed.result(DEADLINE)
    driver.ring.wait(2)


def test_swapping_while_a_thread_pushes_loses_nothing(drive: Drive) -> None:
    class Pushes(vu.Device, device_id=NO_TYPE):
        requestq = vu.Queue()
        level = vu.config.u16()

    class PushesToo(vu.Device, device_id=NO_TYPE):
        requestq = vu.Queue()
        level = vu.config.u16()

    device: vu.Device = Pushes()
    driver = drive(device)
    failed: Future[None] = Future()

    def push() -> None:
        try:
            for number in range(300):
                getattr(device, "requestq").push(b"%d" % number, timeout=DEADLINE)  # noqa: B009
        except BaseException as error:
            failed.set_exception(error)
        else:
            failed.set_result(None)

    pusher = threading.Thread(target=push)
    pusher.start()
    arrived = 0
    while not failed.done() or arrived < 300:
        swap(device, PushesToo if isinstance(device, Pushes) else Pushes).result(DEADLINE)
        driver.ring.add([], [32])
        driver.front.kick(driver.ring)
        arrived += len(driver.ring.wait(1)) if arrived < 300 else 0
        if failed.done() and failed.exception():
            break
    pusher.join()
    assert (failed.exception(), arrived) == (None, 300)


# --- What cannot be ---------------------------------------------------------------------------------------------------


class OtherId(Second, device_id=NO_TYPE - 1):
    pass


class OtherFeatures(Second):
    features = 1 << 3


class OtherQueues(Second):
    eventq = vu.Queue()


class OtherLimit(Second):
    requestq = vu.Queue(max_request=1)


class OtherConfig(Second):
    more = vu.config.u8()


class OtherField(Second):
    level = vu.config.u32()


class Raises(Second):
    def on_reload(self, old_class: type[vu.Device]) -> None:
        assert old_class is First
        raise RuntimeError("no room for it")


class OtherLayout(Second):
    __slots__ = ("slot",)


class Coroutine(Second):
    async def renamed(self, request: vu.Request) -> None:  # type: ignore[override]
        pass


@pytest.mark.parametrize(
    ("new_class", "why"),
    [
        (OtherId, "device_id: 32766 instead of 32767"),
        (OtherFeatures, "features: 0x8 instead of 0x0"),
        (OtherQueues, r"queues: \['requestq', 'eventq'\] instead of \['requestq'\]"),
        (OtherLimit, r"max_request: \[1\] instead of \[67108864\]"),
        (OtherConfig, r"configuration space: \['level at 0', 'more at 2'\] instead of \['level at 0'\]"),
        (OtherField, "bytes of configuration space: 4 instead of 2"),
        (Raises, "no room for it"),
        (OtherLayout, "object layout differs"),
        (Coroutine, "async handlers need asyncio"),
    ],
)
def test_a_class_that_a_driver_would_have_to_know_of_is_refused(
    drive: Drive, new_class: type[vu.Device], why: str
) -> None:
    device = First()
    driver = drive(device)
    with pytest.raises((vu.DeclarationError, RuntimeError), match=why):
        swap(device, new_class).result(DEADLINE)
    assert (driver.ask(), type(device)) == (b"first 1", First)


# --- Source files -----------------------------------------------------------------------------------------------------

SOURCE = """
    import vhost_user as vu

    class Device(vu.Device, device_id=0x7fff):
        requestq = vu.Queue()
        level = vu.config.u16()

        @requestq.handler
        def answer(self, request):
            request.write(b"{answer}")
"""


class Edited:
    """A device, its source file, and what was reported about it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reports: list[str] = []
        self._read = 0
        self.write("0")
        self.device = load(f"{path}:Device", vu.Device)()

    def write(self, answer: str, end: str = "") -> None:
        new = self.path.with_suffix(".new")
        new.write_text(textwrap.dedent(SOURCE).replace("{answer}", answer) + end)
        # At once: whoever takes his time over the rest of a file has it loaded without.
        new.rename(self.path)

    def next_report(self) -> str:
        raw.wait_until(lambda: len(self.reports) > self._read, "a report")
        self._read += 1
        return self.reports[self._read - 1]


@pytest.fixture
def edited(tmp_path: Path, level: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Edited]:
    # Compiled files are there, as they are for users, to be taken for what is new.
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    edited = Edited(tmp_path / "edited.py")
    with Reloader(edited.device, report=edited.reports.append):
        yield edited


def test_a_file_that_was_replaced_is_loaded_even_in_the_same_second(edited: Edited, drive: Drive) -> None:
    driver = drive(edited.device)
    for number in range(1, 6):
        edited.write(str(number))
        assert edited.next_report() == "edited.py: Device has new code"
        assert driver.ask() == b"%d" % number


def test_a_file_is_loaded_when_it_is_written_to_its_end(edited: Edited, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vhost_user.reload.INTERVAL", 1.0)
    for _ in range(2):
        whole = edited.path.read_text().replace("answer(", "answer( ")
        with edited.path.open("w") as file:
            for part in (whole[:100], whole[100:]):
                file.write(part)
                file.flush()
                time.sleep(0.05)
        assert edited.next_report() == "edited.py: Device has new code"


@pytest.mark.parametrize(
    ("end", "why"),
    [
        ("def (", "edited.py, line 11: SyntaxError: invalid syntax"),
        (
            "import nothing_there",
            "edited.py, line 11: ModuleNotFoundError: No module named 'nothing_there'",
        ),
        ("    q = vu.Queue(3)", "edited.py, line 11: DeclarationError: a queue has a power of two"),
        ("    q = vu.Queue()", "edited.py: DeclarationError: queues: ['requestq', 'q'] instead of ['requestq']"),
        ("del Device", "edited.py: DeclarationError: there is no class Device any more"),
        ("Device = 3", "edited.py: DeclarationError: Device is not a class derived from Device any more"),
        ("raise SystemExit('over\\nand out')", "edited.py, line 11: SystemExit: over;"),
    ],
)
def test_a_file_that_cannot_be_used_leaves_the_old_code_in_charge(
    edited: Edited, drive: Drive, end: str, why: str
) -> None:
    driver = drive(edited.device)
    edited.write("broken", end)
    report = edited.next_report()
    assert why in report
    assert report.endswith("; Device keeps its old code")
    assert "\n" not in report
    assert driver.ask() == b"0"
    edited.write("mended")
    edited.next_report()
    assert driver.ask() == b"mended"


def test_a_class_without_a_file_cannot_be_watched() -> None:
    made = type("Made", (First,), {"__module__": "nowhere"})
    with pytest.raises(vu.StateError, match=r"nowhere\.Made has no source file"):
        Reloader(made(), report=print)
