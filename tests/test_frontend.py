"""The driver's half: against devices of the package, and against back ends that are wrong on purpose."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import raw
import vhost_user as vu
from raw import Id
from raw_backend import PROTOCOL, BackEnd
from specimens import Diary, Hold, Reverse, ReverseMany, Serve

#: Seconds for what is not going to happen, and for what is.
SHORT = 0.1
LONG = raw.DEADLINE

Pair = Callable[..., tuple[vu.Frontend, BackEnd]]


@pytest.fixture
def pair(level: None) -> Iterator[Pair]:
    """A front-end, and a raw back-end at the other end of its socket."""
    with contextlib.ExitStack() as ends:

        def make(timeout: float = LONG, **options: int) -> tuple[vu.Frontend, BackEnd]:
            ours, theirs = socket.socketpair()
            back_end = ends.enter_context(BackEnd(theirs, **options))
            return ends.enter_context(vu.Frontend(ours, timeout=timeout)), back_end

        yield make


@pytest.fixture
def connect(serve: Serve) -> Iterator[Callable[[vu.Device], vu.Frontend]]:
    """A negotiated front-end of a device."""
    with contextlib.ExitStack() as front_ends:
        yield lambda device: front_ends.enter_context(vu.Frontend.connect(serve(device))).negotiate()


Connected = Callable[[vu.Device], vu.Frontend]


# --- Connections ------------------------------------------------------------------------------------------------------


def test_nobody_listens_at_a_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nobody\.sock"):
        vu.Frontend.connect(tmp_path / "nobody.sock")


@pytest.fixture
def crowded(tmp_path: Path) -> Iterator[socket.socket]:
    """A listener at `crowded.sock` where one connection waits to be accepted, and no other may."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(str(tmp_path / "crowded.sock"))
        listener.listen(0)
        waiting.connect(str(tmp_path / "crowded.sock"))
        yield listener


def test_a_front_end_waits_until_a_back_end_that_is_busy_accepts(crowded: socket.socket) -> None:
    def accept() -> None:
        with crowded.accept()[0]:
            pass

    timer = threading.Timer(SHORT, accept)
    timer.start()
    vu.Frontend.connect(crowded.getsockname(), timeout=LONG).close()
    timer.join()


def test_a_back_end_that_stays_busy_costs_a_deadline(crowded: socket.socket) -> None:
    with pytest.raises(vu.PeerTimeout, match=r"crowded\.sock: the back-end accepted no connection within 0\.1 s"):
        vu.Frontend.connect(crowded.getsockname(), timeout=SHORT)


def test_a_front_end_listens_for_its_back_end(level: None, tmp_path: Path) -> None:
    path = tmp_path / "listening.sock"

    def serve() -> None:
        raw.wait_until(path.exists, "the front-end listens")
        Reverse().serve(connect=path)

    thread = threading.Thread(target=serve)
    thread.start()
    with vu.Frontend.listen(path) as frontend:
        assert frontend.negotiate().queue(0).request(b"ab", 2) == b"ba"
    thread.join()


def test_a_back_end_that_does_not_connect_costs_a_deadline(level: None, tmp_path: Path) -> None:
    with pytest.raises(vu.PeerTimeout, match=r"no back-end connected within 0\.1 s"):
        vu.Frontend.listen(tmp_path / "listening.sock", timeout=SHORT)


def test_a_front_end_reconnects_and_finds_what_it_had(serve: Serve) -> None:
    with vu.Frontend.connect(serve(Reverse())) as frontend:
        frontend.negotiate(features=int(vu.TransportFeature.VERSION_1), protocol=vu.ProtocolFeature.REPLY_ACK)
        frontend.queue(0)
        address = frontend.memory.allocate(16)
        frontend.memory.write(address, b"still here")
        frontend.reconnect()
        assert frontend.features & vu.TransportFeature.VERSION_1
        assert frontend.protocol == vu.ProtocolFeature.REPLY_ACK
        assert frontend.memory.read(address, 10) == b"still here"
        assert frontend.queue(0).request(b"ab", 2) == b"ba"


def test_a_front_end_that_was_given_a_socket_cannot_reconnect(pair: Pair) -> None:
    frontend, _ = pair()
    with pytest.raises(vu.StateError, match="was given its socket"):
        frontend.reconnect()


def test_after_closing_nothing_goes_on(pair: Pair) -> None:
    frontend, _ = pair()
    queue = frontend.negotiate().queue(0)
    completion = queue.submit(b"?")
    frontend.close()
    frontend.close()
    for call in (frontend.negotiate, queue.start, lambda: queue.submit(b"?"), completion.wait):
        with pytest.raises(vu.StateError, match="closed"):
            call()


def test_who_waits_is_told_that_the_front_end_was_closed(pair: Pair) -> None:
    frontend, _ = pair()
    queue = frontend.negotiate().queue(0)
    closer = threading.Timer(SHORT, frontend.close)
    closer.start()
    with pytest.raises(vu.StateError, match="queue 0: the front-end was closed"):
        queue.submit(b"?").wait()
    closer.join()


def test_a_callback_may_close_the_front_end(pair: Pair) -> None:
    frontend, back_end = pair()
    completion = frontend.negotiate().queue(0).submit(b"?")
    completion.add_done_callback(lambda completion: frontend.close())
    back_end.rings[0].complete(back_end.rings[0].take())
    raw.wait_until(lambda: frontend.closed, "the callback closes it")
    assert completion.data == b""


def test_a_front_end_that_is_not_closed_is_reported() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        frontend = vu.Frontend(ours)
        with pytest.warns(ResourceWarning, match="was not closed"):
            del frontend


# --- Negotiation ------------------------------------------------------------------------------------------------------


def test_everything_that_both_sides_know_is_negotiated(pair: Pair) -> None:
    notification_data = 1 << 38
    xen_mmap = 1 << 17
    offered = raw.PROTOCOL_FEATURES | raw.VERSION_1 | notification_data | 1 << 5 | 1 << 50
    frontend, _ = pair(features=offered, protocol=PROTOCOL | xen_mmap)
    frontend.negotiate()
    assert frontend.features == raw.PROTOCOL_FEATURES | raw.VERSION_1 | 1 << 5 | 1 << 50
    assert frontend.offered_features & notification_data
    assert vu.ProtocolFeature.CONFIG in frontend.protocol
    assert vu.ProtocolFeature.XEN_MMAP in frontend.offered_protocol
    assert vu.ProtocolFeature.XEN_MMAP not in frontend.protocol
    assert frontend.queue_count == 2


def test_exactly_what_was_asked_for_is_negotiated(pair: Pair) -> None:
    frontend, back_end = pair()
    frontend.negotiate(features=1 << 5, protocol=vu.ProtocolFeature.MQ)
    frontend.exchange("GET_FEATURES")
    words = {name: message.payload for name, message in zip(back_end.names(), back_end.messages, strict=True)}
    assert words["SET_PROTOCOL_FEATURES"] == raw.u64(raw.MQ)
    assert words["SET_FEATURES"] == raw.u64(1 << 5 | raw.PROTOCOL_FEATURES)


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [({"features": 1 << 7}, "0x80 are not offered"), ({"protocol": vu.ProtocolFeature.STATUS}, "STATUS.* not offered")],
)
def test_what_is_not_offered_cannot_be_negotiated(pair: Pair, asked: dict[str, int], complaint: str) -> None:
    frontend, back_end = pair()
    with pytest.raises(vu.StateError, match=complaint):
        frontend.negotiate(**asked)  # type: ignore[arg-type]
    assert "SET_FEATURES" not in back_end.names()


def test_a_back_end_without_protocol_features_is_driven_too(pair: Pair) -> None:
    frontend, back_end = pair(features=raw.VERSION_1)
    queue = frontend.negotiate().queue(0)
    completion = queue.submit(b"abc")
    frontend.exchange("GET_FEATURES")
    back_end.rings[0].complete(back_end.rings[0].take())
    assert completion.wait() == b""
    assert not {"SET_PROTOCOL_FEATURES", "SET_VRING_ENABLE"} & set(back_end.names())


def test_the_device_status_follows_the_driver(connect: Connected) -> None:
    frontend = connect(Reverse())
    assert frontend.status() == 0xB
    frontend.start_queues(1)
    assert frontend.status() == 0xF


def test_any_message_can_be_sent(pair: Pair) -> None:
    frontend, _ = pair()
    assert frontend.exchange("GET_FEATURES") == raw.u64(frontend.negotiate().offered_features)
    assert frontend.exchange("SET_VRING_ENABLE", struct.pack("=II", 77, 1)) == raw.u64(0)
    with pytest.raises(ValueError, match='there is no request "GET_LOST"'):
        frontend.exchange("GET_LOST")


# --- Configuration space ----------------------------------------------------------------------------------------------


def test_configuration_is_read_and_written(connect: Connected) -> None:
    frontend = connect(Diary())
    frontend.write_config(struct.pack("<H", 9))
    assert struct.unpack("<HI", frontend.read_config(6)) == (9, 0x11223344)
    assert frontend.read_config(2, offset=4) == b"\x22\x11"


def test_a_change_of_the_configuration_is_waited_for(connect: Connected) -> None:
    device = Diary()
    frontend = connect(device)
    frontend.queue(0)
    device.level = 8
    frontend.wait_config_change()
    assert frontend.read_config(2) == b"\x08\x00"
    with pytest.raises(vu.PeerTimeout, match=r"no change of the configuration within 0\.1 s"):
        frontend.wait_config_change(SHORT)


def test_a_request_of_the_back_end_that_makes_no_sense_is_an_event(pair: Pair) -> None:
    frontend, back_end = pair()
    frontend.negotiate()
    assert back_end.channel is not None
    with open(os.devnull) as stray:
        back_end.channel.send(raw.CONFIG_CHANGE, descriptors=[stray.fileno()], flags=raw.NEED_REPLY)
        event = frontend.next_event()
    assert event == ("refused", "BACKEND_CONFIG_CHANGE_MSG: expected 0 descriptors, got 1")
    assert back_end.channel.receive().payload == raw.u64(1)


# --- Memory -----------------------------------------------------------------------------------------------------------


def test_memory_of_several_regions_goes_over_as_a_table(pair: Pair) -> None:
    frontend, back_end = pair()
    frontend.negotiate().share(vu.Memory(regions=[(0x10000, 0x8000), (0x100000, 0x4000)]))
    (message,) = [message for message in back_end.messages if message.request == Id.SET_MEM_TABLE]
    assert struct.unpack_from("=I", message.payload) == (2,)
    frontend.memory.write(0x100000, b"shared")
    assert back_end.read(back_end.user_address(0x100000), 6) == b"shared"


def test_only_what_changes_is_said_to_a_back_end_with_slots(pair: Pair) -> None:
    frontend, back_end = pair(protocol=raw.CONFIGURE_MEM_SLOTS)
    first, second = vu.Memory(regions=[(0, 4096)]), vu.Memory(regions=[(8192, 4096)])
    frontend.negotiate().share(first)
    frontend.share(first, second)
    frontend.share(second)
    frontend.exchange("GET_FEATURES")
    said = [name for name in back_end.names() if name.endswith("_REG")]
    assert said == ["ADD_MEM_REG", "ADD_MEM_REG", "REM_MEM_REG"]


def test_memory_is_swapped_under_a_device(connect: Connected) -> None:
    frontend = connect(Reverse())
    frontend.queue(0).stop()
    for _ in range(3):
        frontend.share(vu.Memory(1 << 20))
        queue = frontend.queue(0)
        assert queue.request(b"abc", 3) == b"cba"
        queue.stop()


@pytest.mark.parametrize("arguments", [{}, {"size": 4096, "regions": [(0, 4096)]}])
def test_memory_has_a_size_or_regions(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="a size, or regions"):
        vu.Memory(**arguments)  # type: ignore[arg-type]


def test_memory_is_read_and_written_only_inside() -> None:
    memory = vu.Memory(4096)
    ((start, size),) = memory.regions
    with pytest.raises(vu.ProtocolError, match="4 bytes at guest address 0x40000ffe are not inside"):
        memory.write(start + size - 2, b"1234")


# --- Requests ---------------------------------------------------------------------------------------------------------


def test_a_request_of_several_parts_arrives_in_order(connect: Connected) -> None:
    frontend = connect(Reverse())
    for index, indirect in enumerate([True, False]):
        queue = frontend.queue(0, 8, indirect=indirect)
        completion = queue.submit([b"ab", bytearray(b"cd"), memoryview(b"ef")], [1, 2, 3])
        assert completion.wait() == b"fedcba", index
        assert (completion.done, completion.data, completion.error) == (True, b"fedcba", None)
        queue.stop()


def test_many_requests_are_under_way_at_once(connect: Connected) -> None:
    queues = connect(ReverseMany()).start_queues(4, 64)
    completions = [(queue, text, queue.submit(text, 9)) for queue in queues for text in (b"ab", b"cd") * 16]
    for queue, text, completion in reversed(completions):
        assert completion.wait() == bytes([queue.index]) + text[::-1]


def test_requests_complete_in_any_order(connect: Connected) -> None:
    device = Hold()
    queue = connect(device).queue(0)
    first, second = queue.submit(b"1", 1), queue.submit(b"2", 1)
    one, two = device.next(), device.next()
    two.write(b"b")
    two.complete()
    assert second.wait() == b"b"
    assert not first.done
    with pytest.raises(vu.StateError, match="queue 0: the request is not completed"):
        _ = first.data
    one.write(b"a")
    one.complete()
    assert first.wait() == b"a"
    assert queue.outstanding == 0


def test_threads_wait_for_their_own_requests(connect: Connected) -> None:
    queue = connect(Reverse()).queue(0)
    wrong = []

    def work(number: int) -> None:
        for at in range(100):
            text = b"%d-%d" % (number, at)
            answer = queue.request(text, 9)
            if answer != text[::-1]:
                wrong.append((text, answer))

    threads = [threading.Thread(target=work, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_callback_is_called_though_nobody_waits(connect: Connected) -> None:
    queue = connect(Reverse()).queue(0)
    called: list[bytes] = []
    came = threading.Semaphore(0)

    def on_done(completion: vu.Completion) -> None:
        called.append(completion.data)
        came.release()

    for _ in range(3):
        queue.submit(b"ab", 2).add_done_callback(on_done)
    for _ in range(3):
        assert came.acquire(timeout=LONG)
    done = queue.submit(b"cd", 2)
    done.wait()
    done.add_done_callback(on_done)
    assert called == [b"ba", b"ba", b"ba", b"dc"]


def test_a_callback_that_fails_is_logged(connect: Connected, caplog: pytest.LogCaptureFixture) -> None:
    completion = connect(Reverse()).queue(0).submit(b"ab", 2)
    completion.wait()
    completion.add_done_callback(lambda completion: 1 // 0)
    assert "ZeroDivisionError" in caplog.text


def test_requests_are_awaited(connect: Connected) -> None:
    queue = connect(Reverse()).queue(0)

    async def work(number: int) -> list[bytes]:
        return [await queue.submit(b"%d" % (1000 * number + at), 9) for at in range(20)]

    async def main() -> list[list[bytes]]:
        return await asyncio.gather(*(work(number) for number in range(1, 9)))

    answers = asyncio.run(main())
    assert answers == [[(b"%d" % (1000 * number + at))[::-1] for at in range(20)] for number in range(1, 9)]


def test_a_request_that_is_awaited_has_a_deadline(pair: Pair) -> None:
    frontend, _ = pair()
    queue = frontend.negotiate().queue(0)
    queue.timeout = SHORT

    async def main() -> None:
        await queue.submit(b"?")

    with pytest.raises(vu.PeerTimeout, match=r"queue 0: the device did not complete the request within 0\.1 s"):
        asyncio.run(main())


def test_a_request_that_is_late_can_be_waited_for_again(connect: Connected) -> None:
    device = Hold()
    completion = connect(device).queue(0).submit(b"?", 1)
    with pytest.raises(vu.PeerTimeout, match=r"queue 0: the device did not complete the request within 0\.1 s"):
        completion.wait(SHORT)
    device.next().complete()
    assert completion.wait() == b""


def after_ctrl_c(wait: Callable[[], object]) -> None:
    """Wait, with a Ctrl-C on its way, which may come before."""
    timer = threading.Timer(SHORT, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    try:
        wait()
    finally:
        timer.join()


def test_ctrl_c_interrupts_a_wait(connect: Connected) -> None:
    device = Hold()
    completion = connect(device).queue(0).submit(b"?")
    held = device.next()
    with pytest.raises(KeyboardInterrupt):
        after_ctrl_c(lambda: completion.wait(LONG))
    held.complete()


def test_ctrl_c_interrupts_a_message(level: None) -> None:
    ours, theirs = socket.socketpair()
    with theirs, vu.Frontend(ours, timeout=60) as frontend:
        with pytest.raises(KeyboardInterrupt):
            after_ctrl_c(frontend.negotiate)
        with pytest.raises(vu.StateError, match="GET_FEATURES: the session is over"):
            frontend.exchange("GET_FEATURES")


def test_a_request_that_does_not_fit_is_refused(pair: Pair) -> None:
    frontend, _ = pair()
    queue = frontend.negotiate().queue(0, 2)
    with pytest.raises(vu.StateError, match="queue 0: a request needs at least one byte"):
        queue.submit()
    with pytest.raises(vu.StateError, match="no room for"):
        queue.submit(writable=1 << 30)
    queue.submit(b"1")
    queue.submit(b"2")
    with pytest.raises(vu.StateError, match="queue 0: a request of 1 descriptors does not fit; 0 of 2 are free"):
        queue.submit(b"3")


@pytest.mark.parametrize(("index", "size"), [(256, 8), (-1, 8), (0, 0), (0, 12), (0, 65536)])
def test_a_queue_that_cannot_be_is_refused(connect: Connected, index: int, size: int) -> None:
    with pytest.raises(vu.StateError, match=f"{index}"):
        connect(Reverse()).queue(index, size)


def test_a_queue_that_the_device_does_not_have_is_refused_by_name(connect: Connected) -> None:
    with pytest.raises(vu.ProtocolError, match="SET_VRING_NUM: the back-end refused it"):
        connect(Reverse()).queue(1)


# --- The life of a queue ----------------------------------------------------------------------------------------------


def test_a_queue_goes_on_where_it_stopped(connect: Connected) -> None:
    queue = connect(Reverse()).queue(0)
    assert queue.request(b"ab", 2) == b"ba"
    assert queue.stop() == 1
    waiting = queue.submit(b"cd", 2)
    with pytest.raises(vu.PeerTimeout):
        waiting.wait(SHORT)
    queue.start()
    assert waiting.wait() == b"dc"


def test_a_queue_begins_where_it_is_told(connect: Connected) -> None:
    queue = connect(Reverse()).queue(0, base=65535)
    assert [queue.request(b"ab", 2) for _ in range(3)] == [b"ba"] * 3
    assert queue.stop() == 2


def test_a_queue_that_is_not_enabled_waits(connect: Connected) -> None:
    queue = connect(Reverse()).queue(0)
    queue.enable(False)
    completion = queue.submit(b"ab", 2)
    with pytest.raises(vu.PeerTimeout):
        completion.wait(SHORT)
    queue.enable()
    assert completion.wait() == b"ba"


def test_a_running_queue_is_not_made_again(connect: Connected) -> None:
    frontend = connect(Reverse())
    frontend.queue(0)
    with pytest.raises(vu.StateError, match="queue 0 is running; stop it first"):
        frontend.queue(0)


def test_a_reset_ends_requests_and_the_device_can_be_used_again(connect: Connected) -> None:
    device = Diary()
    frontend = connect(device)
    old = frontend.queue(0)
    old.request(b"ab", 2)
    frontend.reset()
    with pytest.raises(vu.StateError, match="queue 0: the device was reset"):
        old.submit(b"?")
    assert ("reset",) in device.entries
    assert frontend.queue(0).request(b"ab", 2) == b"ba"


# --- Back ends that are wrong -----------------------------------------------------------------------------------------


def test_a_back_end_that_hangs_costs_a_deadline(pair: Pair) -> None:
    frontend, back_end = pair(timeout=SHORT)
    back_end.answers[Id.GET_FEATURES] = lambda message: None
    with pytest.raises(vu.PeerTimeout, match="GET_FEATURES"):
        frontend.negotiate()
    with pytest.raises(vu.StateError, match=r"GET_QUEUE_NUM: the session is over \(GET_FEATURES"):
        frontend.exchange("GET_QUEUE_NUM")


@pytest.mark.parametrize("bytes_sent", [7, 15])
def test_a_back_end_that_closes_in_the_middle_of_an_answer_is_named(pair: Pair, bytes_sent: int) -> None:
    frontend, back_end = pair()

    def cut(message: raw.Message) -> None:
        back_end.send_bytes((raw.HEADER.pack(message.request, raw.REPLY, 8) + raw.u64(0))[:bytes_sent])
        back_end.socket.shutdown(socket.SHUT_RDWR)

    back_end.answers[Id.GET_FEATURES] = cut
    with pytest.raises(vu.ProtocolError, match="GET_FEATURES: the connection ended after"):
        frontend.negotiate()


def test_descriptors_where_none_belong_are_closed(pair: Pair) -> None:
    frontend, back_end = pair()

    def answer(message: raw.Message) -> None:
        with open(os.devnull) as stray:
            back_end.send(message.request, raw.u64(0), [stray.fileno()] * 3, flags=raw.REPLY)

    back_end.answers[Id.GET_FEATURES] = answer
    with pytest.raises(vu.ProtocolError, match="GET_FEATURES: the reply has 3 descriptors, expected none"):
        frontend.negotiate()


def test_an_answer_of_another_length_is_refused(pair: Pair) -> None:
    frontend, back_end = pair()
    back_end.answers[Id.GET_CONFIG] = lambda message: back_end.reply(message, raw.config(0, b"abc"))
    frontend.negotiate()
    with pytest.raises(vu.ProtocolError, match="GET_CONFIG: asked for 8 bytes at 0, got 3 at 0"):
        frontend.read_config(8)


@pytest.mark.parametrize(
    ("head", "written", "complaint"),
    [
        (0, 4, "4 bytes were written to the chain at descriptor 0, which has 3"),
        (0, 1 << 31, "which has 3"),
        (1, 0, "returns descriptor 1, where no chain begins"),
        (1 << 20, 0, "returns descriptor 1048576, where no chain begins"),
    ],
    ids=["too long", "much too long", "not submitted", "out of range"],
)
def test_a_completion_that_lies_breaks_the_queue(pair: Pair, head: int, written: int, complaint: str) -> None:
    frontend, back_end = pair()
    queue = frontend.negotiate().queue(0)
    called: list[Exception | None] = []
    completion, other = queue.submit(b"?", 3), queue.submit(b"?")
    other.add_done_callback(lambda completion: called.append(completion.error))
    back_end.rings[0].complete(head, written)
    with pytest.raises(vu.ProtocolError, match=f"queue 0: .*{complaint}"):
        completion.wait()
    raw.wait_until(lambda: called, "the callback is called")
    assert isinstance(called[0], vu.ProtocolError)
    with pytest.raises(vu.ProtocolError, match="queue 0"):
        queue.submit(b"?")


def test_a_request_that_completes_twice_breaks_the_queue_and_counts_once(pair: Pair) -> None:
    frontend, back_end = pair()
    queue = frontend.negotiate().queue(0)
    completion, other = queue.submit(b"?"), queue.submit(b"?")
    ring = back_end.rings[0]
    head = ring.take()
    ring.complete(head)
    assert completion.wait() == b""
    ring.complete(head)
    with pytest.raises(vu.ProtocolError, match=r"queue 0: .* returns descriptor 0, where no chain begins"):
        other.wait()


def test_a_used_index_that_jumps_breaks_the_queue(pair: Pair) -> None:
    frontend, back_end = pair()
    completion = frontend.negotiate().queue(0).submit(b"?")
    back_end.rings[0].publish(9)
    with pytest.raises(vu.ProtocolError, match="queue 0: the used index went from 0 to 9"):
        completion.wait()


def test_what_the_device_wrote_is_as_long_as_it_says(pair: Pair) -> None:
    frontend, back_end = pair()
    completion = frontend.negotiate().queue(0).submit(writable=8)
    ring = back_end.rings[0]
    head = ring.take()
    ring.fill(head, b"12345678")
    ring.complete(head, 5)
    assert completion.wait() == b"12345"


def test_a_back_end_that_dies_is_noticed_at_once(pair: Pair) -> None:
    frontend, back_end = pair()
    completion = frontend.negotiate().queue(0).submit(b"?")
    back_end.socket.shutdown(socket.SHUT_RDWR)
    with pytest.raises(vu.PeerClosed, match="queue 0: the back-end closed the connection"):
        completion.wait(LONG)


def test_those_who_await_are_told_of_a_back_end_that_dies(pair: Pair) -> None:
    frontend, back_end = pair()
    queue = frontend.negotiate().queue(0)
    queue.timeout = LONG

    async def main() -> None:
        asyncio.get_running_loop().call_later(SHORT, back_end.socket.shutdown, socket.SHUT_RDWR)
        await queue.submit(b"?")

    with pytest.raises(vu.PeerClosed, match="queue 0"):
        asyncio.run(main())


def test_a_ring_that_the_back_end_reports_as_broken_is_not_waited_for(pair: Pair) -> None:
    frontend, back_end = pair()
    completion = frontend.negotiate().queue(0).submit(b"?")
    os.eventfd_write(back_end.rings[0].err, 1)
    with pytest.raises(vu.ProtocolError, match="queue 0: the back-end reports that the ring is broken"):
        completion.wait(LONG)


def test_a_refused_message_ends_nothing(pair: Pair) -> None:
    frontend, back_end = pair()
    frontend.negotiate()
    back_end.answers[Id.SET_CONFIG] = lambda message: back_end.reply(message, raw.u64(22))
    with pytest.raises(vu.ProtocolError, match="SET_CONFIG: the back-end refused it with 0x16"):
        frontend.write_config(b"x")
    assert frontend.read_config(1) == b"\0"


# --- The state of a back end that is wrong ----------------------------------------------------------------------------

SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE = 42, 43


@pytest.fixture
def moving(pair: Pair) -> tuple[vu.Frontend, BackEnd]:
    """A front-end that may save the state of a raw back-end, which has none until a test says otherwise."""
    frontend, back_end = pair(protocol=PROTOCOL | raw.DEVICE_STATE)
    back_end.answers[SET_DEVICE_STATE_FD] = lambda message: back_end.reply(message, raw.u64(0x100))
    back_end.answers[CHECK_DEVICE_STATE] = lambda message: back_end.reply(message, raw.u64(0))
    return frontend.negotiate(), back_end


def instead(back_end: BackEnd, descriptor: int) -> None:
    """Let it ask for `descriptor` to be used."""
    back_end.answers[SET_DEVICE_STATE_FD] = lambda message: back_end.send(
        message.request, raw.u64(0), [descriptor], flags=raw.REPLY
    )


def test_a_state_without_an_end_is_given_up_at_its_limit(moving: tuple[vu.Frontend, BackEnd]) -> None:
    frontend, back_end = moving
    written: list[int] = []
    writers: list[threading.Thread] = []

    def write_for_ever(descriptor: int) -> None:
        with contextlib.suppress(BrokenPipeError), open(descriptor, "wb", buffering=0) as file:
            while True:
                written.append(file.write(bytes(1 << 16)))

    def begin(message: raw.Message) -> None:
        back_end.reply(message, raw.u64(0x100))
        writers.append(threading.Thread(target=write_for_ever, args=[os.dup(message.descriptors[0])]))
        writers[0].start()

    back_end.answers[SET_DEVICE_STATE_FD] = begin
    with pytest.raises(
        vu.StateTooLong, match=r"longer than 1000000 bytes; .* larger limit, or save_state_to\(\) a file"
    ):
        frontend.save_state(limit=1_000_000)
    writers[0].join()
    # And what was on its way in the pipe.
    assert 1_000_000 < sum(written) < 3_000_000
    assert back_end.messages[-1].request == CHECK_DEVICE_STATE
    assert frontend.read_config(1) == b"\0"


def test_a_descriptor_of_the_back_end_s_own_is_never_waited_for_beyond_the_deadline(
    moving: tuple[vu.Frontend, BackEnd],
) -> None:
    frontend, back_end = moving
    frontend.timeout = SHORT
    reader, writer = os.pipe()
    try:
        instead(back_end, reader)
        with pytest.raises(vu.PeerTimeout, match="wrote nothing of its state"):
            frontend.save_state()
        instead(back_end, writer)
        with pytest.raises(vu.PeerTimeout, match="read nothing of its state"):
            frontend.load_state(bytes(1 << 20))
        # What is not to be read from it is not read, and nothing is left open.
        with pytest.raises(vu.StateError, match="cannot be read"):
            frontend.save_state()
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("path", ["/dev/zero", "/"])
def test_a_descriptor_that_carries_no_state_is_refused(moving: tuple[vu.Frontend, BackEnd], path: str) -> None:
    frontend, back_end = moving
    descriptor = os.open(path, os.O_RDONLY)
    instead(back_end, descriptor)
    with pytest.raises(vu.StateError, match="neither a pipe, a socket nor a file"):
        frontend.save_state()
    os.close(descriptor)
    with pytest.raises(vu.StateError, match=r"cannot be written|neither"):
        frontend.load_state(b"state")


def test_a_state_is_moved_although_the_process_has_many_descriptors(moving: tuple[vu.Frontend, BackEnd]) -> None:
    frontend, _ = moving
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 2048), limits[1]))
        null = os.open("/dev/null", os.O_RDONLY)
        stack.callback(os.close, null)
        while (descriptor := os.dup(null)) < 1100:
            stack.callback(os.close, descriptor)
        stack.callback(os.close, descriptor)
        assert frontend.save_state() == b""
        frontend.load_state(b"state")
