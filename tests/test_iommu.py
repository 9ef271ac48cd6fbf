"""Behind an IOMMU: misses, updates and invalidations, seen from a front-end that does exactly what it is told.

vhost-user specification, "IOMMU support".
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

import vhost_user as vu
from raw import (
    ACCESS_PLATFORM,
    BACKEND_REQ,
    INDIRECT_DESC,
    LOG_ALL,
    LOG_SHMFD,
    MQ,
    NEED_REPLY,
    PROTOCOL_FEATURES,
    REPLY,
    REPLY_ACK,
    REQUEST,
    VERSION_1,
    WRITE,
    Channel,
    FrontEnd,
    Id,
    Log,
    Memory,
    Ring,
    iotlb,
    u64,
    vring_address,
    wait_until,
)
from specimens import Connect, Hold, Reverse, ReverseMany, Serve

FEATURES = PROTOCOL_FEATURES | VERSION_1 | ACCESS_PLATFORM | INDIRECT_DESC
PROTOCOL = REPLY_ACK | BACKEND_REQ | MQ

PAGE = 4096
#: What an I/O address has more than the guest address of the same byte.
IOVA = 0xFF00_0000_0000

READ, WRITE_ONLY, BOTH = 1, 2, 3
MISS, UPDATE, INVALIDATE, ACCESS_FAIL = 1, 2, 3, 4

#: Of BACKEND_IOTLB_MSG.
BACKEND_IOTLB = 1

EVERYTHING = (0, 0)


class MappedRing(Ring):
    """A ring whose driver uses I/O addresses."""

    def set_descriptor(self, at: int, address: int, length: int, flags: int = 0, next: int = 0) -> None:  # noqa: A002
        super().set_descriptor(at, address + IOVA, length, flags, next)

    def address_payload(self, **other: int) -> bytes:
        return vring_address(self.index, self.descriptors + IOVA, self.used + IOVA, self.avail + IOVA, **other)

    @property
    def pages(self) -> list[int]:
        """The guest addresses of the pages that it has."""
        parts = [(self.descriptors, 16 * self.size), (self.avail, 6 + 2 * self.size), (self.used, 6 + 8 * self.size)]
        return sorted({page for start, size in parts for page in pages(start, size)})


def pages(address: int, size: int) -> Sequence[int]:
    return range(address // PAGE * PAGE, address + size, PAGE)


@dataclass
class Iommu:
    """The front-end's IOMMU, which says something only when it is told to."""

    front: FrontEnd
    memory: Memory
    channel: Channel

    def message(self, payload: bytes) -> int:
        """An IOTLB_MSG, which is always answered. Returns the answer."""
        self.front.send(Id.IOTLB_MSG, payload)
        return self.answer()

    def answer(self) -> int:
        (status,) = struct.unpack("=Q", self.front.reply_to(Id.IOTLB_MSG))
        return int(status)

    def map(self, guest: int, size: int = PAGE, permission: int = BOTH) -> None:
        update = iotlb(UPDATE, guest + IOVA, size, self.memory.to_user(guest), permission)
        assert self.message(update) == 0

    def map_ring(self, ring: MappedRing) -> None:
        for page in ring.pages:
            self.map(page)

    def invalidate(self, guest: int, size: int = PAGE) -> None:
        assert self.message(iotlb(INVALIDATE, guest + IOVA, size)) == 0

    def miss(self) -> tuple[int, int]:
        """The next miss: the guest address of its page, and the permission that is needed. It is not answered."""
        message = self.channel.receive()
        iova, _size, _user, permission, kind = struct.unpack("=QQQBB6x", message.payload)
        assert (message.request, message.flags, kind) == (BACKEND_IOTLB, NEED_REPLY, MISS)
        return (iova - IOVA) // PAGE * PAGE, permission

    def agree(self, status: int = 0) -> None:
        self.channel.send(BACKEND_IOTLB, u64(status), flags=REPLY)

    def serve(self, permission: int = BOTH) -> tuple[int, int]:
        """Answer the next miss as QEMU does: the update first."""
        page, needed = self.miss()
        self.map(page, permission=permission)
        self.agree()
        return page, needed


@dataclass
class Rig:
    device: vu.Device
    front: FrontEnd
    memory: Memory
    iommu: Iommu

    def ring(self, index: int = 0, *, mapped: bool = True) -> MappedRing:
        """A ring that runs, on pages of its own."""
        self.memory.allocate(0, PAGE)
        ring = MappedRing(self.memory, index)
        self.memory.allocate(0, PAGE)
        if mapped:
            self.iommu.map_ring(ring)
        self.front.start(ring)
        return ring

    def page(self, data: bytes = b"") -> int:
        """The guest address of a page that nobody has yet."""
        address = self.memory.allocate(PAGE, PAGE)
        self.memory.write(address, data)
        return address

    def request(self, ring: MappedRing, data: bytes) -> tuple[int, int]:
        """Offer a request that has a page for what it says and one for the answer. Returns those."""
        source, room = self.page(data), self.page()
        ring.add_pieces([(source, len(data), 0), (room, len(data) + 1, WRITE)])
        self.front.kick(ring)
        return source, room


@pytest.fixture
def rig(serve: Serve, connect: Connect, memory: Memory) -> Rig:
    """A device that reverses, behind an IOMMU that knows nothing yet."""
    return set_up(ReverseMany(), serve, connect, memory)


def set_up(
    device: vu.Device,
    serve: Serve,
    connect: Connect,
    memory: Memory,
    features: int = FEATURES,
    protocol: int = PROTOCOL,
) -> Rig:
    device.iommu = True
    front = connect(serve(device))
    front.negotiate(features, protocol)
    channel = front.open_backend_channel()
    front.share(memory)
    return Rig(device, front, memory, Iommu(front, memory, channel))


def test_only_a_device_that_asks_for_it_offers_access_platform(serve: Serve, connect: Connect) -> None:
    assert not connect(serve(Reverse())).get_u64(Id.GET_FEATURES) & ACCESS_PLATFORM
    device = Reverse()
    device.iommu = True
    assert connect(serve(device)).get_u64(Id.GET_FEATURES) & ACCESS_PLATFORM


def test_everything_is_asked_for_once_with_what_it_is_for(rig: Rig) -> None:
    ring = rig.ring(mapped=False)
    asked = [rig.iommu.serve() for _ in ring.pages]
    assert sorted(page for page, _ in asked) == ring.pages
    source, room = rig.request(ring, b"hello")
    assert rig.iommu.serve() == (source, READ)
    assert rig.iommu.serve() == (room, WRITE_ONLY)
    assert ring.wait() == [(0, 6)]
    assert rig.memory.read(room, 6) == b"\0olleh"
    assert rig.iommu.channel.is_silent()
    assert rig.device.queues[0].statistics.iotlb_misses == len(ring.pages) + 2


def test_what_is_mapped_in_advance_is_not_asked_for(rig: Rig) -> None:
    rig.iommu.map(rig.memory.guest, rig.memory.size)
    ring = rig.ring(mapped=False)
    _, room = rig.request(ring, b"hello")
    assert ring.wait() == [(0, 6)]
    assert rig.memory.read(room, 6) == b"\0olleh"
    assert rig.iommu.channel.is_silent()


def test_a_miss_stops_nobody_else_and_keeps_the_order(rig: Rig) -> None:
    waiting, other = rig.ring(0), rig.ring(1)
    for text in (b"first", b"second"):
        rig.request(waiting, text)
    first, needed = rig.iommu.miss()
    assert needed == READ
    _, room = rig.request(other, b"other")
    for _ in range(2):
        page, _ = rig.iommu.miss()
        rig.iommu.map(page)
    assert other.wait() == [(0, 6)]
    assert rig.memory.read(room, 6) == b"\1rehto"
    assert waiting.take() == []
    rig.iommu.map(first)
    for _ in range(3):
        rig.iommu.agree()
    for _ in range(3):
        rig.iommu.serve()
    assert waiting.wait(2) == [(0, 6), (2, 7)]


def test_indirect_tables_are_at_io_addresses_too(rig: Rig) -> None:
    ring = rig.ring()
    source, room, table = rig.page(b"abc"), rig.page(), rig.page()
    entries = [(source + IOVA, 3, 1, 1), (room + IOVA, 4, WRITE, 0)]
    rig.memory.write(table, b"".join(struct.pack("<QIHH", *entry) for entry in entries))
    ring.add_pieces([(table, 32, 4)])
    rig.front.kick(ring)
    assert [rig.iommu.serve() for _ in range(3)] == [(table, READ), (source, READ), (room, WRITE_ONLY)]
    assert ring.wait() == [(0, 4)]
    assert rig.memory.read(room, 4) == b"\0cba"


def test_a_buffer_may_be_on_scattered_pages(rig: Rig) -> None:
    ring = rig.ring()
    start = rig.memory.allocate(3 * PAGE, PAGE)
    elsewhere = [rig.page(), rig.page(), rig.page()]
    # What is three pages in a row for the driver is the other way round in memory.
    for at, page in enumerate(reversed(elsewhere)):
        update = iotlb(UPDATE, start + at * PAGE + IOVA, PAGE, rig.memory.to_user(page), BOTH)
        assert rig.iommu.message(update) == 0
    source = rig.page(b"xyz")
    rig.iommu.map(source)
    ring.add_pieces([(source, 3, 0), (start + PAGE - 2, PAGE + 4, WRITE)])
    rig.front.kick(ring)
    assert ring.wait() == [(0, 4)]
    assert rig.memory.read(elsewhere[2] + PAGE - 2, 2) + rig.memory.read(elsewhere[1], 2) == b"\0zyx"


# QEMU says the I/O address of the used ring, others its guest address.
@pytest.mark.parametrize("said", [IOVA, 0], ids=["I/O address", "guest address"])
def test_what_is_written_is_logged_where_it_is_in_guest_memory(
    serve: Serve, connect: Connect, memory: Memory, said: int
) -> None:
    rig = set_up(ReverseMany(), serve, connect, memory, FEATURES | LOG_ALL, PROTOCOL | LOG_SHMFD)
    log = rig.front.own(Log.of(memory))
    rig.front.set_log(log)
    ring = rig.ring()
    rig.front.tell(Id.SET_VRING_ADDR, ring.address_payload(flags=1, log=ring.used + said))
    room, source = rig.memory.allocate(2 * PAGE, PAGE), rig.page(b"xyz")
    elsewhere = [rig.page(), rig.page()]
    for at, page in enumerate(elsewhere):
        update = iotlb(UPDATE, room + at * PAGE + IOVA, PAGE, rig.memory.to_user(page), BOTH)
        assert rig.iommu.message(update) == 0
    rig.iommu.map(source)
    ring.add_pieces([(source, 3, 0), (room + PAGE - 2, 4, WRITE)])
    rig.front.kick(ring)
    assert ring.wait() == [(0, 4)]
    assert log.dirty() == {*elsewhere, ring.used // PAGE * PAGE}


class ScatteredMemory:
    """Some pages of `memory`, of which none follows the one before it, in a row of their own."""

    def __init__(self, memory: Memory, count: int) -> None:
        self.memory = memory
        self.start = self._free = memory.allocate(count * PAGE, PAGE)
        elsewhere = memory.allocate(2 * count * PAGE, PAGE)
        #: Where each of them is.
        self.places = [elsewhere + 2 * at * PAGE for at in reversed(range(count))]

    def allocate(self, size: int, alignment: int) -> int:
        address = -(-self._free // alignment) * alignment
        self._free = address + size
        return address

    def place(self, address: int) -> int:
        page, offset = divmod(address - self.start, PAGE)
        return self.places[page] + offset

    def write(self, address: int, data: bytes) -> None:
        for at, byte in enumerate(data):
            self.memory.write(self.place(address + at), bytes([byte]))

    def read(self, address: int, size: int) -> bytes:
        return b"".join(self.memory.read(self.place(address + at), 1) for at in range(size))


def test_a_ring_may_be_on_scattered_pages(serve: Serve, connect: Connect, memory: Memory) -> None:
    rig = set_up(ReverseMany(), serve, connect, memory, FEATURES | LOG_ALL, PROTOCOL | LOG_SHMFD)
    log = rig.front.own(Log.of(memory))
    rig.front.set_log(log)
    scattered = ScatteredMemory(memory, 3)
    # The descriptor table has a page, and begins in the middle of one.
    scattered.allocate(PAGE // 2, 1)
    ring = MappedRing(scattered, size=256)  # type: ignore[arg-type]
    assert ring.used // PAGE < (ring.used + 8 * ring.size) // PAGE
    rig.front.start(ring)

    def serve_ring() -> None:
        asked = []
        for _ in scattered.places:
            page, _ = rig.iommu.miss()
            asked.append(page)
            user = memory.to_user(scattered.place(page))
            assert rig.iommu.message(iotlb(UPDATE, page + IOVA, PAGE, user, BOTH)) == 0
            rig.iommu.agree()
        assert sorted(asked) == ring.pages

    serve_ring()
    rig.front.tell(Id.SET_VRING_ADDR, ring.address_payload(flags=1, log=ring.used + IOVA))
    source, room = rig.page(b"hello"), rig.page()
    rig.iommu.map(source)
    rig.iommu.map(room)
    for _ in range(2):
        log.clear()
        for _ in range(ring.size):
            memory.write(room, bytes(6))
            ring.add_pieces([(source, 5, 0), (room, 6, WRITE)])
            rig.front.kick(ring)
            assert [written for _, written in ring.wait()] == [6]
            assert memory.read(room, 6) == b"\0olleh"
        assert log.dirty() == {room, *(scattered.place(page) for page in pages(ring.used, 6 + 8 * ring.size))}
        # The pages go somewhere else with what they hold.
        rig.iommu.invalidate(scattered.start, len(scattered.places) * PAGE)
        held = [memory.read(place, PAGE) for place in scattered.places]
        scattered.places = scattered.places[::-1]
        for place, content in zip(scattered.places, held, strict=True):
            memory.write(place, content)
        ring.add_pieces([(source, 5, 0), (room, 6, WRITE)])
        rig.front.kick(ring)
        serve_ring()
        assert [written for _, written in ring.wait()] == [6]


def test_a_miss_that_is_refused_breaks_its_ring_alone_and_says_why(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    ring, other = rig.ring(0), rig.ring(1)
    error = rig.front.set_error(ring)
    source, _ = rig.request(ring, b"hello")
    assert rig.iommu.miss() == (source, READ)
    rig.iommu.agree(1)
    assert error.came()
    wait_until(lambda: rig.device.queues[0].status == "broken", "the ring breaks")
    wait_until(lambda: "refused it with 0x1" in caplog.text, "it is logged")
    assert f"I/O address {source + IOVA:#x} is not mapped (for reading)" in caplog.text
    rig.request(other, b"other")
    rig.iommu.serve()
    rig.iommu.serve()
    assert other.wait() == [(0, 6)]


def test_a_device_that_may_not_ask_says_so(serve: Serve, connect: Connect, memory: Memory) -> None:
    device = Reverse()
    device.iommu = True
    front = connect(serve(device))
    front.negotiate(FEATURES, REPLY_ACK)
    front.share(memory)
    ring = MappedRing(memory)
    error = front.set_error(ring)
    front.start(ring)
    assert error.came()


def test_kicks_while_the_front_end_thinks_do_not_ask_again(rig: Rig) -> None:
    ring = rig.ring()
    source, room = rig.request(ring, b"hello")
    assert rig.iommu.miss() == (source, READ)
    for _ in range(200):
        rig.front.kick(ring)
        assert rig.front.get_u64(Id.GET_QUEUE_NUM) == 4
    assert rig.iommu.channel.is_silent()
    rig.iommu.map(source)
    rig.iommu.map(room)
    rig.iommu.agree()
    assert ring.wait() == [(0, 6)]


@pytest.mark.parametrize("permission", [READ, WRITE_ONLY])
def test_a_buffer_is_used_only_as_its_mapping_allows(
    rig: Rig, permission: int, caplog: pytest.LogCaptureFixture
) -> None:
    ring = rig.ring()
    error = rig.front.set_error(ring)
    source, room = rig.request(ring, b"hello")
    refused = room if permission == READ else source
    rig.iommu.serve(permission)
    if permission == READ:
        rig.iommu.serve(permission)
    assert error.came()
    wait_until(lambda: "which I/O address" in caplog.text, "the reason is logged")
    descriptor, doing = (1, "writing") if permission == READ else (0, "reading")
    assert f"descriptor {descriptor} is for {doing}, which I/O address {refused + IOVA:#x}" in caplog.text
    assert rig.memory.read(room, 6) == bytes(6)


# --- Invalidation -----------------------------------------------------------------------------------------------------


def test_what_is_taken_back_is_asked_for_again(rig: Rig) -> None:
    ring = rig.ring()
    source, room = rig.page(b"abc"), rig.page()
    rig.iommu.map(source)
    rig.iommu.map(room)
    for _ in range(2):
        ring.add_pieces([(source, 3, 0), (room, 4, WRITE)])
    rig.front.kick(ring)
    assert len(ring.wait(2)) == 2
    rig.iommu.invalidate(source)
    ring.add_pieces([(source, 3, 0), (room, 4, WRITE)])
    rig.front.kick(ring)
    assert rig.iommu.serve() == (source, READ)
    ring.wait()
    # One byte of a page is enough, and leaves the rest.
    rig.iommu.invalidate(room + 3, 1)
    ring.add_pieces([(source, 3, 0), (room, 4, WRITE)])
    rig.front.kick(ring)
    assert rig.iommu.serve() == (room, WRITE_ONLY)
    ring.wait()


def test_an_invalidation_is_answered_when_no_request_is_there_any_more(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    device = Hold()
    rig = set_up(device, serve, connect, memory)
    ring = rig.ring()
    _, (_, second) = (rig.request(ring, b"x" * size) for size in (1, 2))
    for _ in range(4):
        rig.iommu.serve()
    requests = [device.next(), device.next()]
    # Nobody is on a page of its own.
    rig.iommu.invalidate(rig.page())
    rig.front.send(Id.IOTLB_MSG, iotlb(INVALIDATE, second + IOVA, PAGE))
    requests[0].complete()
    assert ring.wait() == [(0, 0)]
    assert rig.front.is_silent()
    requests[1].write(b"lat")
    requests[1].complete()
    assert rig.iommu.answer() == 0
    assert memory.read(second, 3) == b"lat"
    assert ring.wait() == [(2, 3)]


def test_an_invalidation_does_not_wait_for_ever(
    serve: Serve, connect: Connect, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    device = Hold()
    rig = set_up(device, serve, connect, memory)
    ring = rig.ring()
    source, _ = rig.request(ring, b"hello")
    rig.iommu.serve()
    rig.iommu.serve()
    request = device.next()
    rig.iommu.invalidate(source)
    assert "queue 0: the driver took the I/O addresses" in caplog.text
    # The mapping is still there: it is only not the driver's any more.
    assert request.read() == b"hello"
    request.complete()
    assert ring.wait() == [(0, 0)]


def test_a_ring_whose_addresses_are_taken_back_goes_on_when_they_are_mapped_again(rig: Rig) -> None:
    ring = rig.ring()
    assert rig.iommu.message(iotlb(INVALIDATE, *EVERYTHING)) == 0
    rig.request(ring, b"hello")
    for _ in range(len(ring.pages) + 2):
        rig.iommu.serve()
    assert ring.wait() == [(0, 6)]


def test_a_ring_that_nobody_uses_is_not_asked_for_again(serve: Serve, connect: Connect, memory: Memory) -> None:
    device = ReverseMany()
    # Or it would look at the ring for another moment.
    device.busy_poll = 0.0
    rig = set_up(device, serve, connect, memory)
    ring = rig.ring()
    rig.request(ring, b"hello")
    rig.iommu.serve()
    rig.iommu.serve()
    assert ring.wait() == [(0, 6)]
    assert rig.iommu.message(iotlb(INVALIDATE, *EVERYTHING)) == 0
    assert rig.iommu.channel.is_silent()
    assert rig.front.stop(ring) == 1
    assert rig.iommu.channel.is_silent()


def test_what_is_completed_while_a_ring_is_not_mapped_is_published_when_it_is(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    device = Hold()
    rig = set_up(device, serve, connect, memory)
    ring = rig.ring()
    rig.request(ring, b"hello")
    rig.iommu.serve()
    rig.iommu.serve()
    request = device.next()
    for page in ring.pages:
        rig.iommu.invalidate(page)
    before = memory.read(ring.used, 4)
    request.write(b"bye")
    request.complete()
    page, _ = rig.iommu.miss()
    assert rig.front.get_u64(Id.GET_QUEUE_NUM) == 1
    assert memory.read(ring.used, 4) == before
    rig.iommu.map(page)
    rig.iommu.agree()
    for _ in ring.pages[1:]:
        rig.iommu.serve()
    assert ring.wait() == [(0, 3)]


def test_a_ring_moves_to_where_its_io_addresses_lead_now(rig: Rig) -> None:
    ring = rig.ring()
    rig.iommu.invalidate(ring.pages[0], len(ring.pages) * PAGE)
    # The driver's addresses stay, and the memory is another one.
    new = rig.memory.allocate(len(ring.pages) * PAGE, PAGE)
    rig.memory.write(new, rig.memory.read(ring.pages[0], len(ring.pages) * PAGE))
    update = iotlb(UPDATE, ring.pages[0] + IOVA, len(ring.pages) * PAGE, rig.memory.to_user(new), BOTH)
    moved = new - ring.pages[0]
    for part in ("descriptors", "avail", "used"):
        setattr(ring, part, getattr(ring, part) + moved)
    rig.request(ring, b"hello")
    rig.iommu.miss()
    assert rig.iommu.message(update) == 0
    rig.iommu.agree()
    rig.iommu.serve()
    rig.iommu.serve()
    assert ring.wait() == [(0, 6)]


def test_a_ring_stops_in_the_middle_of_a_miss_and_takes_it_up_again(rig: Rig) -> None:
    ring = rig.ring()
    rig.request(ring, b"hello")
    rig.iommu.miss()
    assert rig.front.stop(ring) == 0
    rig.iommu.agree(1)
    rig.front.start(ring)
    rig.iommu.serve()
    rig.iommu.serve()
    assert ring.wait() == [(0, 6)]


def test_mappings_do_not_outlive_the_rings_that_they_were_for(rig: Rig) -> None:
    ring = rig.ring()
    rig.front.stop(ring)
    rig.front.tell(Id.SET_FEATURES, u64(FEATURES))
    rig.front.start(ring)
    assert [rig.iommu.serve()[0] for _ in ring.pages] == ring.pages


def test_mappings_to_memory_that_goes_away_go_with_it(rig: Rig) -> None:
    ring = rig.ring()
    with Memory(guest=0x9000_0000, user=0x7F99_0000_0000) as other:
        rig.front.share(rig.memory, other)
        source, room = other.put(b"abc"), rig.page()
        there = Iommu(rig.front, other, rig.iommu.channel)
        there.map(source // PAGE * PAGE)
        rig.iommu.map(room)
        ring.add_pieces([(source, 3, 0), (room, 4, WRITE)])
        rig.front.kick(ring)
        assert ring.wait() == [(0, 4)]
        rig.front.share(rig.memory)
        ring.add_pieces([(source, 3, 0), (room, 4, WRITE)])
        rig.front.kick(ring)
        assert rig.iommu.miss() == (source // PAGE * PAGE, READ)


# --- What nobody should send ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        iotlb(UPDATE, IOVA, 0, 0x7F12_0000_0000, BOTH),
        iotlb(UPDATE, 2**64 - PAGE, 2 * PAGE, 0x7F12_0000_0000, BOTH),
        iotlb(UPDATE, IOVA, PAGE, 0x7F12_0000_0000, 0),
        iotlb(UPDATE, IOVA, PAGE, 0x7F12_0000_0000, 4),
        iotlb(UPDATE, IOVA, PAGE, 0x1000, BOTH),
        iotlb(UPDATE, IOVA, (1 << 20) + 1, 0x7F12_0000_0000, BOTH),
        iotlb(UPDATE, IOVA, 2**64 - 1, 0x7F12_0000_0000, BOTH),
        iotlb(UPDATE, 0, 2**64 - 1, 2**64 - 1, BOTH),
        iotlb(INVALIDATE, IOVA, 0),
        iotlb(INVALIDATE, IOVA, 2**64 - 1),
        *(iotlb(kind, IOVA, PAGE, 0x7F12_0000_0000, BOTH) for kind in (0, MISS, ACCESS_FAIL, 5, 6, 255)),
    ],
)
def test_a_message_that_cannot_be_is_refused_and_changes_nothing(rig: Rig, payload: bytes) -> None:
    ring = rig.ring()
    assert rig.iommu.message(payload) == 1
    rig.request(ring, b"hello")
    rig.iommu.serve()
    rig.iommu.serve()
    assert ring.wait() == [(0, 6)]


@pytest.mark.parametrize("flags", [REQUEST, NEED_REPLY])
def test_without_the_feature_nothing_is_mapped(serve: Serve, connect: Connect, memory: Memory, flags: int) -> None:
    front = connect(serve(Reverse()))
    front.negotiate()
    front.share(memory)
    front.send(Id.IOTLB_MSG, iotlb(UPDATE, IOVA, PAGE, memory.user, BOTH), flags=flags)
    assert front.reply_to(Id.IOTLB_MSG) == u64(1)
    ring = Ring(memory)
    front.start(ring)
    assert front.exchange(ring, b"abc", 3) == b"cba"


def test_the_iommu_cannot_come_or_go_while_a_ring_runs(rig: Rig) -> None:
    rig.ring()
    assert rig.front.ask(Id.SET_FEATURES, u64(FEATURES & ~ACCESS_PLATFORM)) == 1
    assert rig.front.ask(Id.SET_FEATURES, u64(FEATURES)) == 0


def test_the_newest_of_overlapping_mappings_counts(rig: Rig) -> None:
    ring = rig.ring()
    rig.iommu.map(rig.memory.guest, rig.memory.size)
    source, room, decoy = rig.page(b"right"), rig.page(), rig.page(b"wrong")
    swapped = iotlb(UPDATE, decoy + IOVA, PAGE, rig.memory.to_user(source), BOTH)
    assert rig.iommu.message(swapped) == 0
    ring.add_pieces([(decoy, 5, 0), (room, 6, WRITE)])
    rig.front.kick(ring)
    assert ring.wait() == [(0, 6)]
    assert rig.memory.read(room, 6) == b"\0thgir"


def test_a_flood_of_mappings_is_bounded_and_forgets_the_oldest(rig: Rig) -> None:
    ring = rig.ring()
    user = rig.memory.user
    flood = b"".join(
        struct.pack("=III", Id.IOTLB_MSG, REQUEST, 32) + iotlb(UPDATE, page * PAGE, PAGE, user, BOTH)
        for page in range(9000)
    )
    sender = threading.Thread(target=rig.front.send_bytes, args=[flood])
    sender.start()
    assert all(rig.iommu.answer() == 0 for _ in range(9000))
    sender.join()
    # The ring itself was found before, and is not affected.
    rig.request(ring, b"hello")
    rig.iommu.serve()
    rig.iommu.serve()
    assert ring.wait() == [(0, 6)]
    ring.add_pieces([(-IOVA, 1, 0)])
    rig.front.kick(ring)
    assert rig.iommu.miss() == (-IOVA, READ)


def test_a_channel_that_closes_in_the_middle_of_a_miss_breaks_the_ring(rig: Rig) -> None:
    ring = rig.ring()
    error = rig.front.set_error(ring)
    rig.request(ring, b"hello")
    rig.iommu.miss()
    rig.iommu.channel.close()
    assert error.came()
    assert rig.front.get_u64(Id.GET_QUEUE_NUM) == 4
