"""How a device class is declared, what is refused with which words, and when hooks are called."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

import vhost_user as vu
from raw import (
    CONFIG,
    DEADLINE,
    PROTOCOL_FEATURES,
    REPLY_ACK,
    VERSION_1,
    FrontEnd,
    Id,
    Memory,
    Ring,
    u64,
    wait_until,
)
from specimens import NO_TYPE, Connect, Diary, Hold, Reverse, Serve


def start(front: FrontEnd, memory: Memory, index: int = 0) -> Ring:
    front.negotiate()
    front.share(memory)
    ring = Ring(memory, index)
    front.start(ring)
    return ring


# --- Declarations -----------------------------------------------------------------------------------------------------


def test_queues_have_the_order_of_their_declaration(level: None) -> None:
    class Card(vu.Device, device_id=NO_TYPE):
        controlq = vu.Queue(size=64)
        dataq = vu.Queue.many(2, size=128)
        eventq = vu.Queue()

    card = Card()
    assert [(queue.index, queue.name, queue.size) for queue in card.queues] == [
        (0, "controlq", 64),
        (1, "dataq[0]", 128),
        (2, "dataq[1]", 128),
        (3, "eventq", 256),
    ]
    assert card.controlq is card.queues[0]
    assert card.dataq == card.queues[1:3]


def test_the_number_of_queues_may_be_the_instance_s_own(serve: Serve, connect: Connect) -> None:
    class Card(vu.Device, device_id=NO_TYPE):
        dataq = vu.Queue.many("pairs")
        lastq = vu.Queue()

        def __init__(self, pairs: int) -> None:
            self.pairs = pairs

    one, five = Card(1), Card(5)
    assert (len(one.queues), one.lastq.index) == (2, 1)
    assert (len(five.queues), five.lastq.index) == (6, 5)
    assert connect(serve(five)).get_u64(Id.GET_QUEUE_NUM) == 6


def test_an_init_of_its_own_need_not_call_the_one_of_the_base(serve: Serve, connect: Connect, memory: Memory) -> None:
    class Greeter(vu.Device, device_id=NO_TYPE):
        requestq = vu.Queue()
        volume = vu.config.u8(1)

        def __init__(self, name: str, /, *, volume: int) -> None:
            self.name = name
            self.volume = volume

        @requestq.handler
        def greet(self, request: vu.Request) -> None:
            request.write(self.name.encode())

    front = connect(serve(Greeter("world", volume=11)))
    assert front.get_config(0, 1) == b"\x0b"
    assert front.exchange(start(front, memory), b"", 8) == b"world"


def test_a_subclass_overrides_a_handler_by_its_name(serve: Serve, connect: Connect, memory: Memory) -> None:
    class Shout(Reverse, device_id=NO_TYPE):
        def reverse(self, request: vu.Request) -> None:
            request.write(request.read().upper())

    front = connect(serve(Shout()))
    assert front.exchange(start(front, memory), b"abc", 8) == b"ABC"


def test_a_subclass_overrides_a_handler_with_another_one(serve: Serve, connect: Connect, memory: Memory) -> None:
    class Shout(Reverse, device_id=NO_TYPE):
        @Reverse.requestq.handler
        def shout(self, request: vu.Request) -> None:
            request.write(request.read().upper())

    front = connect(serve(Shout()))
    assert front.exchange(start(front, memory), b"abc", 8) == b"ABC"
    # The base class is as it was.
    other = connect(serve(Reverse()))
    with Memory() as more:
        assert other.exchange(start(other, more), b"abc", 8) == b"cba"


def test_a_subclass_adds_queues_after_those_of_its_base(serve: Serve, connect: Connect, memory: Memory) -> None:
    class More(Reverse, device_id=NO_TYPE):
        extraq = vu.Queue()

        @extraq.handler
        def extra(self, request: vu.Request) -> None:
            request.write(b"extra")

    assert [queue.name for queue in More().queues] == ["requestq", "extraq"]
    front = connect(serve(More()))
    assert front.exchange(start(front, memory, 1), b"", 8) == b"extra"


def test_a_subclass_replaces_a_queue_in_its_place(serve: Serve, connect: Connect, memory: Memory) -> None:
    class Base(vu.Device, device_id=NO_TYPE):
        firstq = vu.Queue(size=16)
        secondq = vu.Queue()

        @firstq.handler
        def first(self, request: vu.Request) -> None:
            request.write(b"first")

    class Larger(Base):
        firstq = vu.Queue(size=1024)

    device = Larger()
    assert [(queue.name, queue.size) for queue in device.queues] == [("firstq", 1024), ("secondq", 256)]
    front = connect(serve(device))
    assert front.exchange(start(front, memory), b"", 8) == b"first"


def test_queues_come_from_mixins(serve: Serve, connect: Connect, memory: Memory) -> None:
    class Controlled:
        controlq = vu.Queue()

        @controlq.handler
        def control(self, request: vu.Request) -> None:
            request.write(b"under control")

    class Both(Controlled, vu.Device, device_id=NO_TYPE):
        dataq = vu.Queue()

    assert [queue.name for queue in Both().queues] == ["controlq", "dataq"]
    front = connect(serve(Both()))
    assert front.exchange(start(front, memory), b"", 16) == b"under control"


def test_a_queue_cannot_be_assigned(level: None) -> None:
    with pytest.raises(AttributeError, match="requestq is a queue of the device; it cannot be replaced"):
        Reverse().requestq = vu.Queue()


@pytest.mark.parametrize("size", [-1, 0, 3, 48, 65536])
def test_a_queue_has_a_power_of_two_of_entries(size: int) -> None:
    with pytest.raises(vu.DeclarationError, match=rf"a power of two of entries up to 32768, not {size}"):
        vu.Queue(size)


def test_a_negative_backlog_or_number_of_queues_is_refused() -> None:
    with pytest.raises(vu.DeclarationError, match="a backlog cannot be negative"):
        vu.Queue(backlog=-1)
    with pytest.raises(vu.DeclarationError, match="-1 queues cannot be"):
        vu.Queue.many(-1)


@pytest.mark.parametrize("device_id", [0, -1, 65536])
def test_a_device_id_has_16_bits(device_id: int) -> None:
    with pytest.raises(vu.DeclarationError, match=rf"Wrong: a device id is a number from 1 to 65535, not {device_id}"):

        class Wrong(vu.Device, device_id=device_id):
            pass


def test_a_handler_must_take_a_request() -> None:
    with pytest.raises(vu.DeclarationError, match=r"Wrong\.handle must take \(self, request\) to handle a queue"):

        class Wrong(vu.Device, device_id=NO_TYPE):
            requestq = vu.Queue()

            @requestq.handler
            def handle(self) -> None:
                pass


def test_a_queue_has_one_handler() -> None:
    with pytest.raises(vu.DeclarationError, match=r"Wrong\.requestq has two handlers, one and two"):

        class Wrong(vu.Device, device_id=NO_TYPE):
            requestq = vu.Queue()

            @requestq.handler
            def one(self, request: vu.Request) -> None:
                pass

            @requestq.handler
            def two(self, request: vu.Request) -> None:
                pass


def test_a_handler_handles_a_queue_of_its_class() -> None:
    with pytest.raises(vu.DeclarationError, match=r"Wrong\.handle handles <Queue .*>, which is not a queue of the cla"):

        class Wrong(vu.Device, device_id=NO_TYPE):
            requestq = vu.Queue()

            @vu.Queue().handler
            def handle(self, request: vu.Request) -> None:
                pass


def refused(device: vu.Device, tmp_path: Path, match: str) -> None:
    """Serving raises, and leaves nothing behind."""
    with pytest.raises(vu.DeclarationError, match=match):
        device.start(tmp_path / "refused.sock")
    with pytest.raises(vu.DeclarationError, match=match):
        device.serve(tmp_path / "refused.sock")
    assert not (tmp_path / "refused.sock").exists()


def test_a_device_without_an_id_is_not_served(tmp_path: Path, level: None) -> None:
    class Nameless(vu.Device):
        requestq = vu.Queue()

    refused(Nameless(), tmp_path, r"class Nameless\(vu\.Device, device_id=…\): the device id is missing")


def test_a_device_without_queues_is_not_served(tmp_path: Path, level: None) -> None:
    class Idle(vu.Device, device_id=NO_TYPE):
        pass

    refused(Idle(), tmp_path, r"Idle declares no queue: write `requestq = vu\.Queue\(\)` in the class")


def test_a_device_with_more_queues_than_the_protocol_can_name_is_not_served(tmp_path: Path, level: None) -> None:
    class Crowd(vu.Device, device_id=NO_TYPE):
        dataq = vu.Queue.many(257)

    refused(Crowd(), tmp_path, "Crowd has 257 queues; vhost-user can name 256")


@pytest.mark.parametrize("pairs", [-1, "two", None])
def test_a_device_whose_number_of_queues_is_none_is_not_served(tmp_path: Path, level: None, pairs: object) -> None:
    class Unsure(vu.Device, device_id=NO_TYPE):
        dataq = vu.Queue.many("pairs")

        def __init__(self) -> None:
            self.pairs = pairs

    refused(Unsure(), tmp_path, rf"Unsure\.pairs is {pairs!r}; it must be a number of queues")


def test_a_device_whose_number_of_queues_is_missing_is_not_served(tmp_path: Path, level: None) -> None:
    class Forgetful(vu.Device, device_id=NO_TYPE):
        dataq = vu.Queue.many("pairs")

    refused(Forgetful(), tmp_path, r"Forgetful\.pairs is None; it must be a number of queues")


@pytest.mark.parametrize(
    ("features", "match"),
    [
        (1 << 29, r"Greedy\.features has 0x20000000: bits 24 to 41 "),
        (1 << 24, r"bits 24 to 41"),
        (1 << 41, r"bits 24 to 41"),
        (1 << 64, r"feature words have 64 bits"),
        (-1, r"feature words have 64 bits"),
    ],
)
def test_features_of_the_transport_are_not_the_device_s(tmp_path: Path, level: None, features: int, match: str) -> None:
    class Greedy(vu.Device, device_id=NO_TYPE):
        requestq = vu.Queue()

    device = Greedy()
    device.features = features
    refused(device, tmp_path, match)


def test_device_features_at_both_sides_of_the_transport_s_are_offered(serve: Serve, connect: Connect) -> None:
    device = Reverse()
    device.features = 1 << 0 | 1 << 23 | 1 << 42 | 1 << 63
    offered = connect(serve(device)).get_u64(Id.GET_FEATURES)
    assert offered & device.features == device.features


def test_nothing_of_a_device_is_there_before_it_is_served(level: None) -> None:
    device = Reverse()
    assert (device.connected, device.negotiated, device.address) == (False, 0, None)
    assert device.requestq.status == "stopped"
    assert device.requestq.statistics == vu.QueueStatistics()
    device.stop()
    with pytest.raises(vu.StateError, match=r"Reverse is not served: use its loop from on_start\(\) on"):
        _ = device.loop


# --- Hooks ------------------------------------------------------------------------------------------------------------


def test_hooks_are_called_in_order_with_what_happened(memory: Memory, tmp_path: Path, level: None) -> None:
    device = Diary()
    server = device.start(tmp_path / "diary.sock")
    assert device.entries == [("start",)]
    with FrontEnd(tmp_path / "diary.sock") as front:
        front.negotiate(PROTOCOL_FEATURES | VERSION_1 | 1 << 5, REPLY_ACK | CONFIG)
        assert device.negotiated == PROTOCOL_FEATURES | VERSION_1 | 1 << 5
        assert device.connected
        front.share(memory)
        rings = [Ring(memory, index) for index in range(2)]
        for ring in rings:
            front.start(ring)
        front.set_config(0, b"\x09\x00\xff")
        front.stop(rings[0])
        front.enable(rings[1], on=False)
        front.enable(rings[1])
        front.tell(Id.RESET_DEVICE)
    wait_until(lambda: not device.connected, "the front-end is gone")
    server.stop()
    assert device.entries == [
        ("start",),
        ("connect",),
        ("features", PROTOCOL_FEATURES | VERSION_1 | 1 << 5),
        ("queue_start", 0),
        ("queue_start", 1),
        ("config_write", "level", 3, 9),
        ("queue_stop", 0),
        ("queue_stop", 1),
        ("queue_start", 1),
        ("queue_stop", 1),
        ("reset",),
        ("disconnect", None),
        ("stop",),
    ]
    assert (device.connected, device.negotiated, device.address) == (False, 0, None)


def test_queues_are_stopped_before_the_device_hears_of_the_disconnection(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    device = Diary()
    front = connect(serve(device))
    start(front, memory)
    front.close()
    wait_until(lambda: not device.connected, "the front-end is gone")
    wait_until(lambda: device.entries[-1][0] == "disconnect", "the device is told")
    assert device.entries[-2:] == [("queue_stop", 0), ("disconnect", None)]


def test_a_broken_queue_is_reported_and_then_stopped(
    serve: Serve, connect: Connect, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    device = Diary()
    front = connect(serve(device))
    ring = start(front, memory)
    ring.offer(99)
    front.kick(ring)
    wait_until(lambda: device.entries[-1] == ("queue_stop", 0), "the queue is stopped")
    error = "the available ring names descriptor 99; the table has 16"
    assert device.entries[-2] == ("queue_error", 0, error)
    assert f"Diary: queue 0: {error}; the queue is stopped" in caplog.text
    assert device.requestq.statistics.errors == 1


def test_held_requests_can_be_completed_when_the_queue_stops(serve: Serve, connect: Connect, memory: Memory) -> None:
    class Patient(Hold, device_id=NO_TYPE):
        def on_queue_stop(self, queue: vu.DeviceQueue) -> None:
            while self.held:
                self.held.pop().complete()

    device = Patient()
    front = connect(serve(device))
    ring = start(front, memory)
    for _ in range(3):
        ring.add([], [1])
    front.kick(ring)
    for _ in range(3):
        assert device.arrived.acquire(timeout=DEADLINE)
    assert front.stop(ring) == 3
    assert len(ring.take()) == 3


@pytest.mark.parametrize(
    "hook", ["on_connect", "on_features", "on_queue_start", "on_queue_stop", "on_reset", "on_disconnect"]
)
def test_a_hook_that_raises_is_logged_and_the_device_goes_on(
    serve: Serve, memory: Memory, caplog: pytest.LogCaptureFixture, hook: str
) -> None:
    def fail(self: vu.Device, *arguments: object) -> None:
        raise RuntimeError("this hook is broken")

    path = serve(type("Broken", (Reverse,), {hook: fail})())
    for _ in range(2):
        with FrontEnd(path) as front:
            memory.write(memory.guest, bytes(memory.size))
            ring = start(front, memory)
            assert front.exchange(ring, b"abc", 8) == b"cba"
            front.stop(ring)
            front.tell(Id.RESET_DEVICE)
    wait_until(lambda: caplog.text.count("RuntimeError: this hook is broken") >= 2, "both are logged")
    assert f"in {hook}" in caplog.text or "in fail" in caplog.text


def test_an_on_start_that_raises_ends_serving_with_its_exception(tmp_path: Path, level: None) -> None:
    class Broken(Reverse, device_id=NO_TYPE):
        def on_start(self) -> None:
            raise FileNotFoundError("the disk")

    with pytest.raises(FileNotFoundError, match="the disk"):
        Broken().start(tmp_path / "broken.sock")
    assert not (tmp_path / "broken.sock").exists()


def test_a_config_hook_that_raises_refuses_the_write(
    serve: Serve, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    class Strict(Reverse, device_id=NO_TYPE):
        speed = vu.config.u32(1, writable=True)

        def on_config_write(self, field: vu.config.Field[Any], old: Any, new: Any) -> None:
            if new > 100:
                raise ValueError(f"{new} is too fast")

    front = connect(serve(Strict()))
    assert front.set_config(0, b"\x64\0\0\0") == 0
    assert front.set_config(0, b"\x65\0\0\0") != 0
    assert "ValueError: 101 is too fast" in caplog.text


def test_handlers_and_hooks_run_on_the_thread_that_serves(serve: Serve, connect: Connect, memory: Memory) -> None:
    threads: set[str] = set()

    class Nosy(Reverse, device_id=NO_TYPE):
        def reverse(self, request: vu.Request) -> None:
            threads.add(threading.current_thread().name)
            super().reverse(request)

        def on_features(self, features: int) -> None:
            threads.add(threading.current_thread().name)

        def on_queue_start(self, queue: vu.DeviceQueue) -> None:
            threads.add(threading.current_thread().name)

    front = connect(serve(Nosy()))
    assert front.exchange(start(front, memory), b"abc", 8) == b"cba"
    assert threads == {"vhost-user Nosy"}


# --- The loop ---------------------------------------------------------------------------------------------------------


def test_a_device_watches_descriptors_and_sets_timers_on_its_loop(serve: Serve, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    happened: list[object] = []

    class Watcher(Reverse, device_id=NO_TYPE):
        def on_start(self) -> None:
            self.watch = self.loop.watch(reader, self.readable)
            self.loop.call_later(0.5, lambda: happened.append("later"))
            self.loop.call_later(0.01, lambda: happened.append("sooner"))
            self.loop.call_later(0.01, lambda: happened.append("never")).cancel()
            self.loop.call_soon(lambda: happened.append("soon"))

        def readable(self) -> None:
            happened.append(os.read(reader, 100))
            if happened[-1] == b"stop":
                self.watch.close()

    device = Watcher()
    serve(device)
    wait_until(lambda: "later" in happened, "the timers")
    assert happened == ["soon", "sooner", "later"]
    os.write(writer, b"go")
    wait_until(lambda: b"go" in happened, "the descriptor")
    os.write(writer, b"stop")
    wait_until(lambda: b"stop" in happened, "the descriptor")
    os.write(writer, b"ignored")
    device.loop.call_soon(lambda: happened.append("from outside"))
    wait_until(lambda: "from outside" in happened, "the call")
    assert b"ignored" not in happened
    os.close(reader)
    os.close(writer)


def test_a_callback_that_raises_is_logged_and_the_loop_goes_on(
    serve: Serve, connect: Connect, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    device = Reverse()
    path = serve(device)
    device.loop.call_soon(lambda: 1 // 0)
    device.loop.call_later(0, lambda: 1 // 0)
    wait_until(lambda: caplog.text.count("ZeroDivisionError") == 2, "both are logged")
    front = connect(path)
    assert front.exchange(start(front, memory), b"abc", 8) == b"cba"


@pytest.mark.parametrize("delay", [1e19, 1e300, float("inf")])
def test_a_timer_that_would_never_be_due_is_refused(serve: Serve, delay: float) -> None:
    device = Reverse()
    serve(device)
    with pytest.raises(ValueError, match="a timer cannot be due in "):
        device.loop.call_later(delay, lambda: None)


def test_a_file_that_is_always_ready_is_not_watched(serve: Serve, tmp_path: Path) -> None:
    device = Reverse()
    serve(device)
    with open(tmp_path / "file", "w") as file, pytest.raises(OSError, match="watching a descriptor"):
        device.loop.watch(file, lambda: None)
    with pytest.raises(ValueError, match="not negative"):
        device.loop.watch(-1, lambda: None)


def test_features_are_told_again_when_they_are_negotiated_again(serve: Serve, connect: Connect) -> None:
    device = Diary()
    front = connect(serve(device))
    for features in (VERSION_1, VERSION_1 | 1 << 5, 0):
        front.tell(Id.SET_FEATURES, u64(features))
        assert device.entries[-1] == ("features", features)
        assert device.negotiated == features
