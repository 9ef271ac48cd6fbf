"""What is between a front-end and a back-end: it changes nothing, and sees everything."""

from __future__ import annotations

import array
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import raw
import vhost_user as vu
from raw import Id
from raw_backend import FEATURES, BackEnd
from specimens import Hold, Reverse, Serve
from storage_daemon import storage_daemon
from vhost_user.devices import Blk, Console, Rng
from vhost_user.extensions import SharedObjects
from vhost_user.features import by_name
from vhost_user.guest import Uml
from vhost_user.trace import packed
from vhost_user.trace.model import Record, from_json, to_json
from vhost_user.trace.proxy import Proxy, Source, running
from vhost_user.trace.views import JsonLines, Lines

#: Puts a proxy in front of a back-end. Returns its socket, and the records that come.
Trace = Callable[..., tuple[Path, list[Record]]]


@pytest.fixture
def trace(level: None, tmp_path: Path) -> Iterator[Trace]:
    with contextlib.ExitStack() as proxies:

        def start(back_end: Path, **options: Any) -> tuple[Path, list[Record]]:
            path = tmp_path / f"traced{len(list(tmp_path.glob('traced*')))}.sock"
            records: list[Record] = []
            proxies.enter_context(running(Proxy(path, back_end, records.append, **options)))
            return path, records

        yield start


@pytest.fixture
def front_end(level: None) -> Iterator[Callable[[Path], raw.FrontEnd]]:
    """Connect a raw front-end, which is gone before what it is connected to."""
    with contextlib.ExitStack() as front_ends:
        yield lambda path: front_ends.enter_context(raw.FrontEnd(path))


SHARED_OBJECT_ADD = 6
OBJECT = UUID(int=1)


class Counter(SharedObjects, device_id=0x7FFF):
    """Has something to tell of its own."""

    requestq = vu.Queue()
    count = vu.config.u32()


def names(records: list[Record], sender: str = "front-end") -> list[str]:
    return [record.decoded.name for record in records if record.event == "message" and record.sender == sender]


def first(records: list[Record], name: str) -> Record:
    return next(record for record in records if record.event == "message" and record.decoded.name == name)


def seen(records: list[Record], event: str, count: int = 1) -> list[Record]:
    """Records of a kind, once there are so many."""

    def found() -> list[Record]:
        # A channel may end before its connection does, or with it.
        return [
            record for record in records if record.event == event and (record.channel, event) != ("back-end", "closed")
        ]

    raw.wait_until(lambda: len(found()) >= count, f"{count} times {event}")
    return found()


# --- Seeing -----------------------------------------------------------------------------------------------------------


def test_a_guest_does_not_notice_and_everything_is_seen(serve: Serve, trace: Trace) -> None:
    path, records = trace(serve(Rng(lambda count: b"R" * count)), ring=True)
    with Uml([(path, vu.DeviceId.RNG)]) as guest:
        assert guest.run("dd if=/dev/hwrng bs=64 count=1 iflag=fullblock status=none").stdout == b"R" * 64
    seen(records, "closed")
    assert names(records)[:4] == ["SET_OWNER", "GET_FEATURES", "GET_PROTOCOL_FEATURES", "SET_PROTOCOL_FEATURES"]
    assert [record.problem for record in records if record.problem] == []

    answers = [record for record in records if record.event == "message" and record.decoded.answer]
    assert len(answers) > 10
    assert all(record.latency is not None and 0 < record.latency < 5e9 for record in answers)
    (table,) = [record for record in records if record.event == "message" and record.decoded.name == "SET_MEM_TABLE"][
        :1
    ]
    assert [(each.kind, each.size) for each in table.descriptors] == [("file", 128 << 20)]
    (kick,) = [record for record in records if record.event == "message" and record.decoded.name == "SET_VRING_KICK"][
        :1
    ]
    assert [each.kind for each in kick.descriptors] == ["eventfd"]

    requests, completions = seen(records, "request"), seen(records, "completion")
    assert len(requests) == len(completions)
    last = completions[-1].activity
    assert last is not None
    assert last.written == 64
    assert last.data == b"R" * 32


def test_a_disk_that_nobody_here_wrote_is_seen_too(level: None, tmp_path: Path, trace: Trace) -> None:
    with storage_daemon(tmp_path) as disk:
        path, records = trace(disk, ring=True)
        with Uml([(path, vu.DeviceId.BLOCK)]) as guest:
            guest.run("printf 'on the disk' | dd of=/dev/vda bs=512 conv=sync oflag=direct status=none")
            read = guest.run("dd if=/dev/vda bs=512 count=1 iflag=direct status=none").stdout
        assert read.startswith(b"on the disk")
        seen(records, "closed")
    assert "GET_CONFIG" in names(records)
    assert [record.problem for record in records if record.problem] == []
    # A status alone for what was written, and one behind what was read.
    written = {record.activity.written for record in seen(records, "completion") if record.activity}
    assert {1, 513} <= written


def test_feature_bits_have_the_names_of_the_device_type(serve: Serve, trace: Trace) -> None:
    path, records = trace(serve(Blk(1 << 20, num_queues=2)))
    with vu.Frontend.connect(path) as frontend:
        # What it is shows when its configuration is read.
        frontend.negotiate()
        frontend.read_config(60)
        assert frontend.exchange("GET_FEATURES")
    answers = [record for record in records if record.event == "message" and record.decoded.name == "GET_FEATURES"]
    shown = [set(record.fields["names"]) for record in answers if record.decoded.answer]
    assert {"bit 6", "bit 9", "bit 12"} < shown[0]
    assert {"BLK_SIZE", "FLUSH", "MQ", "VERSION_1", "EVENT_IDX"} < shown[-1]
    assert not any(name.startswith("bit ") for name in shown[-1])


def test_the_device_type_may_be_said(serve: Serve, trace: Trace) -> None:
    path, records = trace(serve(Console()), device=by_name("console"))
    with vu.Frontend.connect(path) as frontend:
        frontend.negotiate()
    out = io.StringIO()
    JsonLines(out)(first(records, "SET_FEATURES"))
    assert "SIZE" in json.loads(out.getvalue())["fields"]["names"]


def with_a_channel(guest: raw.FrontEnd, memory: raw.Memory) -> raw.Channel:
    """Set up so far that the device may tell something."""
    guest.negotiate(protocol=raw.REPLY_ACK | raw.BACKEND_REQ | raw.CONFIG | raw.SHARED_OBJECT)
    channel = guest.open_backend_channel()
    guest.share(memory)
    guest.start(raw.Ring(memory))
    return channel


def test_what_the_back_end_asks_is_seen(
    serve: Serve, trace: Trace, front_end: Callable[[Path], raw.FrontEnd], memory: raw.Memory
) -> None:
    device = Counter()
    path, records = trace(serve(device))
    channel = with_a_channel(front_end(path), memory)
    given = device.add_shared_object(OBJECT)
    assert channel.receive().request == SHARED_OBJECT_ADD
    channel.send(SHARED_OBJECT_ADD, raw.u64(0), flags=raw.REPLY)
    raw.wait_until(lambda: sum(record.channel == "back-end" for record in records) == 2, "request and answer")
    asked, answered = (record for record in records if record.channel == "back-end")
    assert (asked.decoded.name, asked.sender, asked.problem) == ("BACKEND_SHARED_OBJECT_ADD", "back-end", None)
    assert (answered.is_answer, answered.sender, answered.decoded.fields) == (True, "front-end", {"value": 0})
    assert answered.latency is not None
    given.result(raw.DEADLINE)


def test_the_channel_can_be_left_alone(
    serve: Serve, trace: Trace, front_end: Callable[[Path], raw.FrontEnd], memory: raw.Memory
) -> None:
    device = Counter()
    path, records = trace(serve(device), channel=False)
    channel = with_a_channel(front_end(path), memory)
    device.count = 7
    assert channel.receive().request == raw.CONFIG_CHANGE
    assert [record for record in records if record.channel == "back-end"] == []


def test_every_record_survives_json(serve: Serve, trace: Trace) -> None:
    path, records = trace(serve(Rng()), ring=True)
    with Uml([(path, vu.DeviceId.RNG)]) as guest:
        guest.run("head -c 64 /dev/hwrng")
    seen(records, "closed")
    # The channel of the back-end may end after the connection.
    records = list(records)
    out = io.StringIO()
    write = JsonLines(out)
    for record in records:
        write(record)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [from_json(line) for line in lines] == records
    assert {line["event"] for line in lines} == {"opened", "message", "closed", "request", "completion"}
    (features,) = [line for line in lines if line.get("name") == "SET_FEATURES"][:1]
    assert "VERSION_1" in features["fields"]["names"]


def test_a_line_is_shown_for_each_record(serve: Serve, trace: Trace, front_end: Callable[[Path], raw.FrontEnd]) -> None:
    path, records = trace(serve(Reverse()))
    guest = front_end(path)
    guest.negotiate()
    guest.send(77, b"?")
    assert guest.is_closed()
    seen(records, "closed")
    out = io.StringIO()
    write = Lines(out)
    for record in records:
        write(record)
    lines = out.getvalue().splitlines()
    assert "connected" in lines[0]
    assert any("<-  SET_OWNER                 ok  (" in line for line in lines)
    assert any("->  SET_PROTOCOL_FEATURES?    9 MQ REPLY_ACK" in line for line in lines)
    assert any("request 77" in line and "! unknown request 77 of the front-end" in line for line in lines)
    assert "the back-end closed the connection" in lines[-1]
    assert "\x1b" not in out.getvalue()


# --- Changing nothing -------------------------------------------------------------------------------------------------

#: Pieces of a stream, each with the number of descriptors that its first byte has.
pieces = st.lists(st.tuples(st.binary(min_size=1, max_size=300), st.integers(0, 3)), min_size=1, max_size=12)


def arrivals(end: socket.socket, count: int) -> tuple[bytes, dict[int, list[int]]]:
    """So many bytes, and what came with each: sizes of the memory behind the descriptors."""
    data, found = b"", {}
    while len(data) < count:
        byte, numbers, _, _ = socket.recv_fds(end, 1, 253)
        assert byte, f"closed after {len(data)} of {count} bytes"
        if numbers:
            found[len(data)] = [os.fstat(number).st_size for number in numbers]
            for number in numbers:
                os.close(number)
        data += byte
    return data, found


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(stream=pieces, waits=st.booleans())
def test_bytes_and_descriptors_go_on_as_they_came(
    pipe: tuple[socket.socket, socket.socket], stream: list[tuple[bytes, int]], waits: bool
) -> None:
    sender, receiver = pipe
    expected: dict[int, list[int]] = {}
    at = 0
    for number, (data, count) in enumerate(stream):
        memories = [os.memfd_create("test") for _ in range(count)]
        sizes = [100 * number + each for each in range(count)]
        for memory, size in zip(memories, sizes, strict=True):
            os.truncate(memory, size)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", memories))] if memories else []
        assert sender.sendmsg([data], rights) == len(data)
        if memories:
            expected[at] = sizes
        at += len(data)
        for memory in memories:
            os.close(memory)
        if waits:
            time.sleep(0.0005)
    assert arrivals(receiver, at) == (b"".join(data for data, _ in stream), expected)


@pytest.fixture(params=["to the back-end", "to the front-end"])
def pipe(request: pytest.FixtureRequest, level: None, tmp_path: Path) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection through a proxy that looks at everything it can."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(tmp_path / "back-end"))
        listener.listen()
        proxy = Proxy(tmp_path / "traced", tmp_path / "back-end", lambda record: None, ring=True)
        stack.enter_context(running(proxy))
        front_end = stack.enter_context(socket.socket(socket.AF_UNIX))
        front_end.connect(str(tmp_path / "traced"))
        back_end = stack.enter_context(listener.accept()[0])
        for end in (front_end, back_end):
            end.settimeout(raw.DEADLINE)
        stack.callback((tmp_path / "back-end").unlink)
        yield (front_end, back_end) if request.param == "to the back-end" else (back_end, front_end)


def test_more_than_the_sockets_hold_waits_for_the_reader(pipe: tuple[socket.socket, socket.socket]) -> None:
    sender, receiver = pipe
    sender.setblocking(False)
    block, sent = bytes(range(256)) * 256, 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += sender.send(block[sent % len(block) :])
            time.sleep(0.001)
    assert sent > len(block)
    received = b""
    while len(received) < sent:
        received += receiver.recv(1 << 16)
    assert received == (block * (sent // len(block) + 1))[:sent]


def test_the_end_of_a_connection_goes_on(pipe: tuple[socket.socket, socket.socket]) -> None:
    sender, receiver = pipe
    sender.sendall(b"\x01\0\0\0\x01")
    sender.close()
    assert receiver.recv(100) == b"\x01\0\0\0\x01"
    assert receiver.recv(100) == b""


def test_descriptors_are_told_apart_by_the_byte_that_they_came_with() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.send(b"before")
        socket.send_fds(ours, [b"with"], [ours.fileno()])
        socket.send_fds(ours, [b"too"], [ours.fileno()] * 2)
        ours.send(b"after")
        source = Source(theirs)
        found = [source.read() for _ in range(3)]
        for number in (number for _, numbers in found for number in numbers):
            os.close(number)
        assert [(data, len(numbers)) for data, numbers in found] == [(b"before", 0), (b"with", 1), (b"tooafter", 2)]


# --- Bad peers --------------------------------------------------------------------------------------------------------


def test_what_is_no_message_is_shown_and_goes_on(serve: Serve, trace: Trace) -> None:
    path, records = trace(serve(Reverse()))
    with raw.FrontEnd(path) as guest:
        guest.send(Id.GET_FEATURES, b"", size=1 << 31)
        assert guest.is_closed()
    (strange,) = seen(records, "bytes")
    assert strange.data == raw.HEADER.pack(Id.GET_FEATURES, raw.REQUEST, 1 << 31)
    assert "more than any message has" in strange.text
    seen(records, "closed")
    with raw.FrontEnd(path) as guest:
        guest.send_bytes(raw.HEADER.pack(Id.SET_FEATURES, raw.REQUEST, 8)[:7])
    (cut,) = seen(records, "bytes", 2)[1:]
    assert cut.text == "the connection ended after 7 of the 12 bytes of a header"
    assert cut.connection == 2


def test_a_descriptor_on_a_later_byte_is_shown(serve: Serve, trace: Trace) -> None:
    path, records = trace(serve(Reverse()))
    message = raw.HEADER.pack(Id.SET_VRING_CALL, raw.NEED_REPLY, 8) + raw.vring_descriptor(0)
    with raw.FrontEnd(path) as guest, contextlib.closing(raw.Eventfd()) as call:
        guest.send_bytes(message[:14])
        guest.send_bytes(message[14:], [call.peer])
        assert guest.reply_to(Id.SET_VRING_CALL) != raw.u64(0)
    (shown,) = [record for record in records if record.event == "message" and not record.is_answer]
    assert [(descriptor.kind, descriptor.offset) for descriptor in shown.descriptors] == [("eventfd", 14)]
    assert shown.problem is not None
    assert "byte 14" in shown.problem


def test_a_missing_back_end_turns_the_front_end_away_and_the_next_is_served(
    trace: Trace, level: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, records = trace(tmp_path / "nobody")
    with raw.FrontEnd(path) as guest:
        assert guest.is_closed()
    (note,) = seen(records, "note")
    assert "nobody: No such file or directory" in note.text
    assert "start the back-end, or choose another --connect" in caplog.text
    with Rng().start(tmp_path / "nobody"), raw.FrontEnd(path) as guest:
        assert guest.get_u64(Id.GET_FEATURES)


def test_front_ends_are_told_apart(serve: Serve, trace: Trace) -> None:
    path, records = trace(serve(Reverse()))
    for _ in range(3):
        with raw.FrontEnd(path) as guest:
            guest.negotiate()
    closed = seen(records, "closed", 3)
    assert [(record.connection, record.sender) for record in closed] == [(number, "front-end") for number in (1, 2, 3)]


def test_both_sides_may_go_at_once(level: None, tmp_path: Path) -> None:
    looked_at, go_on = threading.Event(), threading.Event()

    def hold(record: Record) -> None:
        if record.event == "message":
            looked_at.set()
            assert go_on.wait(raw.DEADLINE)

    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(tmp_path / "back-end"))
        stack.callback((tmp_path / "back-end").unlink)
        listener.listen()
        proxy = stack.enter_context(running(Proxy(tmp_path / "traced", tmp_path / "back-end", hold)))
        going, staying = raw.FrontEnd(tmp_path / "traced"), raw.FrontEnd(tmp_path / "traced")
        with going, staying, listener.accept()[0] as back_end:
            staying.send(Id.SET_OWNER)
            assert looked_at.wait(raw.DEADLINE)
            going.close()
            back_end.close()
            go_on.set()
            raw.wait_until(lambda: proxy.front_ends == 1, "one connection is over")
            staying.send(Id.SET_OWNER)
            with listener.accept()[0] as other:
                assert raw.Channel(other).receive().request == Id.SET_OWNER


# --- Rings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indirect", [False, True])
def test_requests_and_completions_are_seen_in_the_ring(
    serve: Serve,
    trace: Trace,
    front_end: Callable[[Path], raw.FrontEnd],
    memory: raw.Memory,
    indirect: bool,
) -> None:
    path, records = trace(serve(Reverse()), ring=True)
    guest = front_end(path)
    guest.negotiate(features=raw.PROTOCOL_FEATURES | raw.VERSION_1 | raw.INDIRECT_DESC)
    guest.share(memory)
    ring = raw.Ring(memory)
    guest.start(ring)
    for number in range(40):
        data = f"request {number}".encode()
        assert guest.exchange(ring, data, 32, indirect=indirect) == data[::-1]
        seen(records, "completion", number + 1)
    requests = [record.activity for record in seen(records, "request") if record.activity]
    completions = [record.activity for record in seen(records, "completion") if record.activity]
    assert [activity.index for activity in requests] == list(range(40)) == [activity.index for activity in completions]
    assert [activity.data for activity in requests] == [f"request {number}".encode() for number in range(40)]
    assert [activity.data for activity in completions] == [f"request {number}".encode()[::-1] for number in range(40)]
    assert {activity.indirect for activity in requests} == {indirect}
    assert {activity.writable[0].size for activity in requests} == {32}
    assert guest.stop(ring) == 40


PACKED = vu.TransportFeature.RING_PACKED


@pytest.fixture
def packed_device() -> Hold:
    """One that completes nothing before it was seen that it has it."""
    device = Hold()
    device.packed_rings = True
    return device


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("extra", [0, vu.TransportFeature.EVENT_IDX], ids=["flags", "event_idx"])
def test_a_packed_ring_is_followed(serve: Serve, trace: Trace, packed_device: Hold, indirect: bool, extra: int) -> None:
    path, records = trace(serve(packed_device), ring=True)
    features = PACKED | vu.TransportFeature.VERSION_1 | vu.TransportFeature.INDIRECT_DESC | extra
    with vu.Frontend.connect(path) as frontend:
        queue = frontend.negotiate(features).queue(0, 7, indirect=indirect)
        for number in range(20):
            word = b"request %d" % number
            waiting = queue.submit([word, b"!"], [20, 12])
            seen(records, "request", number + 1)
            held = packed_device.next()
            held.write(held.read()[::-1])
            held.complete()
            assert waiting.wait() == b"!" + word[::-1]
            seen(records, "completion", number + 1)
        queue.stop()
    requests = [record.activity for record in seen(records, "request") if record.activity]
    completions = [record.activity for record in seen(records, "completion") if record.activity]
    assert [activity.index for activity in requests] == list(range(20)) == [activity.index for activity in completions]
    assert [activity.data for activity in requests] == [b"request %d!" % number for number in range(20)]
    assert [activity.data for activity in completions] == [(b"request %d!" % number)[::-1] for number in range(20)]
    assert [activity.head for activity in requests] == [number * (1 if indirect else 4) % 7 for number in range(20)]
    assert {tuple(buffer.size for buffer in activity.writable) for activity in requests} == {(20, 12)}
    assert {(activity.indirect, activity.late) for activity in requests} == {(indirect, False)}
    assert all(record.latency for record in seen(records, "completion"))
    assert [record.text for record in records if record.event == "note"] == []
    # The device names the descriptor that it waits for, if it may: the one of this request, or of the next one.
    at = [activity.wish.split("/")[0] for activity in requests if activity.wish.startswith("at ")]
    assert bool(at) is bool(extra)
    assert {*at} <= {f"at {activity.head}" for activity in requests}


def test_a_packed_ring_is_followed_from_its_base(serve: Serve, trace: Trace, packed_device: Hold) -> None:
    path, records = trace(serve(packed_device), ring=True)
    with vu.Frontend.connect(path) as frontend:
        queue = frontend.negotiate(PACKED | vu.TransportFeature.VERSION_1).queue(0, 8, base=0x0007_0007)
        for number in range(3):
            waiting = [queue.submit(b"ab", 2) for _ in range(2)]
            seen(records, "request", 2 * number + 2)
            first, second = packed_device.next(), packed_device.next()
            # The other way around.
            second.complete()
            waiting[1].wait()
            first.complete()
            waiting[0].wait()
            seen(records, "completion", 2 * number + 2)
    heads = [record.activity.head for record in seen(records, "completion") if record.activity]
    assert heads == [1, 7, 5, 3, 1, 7]


def test_requests_of_a_packed_ring_that_were_done_at_once_are_seen_late() -> None:
    used, available = packed.AVAILABLE | packed.USED, packed.AVAILABLE
    ring = [packed.Descriptor(0, 0, 0, 0)] * 8
    # Three and one descriptors with the buffer ids 5 and 6, the head of each of which the device wrote over.
    ring[0] = packed.Descriptor(0x1000, 64, 5, used)
    ring[1] = packed.Descriptor(0x2000, 16, 5, available | packed.NEXT)
    ring[2] = packed.Descriptor(0x3000, 16, 5, available)
    ring[3] = packed.Descriptor(0x4000, 32, 6, used)
    positions = packed.Positions.of(0x8000_8000)
    requests, completions = packed.chains(ring, positions)
    assert [(each.slot, each.number, len(each.descriptors), each.late) for each in requests] == [
        (0, 5, 2, True),
        (3, 6, 0, True),
    ]
    assert completions == [(5, 64), (6, 32)]
    assert packed.chains(ring, positions) == ([], [])


def test_requests_that_are_given_back_by_one_used_entry_are_seen_each(level: None, tmp_path: Path) -> None:
    records: list[Record] = []
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(tmp_path / "back-end"))
        stack.callback((tmp_path / "back-end").unlink)
        listener.listen()
        stack.enter_context(
            running(Proxy(tmp_path / "traced", tmp_path / "back-end", records.append, ring=True)),
        )
        guest = stack.enter_context(raw.FrontEnd(tmp_path / "traced"))
        back_end = stack.enter_context(BackEnd(listener.accept()[0], features=FEATURES | vu.TransportFeature.IN_ORDER))
        memory = stack.enter_context(raw.Memory())
        guest.negotiate(raw.PROTOCOL_FEATURES | raw.VERSION_1 | vu.TransportFeature.IN_ORDER)
        guest.share(memory)
        ring = raw.Ring(memory, size=8)
        guest.start(ring)
        guest.set_call(ring)
        for batch in range(4):
            chains = [ring.add([b"x"], [16 + number]) for number in range(3)]
            guest.kick(ring)
            seen(records, "request", 3 * batch + 3)
            heads = [back_end.rings[0].take() for _ in range(3)]
            assert heads == [chain.head for chain in chains]
            # The first alone, and then two by the entry of the last.
            back_end.rings[0].complete(heads[0], 7)
            seen(records, "completion", 3 * batch + 1)
            back_end.rings[0].put(heads[2], 9)
            back_end.rings[0].skip(1)
            seen(records, "completion", 3 * batch + 3)
    completions = [record.activity for record in seen(records, "completion", 12) if record.activity]
    assert [activity.index for activity in completions] == list(range(12))
    # Of those that have no entry the driver may think that all was written.
    assert [activity.written for activity in completions] == 4 * [7, 17, 9]
    assert all(record.text == "" for record in records if record.activity)


def test_requests_of_a_packed_ring_that_are_given_back_by_one_used_descriptor_are_seen_each() -> None:
    used, available = packed.AVAILABLE | packed.USED, packed.AVAILABLE
    ring = [packed.Descriptor(0x1000 * (at + 1), 16, 7 - at, available) for at in range(6)]
    ring += [packed.Descriptor(0, 0, 0, 0)] * 2
    positions = packed.Positions.of(0x8000_8000)
    requests, completions = packed.chains(ring, positions, in_order=True)
    assert ([each.number for each in requests], completions) == ([7, 6, 5, 4, 3, 2], [])
    # The first three, and the next one by itself.
    ring[0] = packed.Descriptor(0x1000, 9, 5, used)
    ring[3] = packed.Descriptor(0x4000, 8, 4, used)
    assert packed.chains(ring, positions, in_order=True) == ([], [(7, None), (6, None), (5, 9), (4, 8)])
    # The last two, where the first descriptor means nothing.
    ring[4] = packed.Descriptor(0x5000, 1, 2, used)
    assert packed.chains(ring, positions, in_order=True) == ([], [(3, None), (2, 1)])
    assert (positions.used, positions.avail) == (6, 6)


def test_a_packed_ring_is_followed_after_a_batch_that_was_not_understood() -> None:
    used, available = packed.AVAILABLE | packed.USED, packed.AVAILABLE
    ring = [packed.Descriptor(0, 0, 0, 0)] * 8
    # The descriptor of the first says that the third is used; nobody has seen the first before.
    ring[0] = packed.Descriptor(0x1000, 4, 3, used)
    ring[1] = packed.Descriptor(0x2000, 16, 2, available)
    ring[2] = packed.Descriptor(0x3000, 16, 3, available)
    ring[3] = packed.Descriptor(0x4000, 5, 4, used)
    positions = packed.Positions.of(0x8000_8000)
    requests, completions = packed.chains(ring, positions, in_order=True)
    assert [(each.slot, each.late) for each in requests] == [(0, True), (1, False), (2, False), (3, True)]
    assert [each.number for each in completions] == [3, 2, 3, 4]
    assert (positions.used, positions.avail) == (4, 4)


@pytest.mark.parametrize("indirect", [False, True])
def test_a_big_endian_ring_is_followed(
    serve: Serve, trace: Trace, front_end: Callable[[Path], raw.FrontEnd], memory: raw.Memory, indirect: bool
) -> None:
    device = Reverse()
    device.cross_endian = True
    path, records = trace(serve(device), ring=True)
    guest = front_end(path)
    guest.negotiate(raw.PROTOCOL_FEATURES | raw.INDIRECT_DESC, raw.REPLY_ACK | raw.CROSS_ENDIAN)
    guest.share(memory)
    ring = raw.Ring(memory, order=">")
    guest.tell(Id.SET_VRING_ENDIAN, raw.vring_state(ring.index, 1))
    guest.start(ring)
    for number in range(20):
        data = f"request {number}".encode()
        assert guest.exchange(ring, data, 32, indirect=indirect) == data[::-1]
        seen(records, "completion", number + 1)
    requests = [record.activity for record in seen(records, "request") if record.activity]
    completions = [record.activity for record in seen(records, "completion") if record.activity]
    assert [activity.data for activity in requests] == [f"request {number}".encode() for number in range(20)]
    assert [activity.data for activity in completions] == [f"request {number}".encode()[::-1] for number in range(20)]
    assert {activity.writable[0].size for activity in requests} == {32}
    assert [record.text for record in records if record.event == "note"] == []


def test_a_ring_is_followed_from_its_base_and_not_after_its_stop(
    serve: Serve, trace: Trace, front_end: Callable[[Path], raw.FrontEnd], memory: raw.Memory
) -> None:
    path, records = trace(serve(Reverse()), ring=True)
    guest = front_end(path)
    guest.negotiate()
    guest.share(memory)
    ring = raw.Ring(memory)
    ring.clear(65535)
    guest.start(ring, 65535)
    for _ in range(3):
        guest.exchange(ring, b"x", 1)
    base = guest.stop(ring)
    assert base == 2
    indices = [record.activity.index for record in seen(records, "completion", 3) if record.activity]
    assert indices == [65535, 0, 1]
    ring.avail_index += 5
    assert guest.get_u64(Id.GET_FEATURES)
    time.sleep(raw.QUIET)
    assert len(seen(records, "request")) == 3


def test_memory_that_goes_away_and_garbage_in_it_are_survived(
    trace: Trace, level: None, tmp_path: Path, front_end: Callable[[Path], raw.FrontEnd], memory: raw.Memory
) -> None:
    # A back-end that answers everything and touches nothing, so that only the tracer is tried.
    with Silent(tmp_path / "silent"):
        path, records = trace(tmp_path / "silent", ring=True)
        guest = front_end(path)
        guest.negotiate()
        guest.share(memory)
        ring = raw.Ring(memory)
        guest.start(ring)
        ring.set_descriptor(0, 0xDEAD_0000, 64, raw.NEXT, 0)
        ring.offer(0, 999)
        loops, out_of_range = seen(records, "request", 2)
        assert "loops" in loops.text
        assert "999 does not exist" in out_of_range.text
        ring.avail_index += 1000
        assert "what lies between is lost" in seen(records, "note")[0].text
        os.truncate(memory.descriptor, 0)
        raw.wait_until(lambda: any("shorter than the region" in record.text for record in records), "a note")
        assert guest.get_u64(Id.GET_FEATURES) == 0
        os.truncate(memory.descriptor, memory.size)


def test_the_kick_is_the_back_ends(
    trace: Trace, level: None, tmp_path: Path, front_end: Callable[[Path], raw.FrontEnd], memory: raw.Memory
) -> None:
    with Silent(tmp_path / "silent") as silent:
        path, _ = trace(tmp_path / "silent", ring=True)
        guest = front_end(path)
        guest.negotiate()
        guest.share(memory)
        guest.start(raw.Ring(memory))
        kick = silent.descriptors[Id.SET_VRING_KICK]
        before = memory.map[:]
        os.eventfd_write(kick, 3)
        time.sleep(raw.QUIET)
        assert os.eventfd_read(kick) == 3
        assert memory.map[:] == before


class Silent:
    """A back-end that acknowledges everything, and keeps the last descriptor of every request."""

    def __init__(self, path: Path) -> None:
        self.descriptors: dict[int, int] = {}
        self._path = path
        self._connections: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()

    def __enter__(self) -> Silent:
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._listener, *self._connections):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        self._path.unlink()

    def _serve(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        self._connections.append(connection)
        with connection:
            channel = raw.Channel(connection)
            connection.settimeout(None)
            with contextlib.suppress(ConnectionError):
                while True:
                    message = channel.receive()
                    for number in message.descriptors:
                        before = self.descriptors.pop(message.request, None)
                        if before is not None:
                            os.close(before)
                        self.descriptors[message.request] = number
                    channel.send(message.request, raw.u64(0), flags=raw.REPLY)
        for number in self.descriptors.values():
            os.close(number)


# --- The command ------------------------------------------------------------------------------------------------------


def vhost_user(*arguments: object) -> subprocess.Popen[str]:
    """Start the command."""
    return subprocess.Popen(
        [sys.executable, "-m", "vhost_user", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def listening(command: subprocess.Popen[str]) -> str:
    """What the command says once front-ends can connect."""
    assert command.stderr is not None
    said = ""
    while "Ctrl-C ends it" not in said:
        line = command.stderr.readline()
        assert line, f"the command ended: {said}"
        said += line
    return said


def test_the_command_ends_with_the_front_end_and_leaves_a_file(serve: Serve, tmp_path: Path) -> None:
    path, file = tmp_path / "traced", tmp_path / "trace.jsonl"
    back_end = serve(Reverse())
    with vhost_user("trace", "--listen", path, "--connect", back_end, "--json", file, "--once") as command:
        said = listening(command)
        with raw.FrontEnd(path) as guest:
            guest.negotiate()
        out, error = command.communicate(timeout=raw.DEADLINE)
    assert command.returncode == 0, error
    assert "let the front-end connect to" in said
    assert "SET_PROTOCOL_FEATURES" in out
    recorded = [from_json(json.loads(line)) for line in file.read_text().splitlines()]
    assert names(recorded) == ["SET_OWNER", "SET_PROTOCOL_FEATURES", "SET_FEATURES"]
    assert not path.exists()


def test_the_command_ends_by_a_signal_and_json_goes_to_the_output(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "traced"
    with vhost_user("trace", "--listen", path, "--connect", serve(Reverse()), "--json", "-") as command:
        listening(command)
        with raw.FrontEnd(path) as guest:
            guest.negotiate()
            command.terminate()
            out, error = command.communicate(timeout=raw.DEADLINE)
            assert guest.is_closed()
    assert command.returncode == 0, error
    assert {json.loads(line)["event"] for line in out.splitlines()} == {"opened", "message"}


def test_without_a_back_end_the_command_says_so_and_fails(tmp_path: Path) -> None:
    path, nobody = tmp_path / "traced", tmp_path / "nobody"
    with vhost_user("trace", "--listen", path, "--connect", nobody, "--once") as command:
        assert f"nothing is at {nobody} yet" in listening(command)
        with raw.FrontEnd(path) as guest:
            assert guest.is_closed()
        _, error = command.communicate(timeout=raw.DEADLINE)
    assert command.returncode == 1
    assert f"{nobody}: No such file or directory: the front-end is turned away" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--listen", "a"], "say where the front-end connects, --listen, and where the back-end listens, --connect"),
        (["--listen", "a", "--connect", "b", "--json", "-", "--pcapng", "-"], "only one of --json and --pcapng"),
    ],
)
def test_wrong_usage_is_told(arguments: list[str], said: str) -> None:
    with vhost_user("trace", *arguments) as command:
        _, error = command.communicate(timeout=raw.DEADLINE)
    assert command.returncode == 2
    assert said in error


def test_a_record_is_the_same_after_json() -> None:
    record = Record(5, 1, "message", data=raw.HEADER.pack(77, 1, 2) + b"hi")
    assert from_json(to_json(record)) == record
