"""What a front-end may rely on: messages and answers, the states of a ring, notifications, memory, reconnection.

vhost-user specification, "Front-end message types" and "Ring states".
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Callable
from functools import partial

import pytest

import vhost_user as vu
from raw import (
    BACKEND_REQ,
    CONFIG,
    CONFIGURE_MEM_SLOTS,
    DEVICE_STATE,
    EVENT_IDX,
    GPA_ADDRESSES,
    INDIRECT_DESC,
    LOG_ALL,
    LOG_SHMFD,
    MQ,
    NEED_REPLY,
    NO_INTERRUPT,
    NO_NOTIFY,
    PROTOCOL_FEATURES,
    QUIET,
    REPLY,
    REPLY_ACK,
    REQUEST,
    RESET_DEVICE,
    RING_RESET,
    STATUS,
    VERSION_1,
    WRITE,
    Eventfd,
    FrontEnd,
    Id,
    Memory,
    NonblockingEventfd,
    Notifier,
    Pipe,
    Ring,
    Socketpair,
    config,
    memory_table,
    single_region,
    u64,
    vring_address,
    vring_descriptor,
    vring_state,
    wait_until,
)
from specimens import NO_TYPE, Connect, Diary, Hold, Reverse, ReverseMany, Serve

OFFERED = LOG_ALL | INDIRECT_DESC | EVENT_IDX | PROTOCOL_FEATURES | VERSION_1
#: INFLIGHT_SHMFD, GET_VRING_BASE_INFLIGHT and GET_VRING_BASE_SKIP_DRAIN.
IN_FLIGHT = 1 << 12 | 1 << 20 | 1 << 23
OFFERED_PROTOCOL = (
    MQ
    | LOG_SHMFD
    | REPLY_ACK
    | BACKEND_REQ
    | RESET_DEVICE
    | CONFIGURE_MEM_SLOTS
    | STATUS
    | DEVICE_STATE
    | GPA_ADDRESSES
    | IN_FLIGHT
)


@pytest.fixture
def front(serve: Serve, connect: Connect) -> FrontEnd:
    """Connected to a device that reverses."""
    return connect(serve(Reverse()))


def ready(front: FrontEnd, memory: Memory, features: int = PROTOCOL_FEATURES | VERSION_1, *, size: int = 16) -> Ring:
    """A ring 0 that runs."""
    front.negotiate(features)
    front.share(memory)
    ring = Ring(memory, size=size)
    front.start(ring)
    return ring


def ready_without_bit_30(front: FrontEnd, memory: Memory) -> Ring:
    """The same for a front-end that knows no protocol features: nobody enables it."""
    front.negotiate(VERSION_1)
    front.share(memory)
    ring = Ring(memory)
    front.place(ring)
    front.set_kick(ring)
    return ring


# --- Messages and answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [REQUEST, NEED_REPLY])
@pytest.mark.parametrize(
    ("request_id", "payload", "answer"),
    [
        (Id.GET_FEATURES, b"", u64(OFFERED | 1 << 5)),
        (Id.GET_PROTOCOL_FEATURES, b"", u64(OFFERED_PROTOCOL | CONFIG)),
        (Id.GET_QUEUE_NUM, b"", u64(2)),
        (Id.GET_MAX_MEM_SLOTS, b"", u64(509)),
        (Id.GET_STATUS, b"", u64(0)),
        (Id.GET_VRING_BASE, vring_state(1), vring_state(1, 0)),
        (Id.GET_CONFIG, config(0, bytes(4)), config(0, b"\x03\x00\x44\x33")),
    ],
)
def test_a_request_with_a_reply_is_answered_once_with_the_flags_5(
    serve: Serve, connect: Connect, request_id: Id, payload: bytes, answer: bytes, flags: int
) -> None:
    front = connect(serve(Diary()))
    front.send(request_id, payload, flags=flags)
    reply = front.receive()
    assert (reply.request, reply.flags, reply.payload) == (request_id, REPLY, answer)
    assert front.is_silent()


def test_an_acknowledgement_is_sent_when_it_is_asked_for_before_anything_was_negotiated(front: FrontEnd) -> None:
    front.send(Id.SET_OWNER, flags=NEED_REPLY)
    reply = front.receive()
    assert (reply.request, reply.flags, reply.payload) == (Id.SET_OWNER, REPLY, u64(0))
    front.tell(Id.SET_PROTOCOL_FEATURES, u64(REPLY_ACK))


def test_nothing_is_acknowledged_that_did_not_ask_for_it(front: FrontEnd) -> None:
    front.send(Id.SET_PROTOCOL_FEATURES, u64(REPLY_ACK))
    front.send(Id.SET_OWNER)
    front.send(Id.SET_FEATURES, u64(VERSION_1))
    assert front.is_silent()
    front.send(Id.GET_FEATURES)
    assert front.receive().request == Id.GET_FEATURES


def test_a_device_without_configuration_space_does_not_offer_one(front: FrontEnd) -> None:
    assert front.get_u64(Id.GET_PROTOCOL_FEATURES) == OFFERED_PROTOCOL


def test_messages_in_one_write_are_answered_in_order(front: FrontEnd) -> None:
    header = struct.pack("=III", Id.GET_FEATURES, REQUEST, 0) + struct.pack("=III", Id.GET_QUEUE_NUM, REQUEST, 0)
    front.send_bytes(header * 10)
    assert [front.receive().request for _ in range(20)] == [Id.GET_FEATURES, Id.GET_QUEUE_NUM] * 10


def test_a_message_may_arrive_byte_by_byte(front: FrontEnd) -> None:
    for byte in struct.pack("=IIIQ", Id.SET_FEATURES, NEED_REPLY, 8, VERSION_1):
        front.send_bytes(bytes([byte]))
    assert front.receive().payload == u64(0)


def test_a_device_feature_that_was_not_offered_is_refused_and_the_connection_goes_on(front: FrontEnd) -> None:
    assert front.ask(Id.SET_FEATURES, u64(VERSION_1 | 1 << 7)) != 0
    assert front.ask(Id.SET_PROTOCOL_FEATURES, u64(REPLY_ACK | 1 << 14)) != 0
    assert front.ask(Id.SET_FEATURES, u64(VERSION_1)) == 0


def test_transport_features_that_front_ends_take_unasked_are_accepted(front: FrontEnd) -> None:
    front.tell(Id.SET_FEATURES, u64(INDIRECT_DESC | EVENT_IDX | VERSION_1 | PROTOCOL_FEATURES))
    front.tell(Id.SET_FEATURES, u64(RING_RESET | VERSION_1 | PROTOCOL_FEATURES))


# --- The states of a ring ---------------------------------------------------------------------------------------------


def test_a_request_is_answered(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory)
    assert front.exchange(ring, b"hello", 64) == b"olleh"


def test_each_of_many_queues_is_served(serve: Serve, connect: Connect, memory: Memory) -> None:
    front = connect(serve(ReverseMany()))
    assert front.get_u64(Id.GET_QUEUE_NUM) == 4
    front.negotiate()
    front.share(memory)
    rings = [Ring(memory, index, size=4 << index) for index in range(4)]
    for ring in rings:
        front.start(ring)
    for ring in rings * 3:
        assert front.exchange(ring, b"abc", 64) == bytes([ring.index]) + b"cba"


@pytest.mark.parametrize("size", [1, 2, 32768])
def test_a_ring_works_at_the_ends_of_what_its_size_may_be(serve: Serve, connect: Connect, size: int) -> None:
    front = connect(serve(Reverse()))
    with Memory(4 << 20) as memory:
        ring = ready(front, memory, size=size)
        for number in range(5):
            assert front.exchange(ring, b"", 8) == b""
            if size > 1:
                assert front.exchange(ring, b"%d" % number, 8) == b"%d" % number


Step = Callable[[FrontEnd, Memory, Ring], None]

STEPS: dict[str, Step] = {
    "memory": lambda front, memory, ring: front.share(memory),
    "num": lambda front, memory, ring: front.tell(Id.SET_VRING_NUM, vring_state(ring.index, ring.size)),
    "addr": lambda front, memory, ring: front.tell(Id.SET_VRING_ADDR, ring.address_payload()),
    "call": lambda front, memory, ring: front.tell(Id.SET_VRING_CALL, vring_descriptor(0, with_descriptor=False)),
    "kick": lambda front, memory, ring: front.set_kick(ring),
    "enable": lambda front, memory, ring: front.enable(ring),
}


def test_a_ring_can_be_set_up_in_any_order(serve: Serve) -> None:
    path = serve(Reverse())
    for order in itertools.permutations(STEPS):
        with FrontEnd(path) as front, Memory(1 << 16) as memory:
            front.negotiate()
            ring = Ring(memory, size=8)
            for step in order:
                STEPS[step](front, memory, ring)
            assert front.exchange(ring, b"order", 16) == b"redro", order


@pytest.mark.parametrize("order", list(itertools.permutations(["base", "num", "addr", "kick"])), ids="-".join)
def test_a_base_counts_wherever_it_comes_in_the_set_up(front: FrontEnd, memory: Memory, order: tuple[str, ...]) -> None:
    front.negotiate()
    front.share(memory)
    ring = Ring(memory, size=8)
    ring.clear(7)
    steps = STEPS | {"base": lambda front, memory, ring: front.tell(Id.SET_VRING_BASE, vring_state(0, 7))}
    for step in order:
        steps[step](front, memory, ring)
    front.enable(ring)
    assert front.exchange(ring, b"base", 16) == b"esab"
    assert front.stop(ring) == 8


def test_what_was_available_before_the_ring_started_needs_no_kick(front: FrontEnd, memory: Memory) -> None:
    front.negotiate()
    front.share(memory)
    ring = Ring(memory)
    chain = ring.add([b"early"], [16])
    front.start(ring)
    [(head, length)] = ring.wait()
    assert (head, chain.written(length)) == (chain.head, b"ylrae")


def test_a_disabled_ring_is_left_alone_until_it_is_enabled(front: FrontEnd, memory: Memory) -> None:
    front.negotiate()
    front.share(memory)
    ring = Ring(memory)
    front.place(ring)
    front.set_kick(ring)
    chain = ring.add([b"patience"], [16])
    front.kick(ring)
    with pytest.raises(AssertionError, match="not within"):
        ring.wait(timeout=QUIET)
    front.enable(ring)
    [(_, length)] = ring.wait()
    assert chain.written(length) == b"ecneitap"


def test_a_ring_that_was_disabled_goes_on_where_it_was(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory)
    assert front.exchange(ring, b"one", 8) == b"eno"
    front.enable(ring, on=False)
    ring.add([b"two"], [8])
    front.kick(ring)
    assert front.get_u64(Id.GET_FEATURES) == OFFERED
    assert ring.take() == []
    front.enable(ring)
    assert len(ring.wait()) == 1


def test_an_enable_that_is_neither_0_nor_1_is_refused(front: FrontEnd) -> None:
    assert front.ask(Id.SET_VRING_ENABLE, vring_state(0, 2)) != 0


def test_features_without_bit_30_enable_every_ring(front: FrontEnd, memory: Memory) -> None:
    ring = ready_without_bit_30(front, memory)
    assert front.exchange(ring, b"abc", 8) == b"cba"


def test_a_second_set_features_without_bit_30_enables_the_rings(front: FrontEnd, memory: Memory) -> None:
    # User-Mode Linux's balloon: the driver's validate() has the features finalized twice.
    front.negotiate(PROTOCOL_FEATURES | VERSION_1)
    front.tell(Id.SET_FEATURES, u64(VERSION_1))
    front.share(memory)
    ring = Ring(memory)
    front.place(ring)
    front.set_kick(ring)
    assert front.exchange(ring, b"abc", 8) == b"cba"


def test_features_with_bit_30_leave_running_rings_enabled(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory)
    front.tell(Id.SET_FEATURES, u64(PROTOCOL_FEATURES | VERSION_1))
    assert front.exchange(ring, b"abc", 8) == b"cba"


def test_get_features_is_a_quiesce_point_for_a_front_end_without_bit_30(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    device = Hold()
    front = connect(serve(device))
    ring = ready_without_bit_30(front, memory)
    ring.add([], [8])
    front.kick(ring)
    request = device.next()

    # Nothing is answered while the request may still be written to...
    front.send(Id.GET_FEATURES)
    assert front.is_silent()
    request.complete()
    assert front.reply_to(Id.GET_FEATURES) == u64(OFFERED)
    assert len(ring.take()) == 1

    # ... and afterwards the driver's memory is not touched, whatever is in it.
    memory.write(memory.guest, b"\xff" * 8192)
    front.tell(Id.SET_OWNER)
    assert memory.read(memory.guest, 8192) == b"\xff" * 8192


def test_what_is_completed_after_a_quiesce_point_does_not_touch_the_driver_s_memory(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    device = Hold()
    front = connect(serve(device))
    ring = ready_without_bit_30(front, memory)
    ring.add([], [8])
    front.kick(ring)
    request = device.next()
    # The answer comes although the device holds the request: the guest waits with a lock held.
    front.get_u64(Id.GET_FEATURES)
    memory.write(memory.guest, b"\xff" * memory.size)
    request.complete()
    assert memory.read(memory.guest, memory.size) == b"\xff" * memory.size


def test_a_ring_goes_on_with_the_next_kick_after_a_quiesce_point(front: FrontEnd, memory: Memory) -> None:
    ring = ready_without_bit_30(front, memory)
    assert front.exchange(ring, b"abc", 8) == b"cba"
    front.get_u64(Id.GET_FEATURES)
    assert front.exchange(ring, b"def", 8) == b"fed"


# --- Stopping and starting again --------------------------------------------------------------------------------------


def test_get_vring_base_answers_after_requests_in_flight_are_done(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    device = Hold()
    front = connect(serve(device))
    ring = ready(front, memory)
    for _ in range(3):
        ring.add([], [8])
    front.kick(ring)
    first, second, third = device.next(), device.next(), device.next()
    front.send(Id.GET_VRING_BASE, vring_state(0))
    first.complete()
    third.complete()
    assert front.is_silent()
    second.complete()
    assert front.reply_to(Id.GET_VRING_BASE) == vring_state(0, 3)
    # All of them were published before the answer.
    assert len(ring.take()) == 3


def test_nothing_is_taken_from_a_ring_that_is_being_stopped(serve: Serve, connect: Connect, memory: Memory) -> None:
    class Stopping(Hold, device_id=NO_TYPE):
        stops = 0

        def on_queue_stop(self, queue: vu.DeviceQueue) -> None:
            self.stops += 1

    device = Stopping()
    front = connect(serve(device))
    ring = ready(front, memory)
    ring.add([], [8])
    front.kick(ring)
    request = device.next()
    front.send(Id.GET_VRING_BASE, vring_state(0))
    wait_until(lambda: device.stops == 1, "the ring is being stopped")
    ring.add([], [8])
    front.kick(ring)
    assert front.is_silent()
    request.complete()
    assert front.reply_to(Id.GET_VRING_BASE) == vring_state(0, 1)
    assert device.held == []


def test_other_queues_are_served_while_one_is_being_stopped(serve: Serve, connect: Connect, memory: Memory) -> None:
    class Mixed(vu.Device, device_id=NO_TYPE):
        slowq = vu.Queue()
        fastq = vu.Queue()
        slow: vu.Request

        @slowq.handler
        def keep(self, request: vu.Request) -> None:
            self.slow = request.detach()

        @fastq.handler
        def reverse(self, request: vu.Request) -> None:
            request.write(request.read()[::-1])

    device = Mixed()
    front = connect(serve(device))
    slow = ready(front, memory)
    fast = Ring(memory, 1)
    front.start(fast)
    slow.add([], [8])
    front.kick(slow)
    wait_until(lambda: hasattr(device, "slow"), "the slow request arrives")
    front.send(Id.GET_VRING_BASE, vring_state(0))
    assert front.exchange(fast, b"abc", 8) == b"cba"
    device.slow.complete()
    assert front.reply_to(Id.GET_VRING_BASE) == vring_state(0, 1)


def test_a_ring_that_never_ran_answers_the_base_that_was_set(front: FrontEnd) -> None:
    front.tell(Id.SET_VRING_BASE, vring_state(0, 4711))
    assert front.get(Id.GET_VRING_BASE, vring_state(0)) == vring_state(0, 4711)


@pytest.mark.parametrize("base", [0, 1, 15, 16, 65533, 65535])
def test_a_ring_starts_at_any_base_and_stops_there_again(front: FrontEnd, memory: Memory, base: int) -> None:
    front.negotiate()
    front.share(memory)
    ring = Ring(memory, size=16)
    ring.clear(base)
    front.start(ring, base)
    for number in range(5):
        assert front.exchange(ring, b"%d!" % number, 8) == b"!%d" % number
    assert front.stop(ring) == (base + 5) % 65536


def test_a_stopped_ring_starts_again_with_another_kick_descriptor(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory)
    front.exchange(ring, b"abc", 8)
    base = front.stop(ring)
    ring.add([b"xyz"], [8])
    front.kick(ring)
    assert front.get_u64(Id.GET_QUEUE_NUM) == 1
    assert ring.take() == []
    front.tell(Id.SET_VRING_BASE, vring_state(0, base))
    front.set_kick(ring)
    assert len(ring.wait()) == 1
    assert front.exchange(ring, b"def", 8) == b"fed"


def test_a_running_ring_cannot_be_resized_or_moved_to_another_base(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory)
    assert front.ask(Id.SET_VRING_NUM, vring_state(0, 8)) != 0
    assert front.ask(Id.SET_VRING_BASE, vring_state(0, 3)) != 0
    assert front.exchange(ring, b"abc", 8) == b"cba"


def test_a_running_ring_takes_its_addresses_again_without_losing_its_place(front: FrontEnd, memory: Memory) -> None:
    # QEMU does this when migration begins, to change the flags.
    ring = ready(front, memory)
    assert front.exchange(ring, b"abc", 8) == b"cba"
    front.tell(Id.SET_VRING_ADDR, ring.address_payload())
    assert front.exchange(ring, b"def", 8) == b"fed"


def test_a_driver_that_is_bound_again_sets_up_a_ring_that_was_only_disabled(front: FrontEnd, memory: Memory) -> None:
    # User-Mode Linux: ENABLE 0 and GET_FEATURES are all it says when it takes a ring away; then new memory, base 0.
    ring = ready(front, memory)
    for _ in range(5):
        front.exchange(ring, b"abc", 8)
    front.enable(ring, on=False)
    front.get_u64(Id.GET_FEATURES)
    memory.write(ring.descriptors, b"\xff" * 16 * ring.size)
    memory.write(ring.used, b"\xff" * 64)

    front.tell(Id.SET_FEATURES, u64(PROTOCOL_FEATURES | VERSION_1))
    front.share(memory)
    again = Ring(memory, size=32)
    front.place(again)
    front.set_kick(again)
    front.enable(again)
    assert front.exchange(again, b"def", 8) == b"fed"
    assert memory.read(ring.used, 64) == b"\xff" * 64


def test_disabling_waits_for_requests_in_flight(serve: Serve, connect: Connect, memory: Memory) -> None:
    device = Hold()
    front = connect(serve(device))
    ring = ready(front, memory)
    ring.add([], [8])
    front.kick(ring)
    request = device.next()
    front.send(Id.SET_VRING_ENABLE, vring_state(0, 0), flags=NEED_REPLY)
    assert front.is_silent()
    request.complete()
    assert front.reply_to(Id.SET_VRING_ENABLE) == u64(0)
    assert len(ring.take()) == 1


def test_what_is_completed_after_disabling_is_published_when_the_ring_is_enabled(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    device = Hold()
    front = connect(serve(device))
    ring = ready(front, memory)
    ring.add([], [8])
    front.kick(ring)
    request = device.next()
    # The deadline of the device passes: the guest waits with a lock held.
    front.enable(ring, on=False)
    request.complete()
    assert ring.take() == []
    front.enable(ring)
    assert len(ring.wait()) == 1


def test_a_request_of_a_ring_that_was_set_up_anew_is_revoked(serve: Serve, connect: Connect, memory: Memory) -> None:
    device = Hold()
    front = connect(serve(device))
    ring = ready(front, memory)
    ring.add([], [8])
    front.kick(ring)
    request = device.next()
    front.enable(ring, on=False)
    ring.clear()
    front.place(ring)
    front.set_kick(ring)
    front.enable(ring)
    with pytest.raises(vu.RequestRevoked):
        request.complete()
    assert request.completed
    ring.add([], [8])
    front.kick(ring)
    device.next().complete()
    assert len(ring.wait()) == 1


# --- Notifications ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Eventfd, NonblockingEventfd, Socketpair, Pipe])
def test_a_kick_is_heard_from_every_kind_of_descriptor(
    front: FrontEnd, memory: Memory, kind: Callable[[], Notifier]
) -> None:
    front.negotiate()
    front.share(memory)
    ring = Ring(memory)
    front.place(ring)
    front.set_kick(ring, front.own(kind()))
    front.enable(ring)
    for number in range(3):
        assert front.exchange(ring, b"%d!" % number, 8) == b"!%d" % number


@pytest.mark.parametrize("kind", [Eventfd, NonblockingEventfd, Socketpair])
def test_a_call_is_sent_to_every_kind_of_descriptor(
    front: FrontEnd, memory: Memory, kind: Callable[[], Notifier]
) -> None:
    call = front.own(kind())
    front.negotiate()
    front.share(memory)
    ring = Ring(memory)
    front.tell(Id.SET_VRING_CALL, vring_descriptor(0), [call.peer])
    front.start(ring)
    for _ in range(3):
        front.exchange(ring, b"abc", 8)
        assert call.came()
    assert not call.came(QUIET)


def test_kicks_are_heard_from_an_eventfd_that_is_hardly_ever_read(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory)
    for _ in range(1100):
        front.exchange(ring, b"abc", 8)
    kick = front.own(Eventfd())
    front.set_kick(ring, kick)
    for _ in range(3):
        # As full as it gets: whoever writes more waits until it is read.
        os.eventfd_write(kick.peer, 0xFFFF_FFFF_FFFF_FFFD)
        assert front.exchange(ring, b"abc", 8) == b"cba"


def test_a_ring_without_a_kick_descriptor_is_polled(front: FrontEnd, memory: Memory) -> None:
    front.negotiate()
    front.share(memory)
    ring = Ring(memory)
    front.place(ring)
    front.tell(Id.SET_VRING_KICK, vring_descriptor(0, with_descriptor=False))
    front.enable(ring)
    for _ in range(3):
        chain = ring.add([b"abc"], [8])
        [(_, length)] = ring.wait()
        assert chain.written(length) == b"cba"
    assert front.stop(ring) == 3
    ring.add([b"abc"], [8])
    assert ring.take() == []


def test_a_ring_without_a_call_descriptor_is_served_in_silence(serve: Serve, connect: Connect, memory: Memory) -> None:
    device = Reverse()
    front = connect(serve(device))
    ring = ready(front, memory)
    front.tell(Id.SET_VRING_CALL, vring_descriptor(0, with_descriptor=False))
    assert front.exchange(ring, b"abc", 8) == b"cba"
    assert device.requestq.statistics.calls == 0


def test_a_call_descriptor_may_come_after_the_ring_started_and_be_replaced_while_it_runs(
    front: FrontEnd, memory: Memory
) -> None:
    ring = ready(front, memory)
    first = front.set_call(ring)
    first.came(QUIET)
    front.exchange(ring, b"abc", 8)
    assert first.came()
    second = front.set_call(ring)
    # What the first one said may have been missed: the second is told at once.
    assert second.came()
    front.exchange(ring, b"abc", 8)
    assert second.came()
    assert not first.came(QUIET)


def test_a_kick_descriptor_is_replaced_while_the_ring_runs(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory)
    # A request whose kick is never heard: the replacement makes the device look.
    chain = ring.add([b"abc"], [8])
    front.set_kick(ring)
    [(_, length)] = ring.wait()
    assert chain.written(length) == b"cba"
    assert front.exchange(ring, b"def", 8) == b"fed"


def test_a_kick_without_new_buffers_does_no_harm(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory)
    for _ in range(100):
        front.kick(ring)
    assert front.exchange(ring, b"abc", 8) == b"cba"
    assert ring.used_index == 1


def test_one_kick_is_enough_for_many_requests_and_one_call_answers_a_batch(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    device = Reverse()
    # However slow the handler is: nobody is told of less than a batch.
    device.batch_patience = 60.0
    front = connect(serve(device))
    ring = ready(front, memory, size=256)
    call = front.set_call(ring)
    call.came(QUIET)
    chains = [ring.add([b"%d." % number], [16]) for number in range(100)]
    front.kick(ring)
    entries = ring.wait(100)
    assert [head for head, _ in entries] == [chain.head for chain in chains]
    assert chains[42].written(entries[42][1]) == b".24"
    assert call.came()
    assert device.requestq.statistics.calls < 10


def test_the_driver_is_not_called_when_it_says_so(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory)
    call = front.set_call(ring)
    call.came(QUIET)
    ring.avail_flags = NO_INTERRUPT
    front.exchange(ring, b"abc", 8)
    assert not call.came(QUIET)
    ring.avail_flags = 0
    front.exchange(ring, b"abc", 8)
    assert call.came()


def test_the_driver_is_asked_to_kick_whenever_the_device_is_idle(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory)
    for _ in range(3):
        front.exchange(ring, b"abc", 8)
        wait_until(lambda: ring.used_flags & NO_NOTIFY == 0, "kicks are wanted")


def test_with_event_idx_the_driver_is_called_when_the_used_index_passes_its_event(
    front: FrontEnd, memory: Memory
) -> None:
    ring = ready(front, memory, PROTOCOL_FEATURES | VERSION_1 | EVENT_IDX)
    call = front.set_call(ring)
    # The first decision after a start is always to call.
    ring.used_event = 1000
    front.exchange(ring, b"0", 8)
    assert call.came()
    call.came(QUIET)
    ring.used_event = 3
    for used in (2, 3):
        front.exchange(ring, b"abc", 8)
        assert (ring.used_index, call.came(QUIET)) == (used, False)
    front.exchange(ring, b"abc", 8)
    assert call.came()
    front.exchange(ring, b"abc", 8)
    assert not call.came(QUIET)


def test_with_event_idx_no_interrupt_is_ignored(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory, PROTOCOL_FEATURES | VERSION_1 | EVENT_IDX)
    call = front.set_call(ring)
    ring.avail_flags = NO_INTERRUPT
    for used in range(3):
        ring.used_event = used
        call.came(0)
        front.exchange(ring, b"abc", 8)
        assert call.came()


def device_wants_kick_after(ring: Ring, index: int) -> bool:
    return ring.avail_event == index


def test_with_event_idx_the_device_says_for_which_entry_it_wants_a_kick(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory, PROTOCOL_FEATURES | VERSION_1 | EVENT_IDX)
    for number in range(1, 5):
        front.exchange(ring, b"abc", 8)
        wait_until(partial(device_wants_kick_after, ring, number), "the event index")


def test_error_descriptors_tell_of_a_broken_ring_and_the_others_go_on(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    front = connect(serve(ReverseMany()))
    front.negotiate()
    front.share(memory)
    broken, good = Ring(memory, 0), Ring(memory, 1)
    error = front.set_error(broken)
    good_error = front.set_error(good)
    front.start(broken)
    front.start(good)
    broken.offer(999)
    front.kick(broken)
    assert error.came()
    assert front.exchange(good, b"abc", 8) == b"\x01cba"
    assert not good_error.came(0)
    assert broken.take() == []


def test_a_broken_ring_works_again_after_it_was_set_up_anew(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory)
    error = front.set_error(ring)
    ring.offer(999)
    front.kick(ring)
    assert error.came()
    front.stop(ring)
    ring.clear()
    front.start(ring)
    assert front.exchange(ring, b"abc", 8) == b"cba"


# --- Chains -----------------------------------------------------------------------------------------------------------


def test_a_chain_of_many_pieces_is_one_request(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory)
    chain = ring.add([b"ab", b"c", b"def"], [1, 2, 10])
    front.kick(ring)
    [(_, length)] = ring.wait()
    assert chain.written(length) == b"fedcba"


def test_an_indirect_table_is_followed(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory, PROTOCOL_FEATURES | VERSION_1 | INDIRECT_DESC, size=2)
    # More pieces than the ring has entries: only a table holds them.
    chain = ring.add([b"ab", b"cd", b"ef"], [1, 2, 10], indirect=True)
    front.kick(ring)
    [(_, length)] = ring.wait()
    assert chain.written(length) == b"fedcba"
    assert front.exchange(ring, b"abc", 8, indirect=True) == b"cba"


def test_the_flag_write_of_an_indirect_descriptor_means_nothing(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory, PROTOCOL_FEATURES | VERSION_1 | INDIRECT_DESC)
    room = memory.allocate(8)
    data = memory.put(b"abc")
    table = struct.pack("<QIHHQIHH", data, 3, 1, 1, room, 8, WRITE, 0)
    ring.add_pieces([(memory.put(table), len(table), 4 | WRITE)])
    front.kick(ring)
    assert ring.wait() == [(0, 3)]
    assert memory.read(room, 3) == b"cba"


def test_requests_complete_in_the_order_of_the_device(serve: Serve, connect: Connect, memory: Memory) -> None:
    device = Hold()
    front = connect(serve(device))
    ring = ready(front, memory)
    heads = [ring.add([], [8]).head for _ in range(3)]
    front.kick(ring)
    requests = [device.next() for _ in range(3)]
    for number in (2, 0, 1):
        requests[number].write(bytes(number))
        requests[number].complete()
    assert ring.wait(3) == [(heads[2], 2), (heads[0], 0), (heads[1], 1)]


def test_a_ring_is_used_many_times_over(front: FrontEnd) -> None:
    with Memory(16 << 20) as memory:
        ring = ready(front, memory, size=8)
        for number in range(500):
            assert front.exchange(ring, b"%d" % number, 16)[::-1] == b"%d" % number
        assert ring.used_index == 500


# --- Memory -----------------------------------------------------------------------------------------------------------


def test_a_buffer_may_cross_into_the_next_region(front: FrontEnd) -> None:
    with Memory(1 << 16) as low, Memory(1 << 16, guest=0x4001_0000, user=0x7F00_0000_0000, offset=4096) as high:
        front.negotiate()
        front.share(high, low)
        ring = Ring(low)
        front.start(ring)
        low.write(low.end - 3, b"abc")
        high.write(high.guest, b"def")
        ring.add_pieces([(low.end - 3, 6, 0), (low.end - 16 - 2, 18 + 4, WRITE)])
        front.kick(ring)
        assert ring.wait() == [(0, 6)]
        assert low.read(low.end - 18, 6) == b"fedcba"


def test_user_mode_linux_sends_a_table_with_bytes_to_spare(front: FrontEnd, memory: Memory) -> None:
    # 6.12 and before: one region in 72 bytes.
    front.negotiate()
    front.tell(Id.SET_MEM_TABLE, memory_table(memory.region).ljust(72, b"\0"), [memory.descriptor])
    ring = Ring(memory)
    front.start(ring)
    assert front.exchange(ring, b"abc", 8) == b"cba"


def test_the_memory_table_is_replaced_while_the_ring_runs(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory)
    front.exchange(ring, b"abc", 8)
    with Memory(guest=0x8000_0000, user=0x7F55_0000_0000) as more:
        front.share(memory, more)
        chain = ring.add([b"elsewhere"], [16], memory=more)
        front.kick(ring)
        [(_, length)] = ring.wait()
        assert chain.written(length) == b"erehwesle"
        front.share(memory)
        assert front.exchange(ring, b"def", 8) == b"fed"


def test_regions_are_added_and_removed_while_the_ring_runs(front: FrontEnd, memory: Memory) -> None:
    front.negotiate(protocol=REPLY_ACK | CONFIGURE_MEM_SLOTS)
    front.tell(Id.ADD_MEM_REG, single_region(memory.region), [memory.descriptor])
    ring = Ring(memory)
    front.start(ring)
    for _ in range(3):
        with Memory(guest=0x8000_0000, user=0x7F55_0000_0000) as more:
            front.tell(Id.ADD_MEM_REG, single_region(more.region), [more.descriptor])
            chain = ring.add([b"elsewhere"], [16], memory=more)
            front.kick(ring)
            [(_, length)] = ring.wait()
            assert chain.written(length) == b"erehwesle"
            # The offset is not part of a region's name, and some front-ends send a descriptor.
            front.tell(Id.REM_MEM_REG, single_region(more.describe(offset=4096)), [more.descriptor])
    assert front.exchange(ring, b"def", 8) == b"fed"


def test_a_table_that_takes_the_memory_of_a_running_ring_away_is_refused(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory)
    with Memory(guest=0x8000_0000, user=0x7F55_0000_0000) as other:
        assert front.ask(Id.SET_MEM_TABLE, memory_table(other.region), [other.descriptor]) != 0
    assert front.ask(Id.REM_MEM_REG, single_region(memory.region)) != 0
    assert front.exchange(ring, b"abc", 8) == b"cba"


def test_a_stopped_ring_does_not_hold_its_memory(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory)
    front.stop(ring)
    front.tell(Id.REM_MEM_REG, single_region(memory.region))


def test_a_request_in_flight_keeps_the_memory_that_it_began_with(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    device = Hold()
    front = connect(serve(device))
    front.negotiate()
    with Memory(guest=0x8000_0000, user=0x7F55_0000_0000) as more:
        front.share(memory, more)
        ring = Ring(memory)
        front.start(ring)
        chain = ring.add([b"old"], [8], memory=more)
        front.kick(ring)
        request = device.next()
        front.share(memory)
        request.write(request.read()[::-1])
        request.complete()
        [(_, length)] = ring.wait()
        assert chain.written(length) == b"dlo"


def test_a_ring_moves_to_other_memory_at_the_same_addresses(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory)
    assert front.exchange(ring, b"abc", 8) == b"cba"
    with Memory() as copy:
        copy.write(copy.guest, memory.read(memory.guest, memory.size))
        front.share(copy)
        # The old memory is the front-end's again.
        memory.write(memory.guest, b"\xff" * memory.size)
        copy.allocate(1 << 15)
        ring.memory = copy
        assert front.exchange(ring, b"def", 8) == b"fed"
        assert memory.read(memory.guest, memory.size) == b"\xff" * memory.size


# --- Reset ------------------------------------------------------------------------------------------------------------


def test_reset_device_stops_and_disables_the_rings_and_keeps_the_rest(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    device = Diary()
    front = connect(serve(device))
    ring = ready(front, memory)
    front.exchange(ring, b"abc", 8)
    front.tell(Id.RESET_DEVICE)
    assert ("reset",) in device.entries
    ring.add([b"abc"], [8])
    front.kick(ring)
    front.tell(Id.SET_OWNER)
    assert ring.used_index == 1
    ring.clear()
    front.start(ring)
    assert front.exchange(ring, b"abc", 8) == b"cba"


def test_reset_device_waits_for_requests_in_flight(serve: Serve, connect: Connect, memory: Memory) -> None:
    device = Hold()
    front = connect(serve(device))
    ring = ready(front, memory)
    ring.add([], [8])
    front.kick(ring)
    request = device.next()
    front.send(Id.RESET_DEVICE, flags=NEED_REPLY)
    assert front.is_silent()
    request.complete()
    assert front.reply_to(Id.RESET_DEVICE) == u64(0)


def test_status_is_kept_and_zero_resets_the_device(serve: Serve, connect: Connect) -> None:
    device = Diary()
    front = connect(serve(device))
    for status in (1, 3, 0xB, 0xF):
        front.tell(Id.SET_STATUS, u64(status))
        assert front.get_u64(Id.GET_STATUS) == status
    assert ("reset",) not in device.entries
    front.tell(Id.SET_STATUS, u64(0))
    assert ("reset",) in device.entries
    assert front.get_u64(Id.GET_STATUS) == 0


def test_reset_owner_disables_the_rings_and_forgets_nothing(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory)
    front.tell(Id.RESET_OWNER)
    chain = ring.add([b"abc"], [8])
    front.kick(ring)
    front.get(Id.GET_FEATURES)
    assert ring.take() == []
    front.enable(ring)
    [(_, length)] = ring.wait()
    assert chain.written(length) == b"cba"


def test_reset_owner_is_answered_when_requests_in_flight_are_done(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    device = Hold()
    front = connect(serve(device))
    ring = ready(front, memory)
    ring.add([b"abc"], [8])
    front.kick(ring)
    request = device.next()
    front.send(Id.RESET_OWNER, flags=NEED_REPLY)
    assert front.is_silent()
    request.complete()
    assert front.reply_to(Id.RESET_OWNER) == u64(0)
    assert len(ring.take()) == 1


# --- Reconnection -----------------------------------------------------------------------------------------------------


def leave_at_once(front: FrontEnd, memory: Memory) -> None:
    pass


def leave_inside_a_header(front: FrontEnd, memory: Memory) -> None:
    front.send_bytes(b"\x01\x00")


def leave_inside_a_payload(front: FrontEnd, memory: Memory) -> None:
    front.send_bytes(struct.pack("=III", Id.SET_FEATURES, REQUEST, 8) + b"\0\0")


def leave_after_the_features(front: FrontEnd, memory: Memory) -> None:
    front.negotiate()


def leave_with_half_a_ring(front: FrontEnd, memory: Memory) -> None:
    front.negotiate(VERSION_1)
    front.share(memory)
    front.set_kick(Ring(memory))


def leave_with_a_running_ring(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory)
    front.exchange(ring, b"abc", 8)


def leave_with_work_to_do(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory, size=256)
    for _ in range(100):
        ring.add([b"abc"], [8])
    front.kick(ring)


def leave_with_a_broken_ring(front: FrontEnd, memory: Memory) -> None:
    ring = ready(front, memory)
    error = front.set_error(ring)
    ring.offer(999)
    front.kick(ring)
    assert error.came()


def leave_with_a_polled_ring(front: FrontEnd, memory: Memory) -> None:
    front.negotiate(VERSION_1)
    front.share(memory)
    front.place(Ring(memory))
    front.tell(Id.SET_VRING_KICK, vring_descriptor(0, with_descriptor=False))


def leave_without_reading_the_answer(front: FrontEnd, memory: Memory) -> None:
    front.send(Id.GET_FEATURES)
    front.send(Id.GET_QUEUE_NUM)


def leave_with_a_channel(front: FrontEnd, memory: Memory) -> None:
    front.open_backend_channel()
    ready(front, memory)


@pytest.mark.parametrize(
    "leave",
    [
        leave_at_once,
        leave_inside_a_header,
        leave_inside_a_payload,
        leave_after_the_features,
        leave_with_half_a_ring,
        leave_with_a_running_ring,
        leave_with_work_to_do,
        leave_with_a_broken_ring,
        leave_with_a_polled_ring,
        leave_without_reading_the_answer,
        leave_with_a_channel,
    ],
)
def test_the_next_front_end_is_served_whenever_one_leaves(
    serve: Serve, leave: Callable[[FrontEnd, Memory], None]
) -> None:
    path = serve(Reverse())
    for _ in range(3):
        with FrontEnd(path) as front, Memory() as memory:
            leave(front, memory)
    with FrontEnd(path) as front, Memory() as memory:
        # Nothing that the last one configured is left: the base of queue 0 is 0 again.
        assert front.get(Id.GET_VRING_BASE, vring_state(0)) == vring_state(0, 0)
        ring = ready(front, memory)
        assert front.exchange(ring, b"abc", 8) == b"cba"


def test_requests_in_flight_are_finished_before_the_next_front_end_is_served(
    serve: Serve, connect: Connect, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vhost_user._runtime.PATIENCE", 1000.0)
    device = Hold()
    path = serve(device)
    front = connect(path)
    ring = ready(front, memory)
    ring.add([], [8])
    front.kick(ring)
    request = device.next()
    front.close()
    after = connect(path)
    after.send(Id.GET_FEATURES)
    assert after.is_silent()
    request.complete()
    assert after.reply_to(Id.GET_FEATURES) == u64(OFFERED)
    # The driver's memory is still there, and its request is done.
    assert len(ring.take()) == 1


def test_the_process_is_level_after_200_front_ends(serve: Serve, memory: Memory) -> None:
    path = serve(Reverse())
    before = None
    for number in range(200):
        with FrontEnd(path) as front:
            ring = Ring(memory)
            memory.write(memory.guest, bytes(1 << 16))
            front.negotiate()
            front.share(memory)
            front.set_call(ring)
            front.set_error(ring)
            front.open_backend_channel()
            front.start(ring)
            assert front.exchange(ring, b"abc", 8) == b"cba"
        memory._free = memory.guest
        if number == 10:
            before = len(os.listdir("/proc/self/fd"))
    with FrontEnd(path) as front:
        front.get_u64(Id.GET_FEATURES)
        assert before is not None
        wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before + 2, "descriptors are closed")


# --- Kinds of addresses -----------------------------------------------------------------------------------------------


def test_with_gpa_addresses_rings_are_at_guest_addresses(front: FrontEnd) -> None:
    with Memory(guest=0x4000_0000, user=0x4000_0000) as low, Memory(guest=0x8000_0000, user=0x8000_0000) as high:
        front.negotiate(protocol=REPLY_ACK | GPA_ADDRESSES)
        front.share(low, high)
        ring = Ring(high)
        front.place(ring)
        front.tell(Id.SET_VRING_ADDR, vring_address(0, ring.descriptors, ring.used, ring.avail))
        front.set_kick(ring)
        front.enable(ring)
        assert front.exchange(ring, b"gpa", 3) == b"apg"
