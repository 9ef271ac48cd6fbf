"""Rings of legacy drivers on big-endian machines. vhost-user specification, VHOST_USER_SET_VRING_ENDIAN."""

from __future__ import annotations

import struct

import pytest

import vhost_user as vu
from raw import CROSS_ENDIAN, MQ, PROTOCOL_FEATURES, REPLY_ACK, VERSION_1, FrontEnd, Id, Memory, Ring, vring_state
from specimens import NO_TYPE, Connect, Reverse, ReverseMany, Serve

LITTLE, BIG = 0, 1
EVENT_IDX = vu.TransportFeature.EVENT_IDX
INDIRECT = vu.TransportFeature.INDIRECT_DESC
IN_ORDER = vu.TransportFeature.IN_ORDER
PACKED = vu.TransportFeature.RING_PACKED
INFLIGHT = vu.ProtocolFeature.INFLIGHT_SHMFD


class Adder(vu.Device, device_id=NO_TYPE):
    """Adds two numbers of 32 bits, in the byte order of the driver; its configuration is in that order, too."""

    cross_endian = True
    operands = vu.Queue()
    level = vu.config.u32(0)

    def on_queue_start(self, queue: vu.DeviceQueue) -> None:
        self.level = int.from_bytes((7).to_bytes(4, queue.byteorder), "little")

    @operands.handler
    def add(self, request: vu.Request) -> None:
        order = self.queues[request.queue].byteorder
        first, second = (int.from_bytes(request.read(4), order) for _ in range(2))
        request.write((first + second).to_bytes(4, order))


def opted_in(device: vu.Device) -> vu.Device:
    device.cross_endian = True
    return device


def legacy(connect: Connect, serve: Serve, device: vu.Device, features: int = 0) -> FrontEnd:
    """A raw front-end that has negotiated CROSS_ENDIAN, and no VERSION_1."""
    front = connect(serve(opted_in(device)))
    front.negotiate(PROTOCOL_FEATURES | features, REPLY_ACK | MQ | CROSS_ENDIAN)
    return front


def start(front: FrontEnd, ring: Ring, order: int) -> None:
    front.tell(Id.SET_VRING_ENDIAN, vring_state(ring.index, order))
    front.start(ring)


def test_a_byte_order_is_offered_by_a_device_that_asks_for_it(serve: Serve) -> None:
    with vu.Frontend.connect(serve(Reverse())) as frontend:
        assert not frontend.negotiate().offered_protocol & vu.ProtocolFeature.CROSS_ENDIAN
    with vu.Frontend.connect(serve(opted_in(Reverse()))) as frontend:
        assert frontend.negotiate().protocol & vu.ProtocolFeature.CROSS_ENDIAN


@pytest.mark.parametrize("features", [0, EVENT_IDX], ids=["flags", "event_idx"])
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_a_big_endian_ring_works(serve: Serve, connect: Connect, memory: Memory, features: int, indirect: bool) -> None:
    device = ReverseMany()
    front = legacy(connect, serve, device, int(features | INDIRECT))
    front.share(memory)
    ring = Ring(memory, 2, order=">")
    start(front, ring, BIG)
    assert device.queues[2].byteorder == "big"
    for number in range(40):
        word = b"%d!" % number
        assert front.exchange(ring, word, 9, indirect=indirect) == b"\x02" + word[::-1]
    assert front.stop(ring) == 40


def test_each_queue_has_its_own_order(serve: Serve, connect: Connect, memory: Memory) -> None:
    device = ReverseMany()
    front = legacy(connect, serve, device)
    front.share(memory)
    for index, (order, format_) in enumerate([(BIG, ">"), (LITTLE, "<"), (BIG, ">")]):
        ring = Ring(memory, index, order=format_)
        start(front, ring, order)
        assert front.exchange(ring, b"ab", 9) == bytes([index]) + b"ba"
    assert [queue.byteorder for queue in device.queues] == ["big", "little", "big", "little"]


def test_the_order_stays_until_it_is_changed_or_the_front_end_is_gone(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    path = serve(opted_in(Reverse()))

    def again() -> FrontEnd:
        front = connect(path)
        front.negotiate(PROTOCOL_FEATURES, REPLY_ACK | MQ | CROSS_ENDIAN)
        front.share(memory)
        return front

    front = again()
    start(front, Ring(memory, order=">"), BIG)
    for order, format_ in [(None, ">"), (LITTLE, "<")]:
        front.stop(ring=Ring(memory))
        if order is not None:
            front.tell(Id.SET_VRING_ENDIAN, vring_state(0, order))
        ring = Ring(memory, order=format_)
        front.start(ring)
        assert front.exchange(ring, b"ab", 9) == b"ba"
    front.stop(ring)
    front.tell(Id.SET_VRING_ENDIAN, vring_state(0, BIG))
    front.close()
    front, ring = again(), Ring(memory)
    front.start(ring)
    assert front.exchange(ring, b"ab", 9) == b"ba"


@pytest.mark.parametrize(
    ("queue", "order"), [(0, 2), (0, 0xFFFF_FFFF), (1, BIG), (0xFFFF_FFFF, BIG)], ids=["2", "-1", "queue 1", "queue -1"]
)
def test_an_order_that_is_none_is_refused_and_changes_nothing(
    serve: Serve, connect: Connect, memory: Memory, queue: int, order: int
) -> None:
    front = legacy(connect, serve, Reverse())
    front.share(memory)
    assert front.ask(Id.SET_VRING_ENDIAN, vring_state(queue, order)) != 0
    ring = Ring(memory)
    front.start(ring)
    assert front.exchange(ring, b"ab", 9) == b"ba"


def test_the_order_of_a_running_ring_cannot_change(serve: Serve, connect: Connect, memory: Memory) -> None:
    front = legacy(connect, serve, Reverse())
    front.share(memory)
    ring = Ring(memory, order=">")
    start(front, ring, BIG)
    for order in (LITTLE, BIG):
        assert front.ask(Id.SET_VRING_ENDIAN, vring_state(0, order)) != 0
    # Nor by what would make it little-endian.
    assert front.ask(Id.SET_FEATURES, struct.pack("=Q", PROTOCOL_FEATURES | VERSION_1)) != 0
    assert front.exchange(ring, b"ab", 9) == b"ba"


@pytest.mark.parametrize("features", [VERSION_1, int(PACKED)], ids=["VERSION_1", "RING_PACKED"])
def test_only_a_legacy_driver_has_a_byte_order(serve: Serve, connect: Connect, memory: Memory, features: int) -> None:
    device = opted_in(Reverse())
    device.packed_rings = True
    front = connect(serve(device))
    assert front.ask(Id.SET_VRING_ENDIAN, vring_state(0, BIG)) != 0, "before SET_FEATURES"
    front.negotiate(PROTOCOL_FEATURES | features, REPLY_ACK | MQ | CROSS_ENDIAN)
    for order in (LITTLE, BIG):
        assert front.ask(Id.SET_VRING_ENDIAN, vring_state(0, order)) != 0
    # What a legacy driver said is forgotten when it turns out to be none.
    front.tell(Id.SET_FEATURES, struct.pack("=Q", PROTOCOL_FEATURES))
    front.tell(Id.SET_VRING_ENDIAN, vring_state(0, BIG))
    front.tell(Id.SET_FEATURES, struct.pack("=Q", PROTOCOL_FEATURES | VERSION_1))
    assert device.queues[0].byteorder == "little"
    front.share(memory)
    ring = Ring(memory)
    front.start(ring)
    assert front.exchange(ring, b"ab", 9) == b"ba"


@pytest.mark.parametrize("features", [0, EVENT_IDX | INDIRECT, EVENT_IDX | IN_ORDER], ids=str)
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_both_ends_speak_big_endian(serve: Serve, features: int, indirect: bool) -> None:
    device = opted_in(Reverse())
    device.in_order = True
    with vu.Frontend.connect(serve(device)) as frontend:
        frontend.negotiate(int(features))
        queue = frontend.queue(0, 8, indirect=indirect, byteorder="big")
        for number in range(40):
            word = b"%d!" % number
            assert queue.request([word[:1], word[1:]], [1, 9]) == word[::-1]
        assert queue.stop() == 40
        queue.start()
        assert queue.request(b"once more", 9) == b"erom ecno"


def test_a_device_converts_what_it_sends_and_its_configuration(serve: Serve) -> None:
    with vu.Frontend.connect(serve(Adder())) as frontend:
        for byteorder in ("big", "little"):
            queue = frontend.negotiate(0).queue(0, byteorder=byteorder)
            operands = [number.to_bytes(4, byteorder) for number in (0x01020304, 0x10)]
            assert int.from_bytes(queue.request(operands, 4), byteorder) == 0x01020314
            assert int.from_bytes(frontend.read_config(4), byteorder) == 7
            queue.stop()
            frontend.reconnect()


def test_requests_of_a_big_endian_driver_outlive_the_device(serve: Serve) -> None:
    with vu.Frontend.connect(serve(opted_in(Reverse()))) as frontend:
        frontend.negotiate(0)
        frontend.set_inflight(frontend.get_inflight(1))
        queue = frontend.queue(0, byteorder="big")
        assert queue.request(b"ab", 9) == b"ba"
        frontend.reconnect(keep_queues=True)
        assert queue.request(b"cd", 9) == b"dc"


def test_a_big_endian_queue_needs_a_legacy_driver_and_a_device_that_takes_it(serve: Serve) -> None:
    with vu.Frontend.connect(serve(opted_in(Reverse()))) as frontend:
        with pytest.raises(vu.StateError, match="only legacy drivers have such rings"):
            frontend.negotiate().queue(0, byteorder="big")
        with pytest.raises(ValueError, match="not 'middle'"):
            frontend.queue(0, byteorder="middle")  # type: ignore[arg-type]
        assert frontend.queue(0).request(b"ab", 9) == b"ba"
    with (
        vu.Frontend.connect(serve(Reverse())) as frontend,
        pytest.raises(vu.StateError, match="CROSS_ENDIAN"),
    ):
        frontend.negotiate(0).queue(0, byteorder="big")
