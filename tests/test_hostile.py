"""What a hostile or broken peer tries: its message is refused, its ring stops or its connection ends; nothing else.

After every test the device serves a good front-end, and no descriptor or mapping is left (the fixture `level`).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import resource
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vhost_user as vu
from conftest import open_descriptors
from raw import (
    CONFIGURE_MEM_SLOTS,
    DEADLINE,
    HEADER,
    INDIRECT,
    INDIRECT_DESC,
    NEED_REPLY,
    NEXT,
    PROTOCOL_FEATURES,
    REPLY_ACK,
    REQUEST,
    VERSION_1,
    WRITE,
    FrontEnd,
    Id,
    Memory,
    NonblockingEventfd,
    Ring,
    config,
    memory_table,
    single_region,
    u64,
    vring_descriptor,
    vring_state,
    wait_until,
)
from specimens import NO_TYPE, Connect, Hold, ReverseMany, Serve

PAGE = 4096
TOP = 1 << 64


class Witness(ReverseMany, device_id=NO_TYPE):
    """Remembers what went wrong. It has a configuration space."""

    size = vu.config.u32(1, writable=True)

    def __init__(self) -> None:
        self.queue_errors: list[tuple[int, str]] = []
        self.ends: list[Exception | None] = []

    def on_queue_error(self, queue: vu.DeviceQueue, error: str) -> None:
        self.queue_errors.append((queue.index, error))

    def on_disconnect(self, error: Exception | None) -> None:
        self.ends.append(error)


@pytest.fixture
def device() -> Witness:
    return Witness()


@pytest.fixture
def path(device: Witness, serve: Serve) -> Iterator[Path]:
    """Where the device is served. Whatever was tried there, the next front-end is served, too."""
    path = serve(device)
    yield path
    with FrontEnd(path) as front, Memory() as memory:
        front.negotiate()
        front.share(memory)
        for ring in [Ring(memory, index) for index in range(4)]:
            front.start(ring)
            assert front.exchange(ring, b"good", 8) == bytes([ring.index]) + b"doog"


@pytest.fixture
def front(path: Path) -> Iterator[FrontEnd]:
    with FrontEnd(path) as front:
        yield front


def two_rings(
    front: FrontEnd, *memories: Memory, features: int = PROTOCOL_FEATURES | VERSION_1 | INDIRECT_DESC
) -> tuple[Ring, Ring]:
    """Queues 0 and 1, running in the first memory."""
    front.negotiate(features, REPLY_ACK | CONFIGURE_MEM_SLOTS)
    front.share(*memories)
    rings = Ring(memories[0], 0), Ring(memories[0], 1)
    for ring in rings:
        front.start(ring)
    return rings


# --- Chains that no driver may make -----------------------------------------------------------------------------------

Malformation = Callable[[Ring, Memory], None]


def indirect(ring: Ring, *entries: tuple[int, int, int, int], length: int | None = None, flags: int = 0) -> None:
    """A chain that is one table of (address, length, flags, next)."""
    table = b"".join(struct.pack("<QIHH", *entry) for entry in entries)
    address = ring.memory.put(table)
    ring.set_descriptor(0, address, len(table) if length is None else length, INDIRECT | flags)
    ring.offer(0)


def passes_the_end_of_memory(ring: Ring, memory: Memory) -> None:
    ring.add_pieces([(memory.end - 8, 9, 0)])


def begins_before_memory(ring: Ring, memory: Memory) -> None:
    ring.add_pieces([(memory.guest - 1, 2, 0)])


def is_nowhere_in_memory(ring: Ring, memory: Memory) -> None:
    ring.add_pieces([(0, 1, WRITE)])


def wraps_around_the_address_space(ring: Ring, memory: Memory) -> None:
    ring.add_pieces([(TOP - 8, 16, WRITE)])


def spans_4_gibibytes_from_a_good_address(ring: Ring, memory: Memory) -> None:
    ring.add_pieces([(memory.guest, 0xFFFF_FFFF, WRITE)])


def loops_to_itself(ring: Ring, memory: Memory) -> None:
    ring.set_descriptor(0, memory.guest, 1, NEXT, 0)
    ring.offer(0)


def loops_over_all_descriptors(ring: Ring, memory: Memory) -> None:
    for at in range(ring.size):
        ring.set_descriptor(at, memory.guest, 1, NEXT, (at + 1) % ring.size)
    ring.offer(3)


def goes_on_outside_the_table(ring: Ring, memory: Memory) -> None:
    ring.set_descriptor(0, memory.guest, 1, NEXT, ring.size)
    ring.offer(0)


def begins_outside_the_table(ring: Ring, memory: Memory) -> None:
    ring.offer(ring.size)


def begins_far_outside_the_table(ring: Ring, memory: Memory) -> None:
    ring.offer(0xFFFF)


def has_a_readable_piece_after_a_writable_one(ring: Ring, memory: Memory) -> None:
    ring.add_pieces([(memory.guest, 1, WRITE), (memory.guest, 1, 0)])


def has_a_readable_piece_after_an_empty_writable_one(ring: Ring, memory: Memory) -> None:
    ring.add_pieces([(memory.guest, 0, WRITE), (memory.guest, 1, 0)])


def jumps_by_one_too_many(ring: Ring, memory: Memory) -> None:
    ring.avail_index += ring.size + 1


def jumps_back(ring: Ring, memory: Memory) -> None:
    ring.avail_index -= 1


def jumps_half_way_round(ring: Ring, memory: Memory) -> None:
    ring.avail_index += 0x8000


def has_a_table_in_a_table(ring: Ring, memory: Memory) -> None:
    indirect(ring, (memory.guest, 16, INDIRECT, 0))


def has_a_table_with_a_next(ring: Ring, memory: Memory) -> None:
    indirect(ring, (memory.guest, 16, 0, 0), flags=NEXT)


def has_an_empty_table(ring: Ring, memory: Memory) -> None:
    indirect(ring, length=0)


def has_a_table_of_15_bytes(ring: Ring, memory: Memory) -> None:
    indirect(ring, (memory.guest, 1, 0, 0), length=15)


def has_a_table_of_17_bytes(ring: Ring, memory: Memory) -> None:
    indirect(ring, (memory.guest, 1, 0, 0), length=17)


def has_a_table_of_1025_descriptors(ring: Ring, memory: Memory) -> None:
    indirect(ring, *[(memory.guest, 1, NEXT, at + 1) for at in range(1024)], (memory.guest, 1, 0, 0))


def has_a_table_outside_memory(ring: Ring, memory: Memory) -> None:
    ring.add_pieces([(memory.end - 16, 32, INDIRECT)])


def has_a_table_at_the_end_of_the_address_space(ring: Ring, memory: Memory) -> None:
    ring.add_pieces([(TOP - 16, 32, INDIRECT)])


def loops_in_its_table(ring: Ring, memory: Memory) -> None:
    indirect(ring, (memory.guest, 1, NEXT, 1), (memory.guest, 1, NEXT, 0))


def goes_on_outside_its_table(ring: Ring, memory: Memory) -> None:
    indirect(ring, (memory.guest, 1, NEXT, 2), (memory.guest, 1, 0, 0))


def points_outside_memory_from_its_table(ring: Ring, memory: Memory) -> None:
    indirect(ring, (memory.guest, 1, NEXT, 1), (memory.end, 1, 0, 0))


def has_a_readable_piece_after_a_writable_one_in_its_table(ring: Ring, memory: Memory) -> None:
    indirect(ring, (memory.guest, 1, NEXT | WRITE, 1), (memory.guest, 1, 0, 0))


def has_a_bad_table_after_a_good_piece(ring: Ring, memory: Memory) -> None:
    ring.set_descriptor(1, memory.guest, 15, INDIRECT)
    ring.set_descriptor(0, memory.guest, 1, NEXT, 1)
    ring.offer(0)


MALFORMED: dict[Malformation, str] = {
    passes_the_end_of_memory: r"descriptor 0 spans 0x400ffff8\.\.0x40100001, outside guest memory",
    begins_before_memory: r"descriptor 0 spans 0x3fffffff\.\.0x40000001, outside guest memory \(0x40000000",
    is_nowhere_in_memory: r"descriptor 0 spans 0x0\.\.0x1, outside",
    wraps_around_the_address_space: r"descriptor 0 spans 0xfffffffffffffff8\.\.0x10000000000000008, outside",
    spans_4_gibibytes_from_a_good_address: r"descriptor 0 spans 0x40000000\.\.0x13fffffff, outside",
    loops_to_itself: r"the chain at descriptor 0 has more than 16 descriptors",
    loops_over_all_descriptors: r"the chain at descriptor 3 has more than 16 descriptors",
    goes_on_outside_the_table: r"descriptor 0 goes on with descriptor 16; the table has 16",
    begins_outside_the_table: r"names descriptor 16; the table has 16",
    begins_far_outside_the_table: r"names descriptor 65535; the table has 16",
    has_a_readable_piece_after_a_writable_one: r"descriptor 1 is readable but follows a writable one",
    has_a_readable_piece_after_an_empty_writable_one: r"descriptor 1 is readable but follows a writable one",
    jumps_by_one_too_many: r"the available index went from 0 to 17, but the ring has room for 16 more",
    jumps_back: r"the available index went from 0 to 65535",
    jumps_half_way_round: r"the available index went from 0 to 32768",
    has_a_table_in_a_table: r"descriptor 0 of an indirect table is itself INDIRECT",
    has_a_table_with_a_next: r"descriptor 0 has the flags 0x5: INDIRECT must not be combined with NEXT",
    has_an_empty_table: r"the indirect table of descriptor 0 has 0 bytes; a multiple of 16",
    has_a_table_of_15_bytes: r"the indirect table of descriptor 0 has 15 bytes",
    has_a_table_of_17_bytes: r"the indirect table of descriptor 0 has 17 bytes",
    has_a_table_of_1025_descriptors: r"the indirect table of descriptor 0 has 16400 bytes",
    has_a_table_outside_memory: r"descriptor 0 spans 0x400ffff0\.\.0x40100010, outside",
    has_a_table_at_the_end_of_the_address_space: r"descriptor 0 spans 0xfffffffffffffff0\.\.0x10000000000000010",
    loops_in_its_table: r"the chain at descriptor 0 has more than 2 descriptors",
    goes_on_outside_its_table: r"descriptor 0 goes on with descriptor 2; the table has 2",
    points_outside_memory_from_its_table: r"descriptor 1 spans 0x40100000\.\.0x40100001, outside",
    has_a_readable_piece_after_a_writable_one_in_its_table: r"descriptor 1 is readable but follows a writable one",
    has_a_bad_table_after_a_good_piece: r"the indirect table of descriptor 1 has 15 bytes",
}


@pytest.mark.parametrize(
    ("malform", "error"), [pytest.param(malform, error, id=malform.__name__) for malform, error in MALFORMED.items()]
)
def test_a_chain_breaks_only_its_own_queue_if_it(
    front: FrontEnd, device: Witness, memory: Memory, malform: Malformation, error: str
) -> None:
    ring, other = two_rings(front, memory)
    signal = front.set_error(ring)
    malform(ring, memory)
    front.kick(ring)
    assert signal.came()
    assert ring.used_index == 0
    wait_until(lambda: device.queue_errors, "the device is told")
    [(queue, text)] = device.queue_errors
    assert queue == 0
    assert re.search(error, text)
    assert front.exchange(other, b"abc", 8) == b"\x01cba"
    assert device.queues[0].status == "broken"
    # It is left alone from now on.
    ring.clear()
    ring.add([b"abc"], [8])
    front.kick(ring)
    assert front.exchange(other, b"abc", 8) == b"\x01cba"
    assert ring.used_index == 0


def test_an_indirect_table_breaks_the_queue_of_a_driver_that_did_not_negotiate_them(
    front: FrontEnd, device: Witness, memory: Memory
) -> None:
    ring, other = two_rings(front, memory, features=PROTOCOL_FEATURES | VERSION_1)
    signal = front.set_error(ring)
    indirect(ring, (memory.guest, 1, 0, 0))
    front.kick(ring)
    assert signal.came()
    assert front.exchange(other, b"abc", 8) == b"\x01cba"


def test_a_chain_of_more_bytes_than_can_be_reported_breaks_its_queue(front: FrontEnd, memory: Memory) -> None:
    gibibyte = 1 << 30
    with Memory(gibibyte, guest=0x1_0000_0000, user=0x7E00_0000_0000) as large:
        ring, other = two_rings(front, memory, large)
        signal = front.set_error(ring)
        ring.add_pieces([(large.guest, gibibyte, WRITE)] * 4)
        front.kick(ring)
        assert signal.came()
        assert front.exchange(other, b"abc", 8) == b"\x01cba"


def test_a_gap_between_two_regions_is_not_memory(front: FrontEnd, device: Witness, memory: Memory) -> None:
    with Memory(PAGE, guest=memory.end + PAGE, user=0x7E00_0000_0000) as high:
        ring, other = two_rings(front, memory, high)
        signal = front.set_error(ring)
        ring.add_pieces([(memory.end - 1, PAGE + 2, 0)])
        front.kick(ring)
        assert signal.came()
        assert front.exchange(other, b"abc", 8) == b"\x01cba"


def test_what_came_before_a_malformed_chain_is_answered(front: FrontEnd, memory: Memory) -> None:
    ring, _ = two_rings(front, memory)
    signal = front.set_error(ring)
    ring.add([b"abc"], [8])
    ring.add([b"def"], [8])
    ring.offer(99)
    front.kick(ring)
    assert signal.came()
    assert len(ring.wait(2)) == 2


def test_an_empty_piece_is_legal_wherever_it_is(front: FrontEnd, memory: Memory) -> None:
    ring, _ = two_rings(front, memory)
    room = memory.allocate(8)
    ring.add_pieces([(0, 0, 0), (memory.put(b"abc"), 3, 0), (TOP - 1, 0, 0), (room, 8, WRITE), (0, 0, WRITE)])
    front.kick(ring)
    assert ring.wait() == [(0, 4)]
    assert memory.read(room, 4) == b"\x00cba"


def test_a_request_in_256_pieces_of_one_byte_is_gathered(serve: Serve, connect: Connect, memory: Memory) -> None:
    class Parser(vu.Device, device_id=NO_TYPE):
        requestq = vu.Queue()

        @requestq.handler
        def parse(self, request: vu.Request) -> None:
            kind, sector = request.unpack("<IxxxxQ")
            data = bytearray(request.readable)
            assert request.readinto(data) == 240 - 112
            request.write(struct.pack("<IQ", kind + 1, sector + 1))
            request.write(bytes(data))

    front = connect(serve(Parser()))
    front.negotiate()
    front.share(memory)
    ring = Ring(memory, size=512)
    front.start(ring)
    sent = struct.pack("<IxxxxQ", 0x01020304, 0x05060708090A0B0C) + bytes(range(128))
    chain = ring.add([bytes([byte]) for byte in sent], [1] * 140)
    front.kick(ring)
    [(_, length)] = ring.wait()
    assert chain.written(length) == struct.pack("<IQ", 0x01020305, 0x05060708090A0B0D) + bytes(range(128))


def test_descriptors_that_change_after_they_were_taken_change_nothing(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    device = Hold()
    front = connect(serve(device))
    front.negotiate(PROTOCOL_FEATURES | VERSION_1 | INDIRECT_DESC)
    front.share(memory)
    ring = Ring(memory)
    front.start(ring)
    chain = ring.add([b"abc"], [8])
    indirect_chain = ring.add([b"abc"], [8], indirect=True)
    front.kick(ring)
    requests = [device.next(), device.next()]
    before = memory.read(memory.guest, 4096)
    ring.set_descriptor(0, TOP - 1, 0xFFFF_FFFF, NEXT | INDIRECT, 0xFFFF)
    ring.set_descriptor(1, memory.guest, 0xFFFF_FFFF, WRITE)
    ring.set_descriptor(2, 0, 0, INDIRECT)
    table = before.index(struct.pack("<QI", indirect_chain.readable[0][0], 3))
    memory.write(memory.guest + table, b"\xff" * 32)
    for request in requests:
        assert (request.readable, request.writable) == (3, 8)
        request.write(request.read()[::-1])
        request.complete()
    assert ring.wait(2) == [(chain.head, 3), (indirect_chain.head, 3)]
    assert chain.written(3) == indirect_chain.written(3) == b"cba"


# --- Messages that are refused ----------------------------------------------------------------------------------------

LOW = struct.pack("=QQQQ", 0, PAGE, 0x10_0000, 0)


def region(guest: int, size: int, user: int, offset: int = 0) -> bytes:
    return struct.pack("=QQQQ", guest, size, user, offset)


#: Requests that are refused whatever came before: id, payload, and how many descriptors come along.
REFUSED: dict[str, tuple[Id, bytes, int]] = {
    # Regions.
    "a region of no bytes": (Id.SET_MEM_TABLE, memory_table(region(0, 0, 0)), 1),
    "a region that wraps in guest addresses": (Id.SET_MEM_TABLE, memory_table(region(TOP - PAGE, 2 * PAGE, 0)), 1),
    "a region that wraps in user addresses": (Id.SET_MEM_TABLE, memory_table(region(0, 2 * PAGE, TOP - PAGE)), 1),
    "a region that wraps in its file": (Id.SET_MEM_TABLE, memory_table(region(0, PAGE, 0, TOP - PAGE)), 1),
    "a region beyond what files can be": (Id.SET_MEM_TABLE, memory_table(region(0, PAGE, 0, 1 << 63)), 1),
    "a region that passes the end of its file": (Id.SET_MEM_TABLE, memory_table(region(0, (1 << 20) + 1, 0)), 1),
    "a region behind the end of its file": (Id.SET_MEM_TABLE, memory_table(region(0, PAGE, 0, 1 << 20)), 1),
    "all the address space": (Id.SET_MEM_TABLE, memory_table(region(0, TOP - 1, 0)), 1),
    "regions that overlap in guest addresses": (
        Id.SET_MEM_TABLE,
        memory_table(LOW, region(PAGE - 1, PAGE, 0x20_0000)),
        2,
    ),
    "regions that overlap in user addresses": (
        Id.SET_MEM_TABLE,
        memory_table(LOW, region(PAGE, PAGE, 0x10_0000 + PAGE - 1)),
        2,
    ),
    "the same region twice": (Id.SET_MEM_TABLE, memory_table(LOW, LOW), 2),
    "nine regions": (Id.SET_MEM_TABLE, memory_table(*[region(at * PAGE, PAGE, at * PAGE) for at in range(9)]), 9),
    "more regions than bytes": (Id.SET_MEM_TABLE, struct.pack("=II", 2, 0) + LOW, 2),
    "4294967295 regions": (Id.SET_MEM_TABLE, struct.pack("=II", 0xFFFF_FFFF, 0) + LOW, 1),
    "a table cut off in its head": (Id.SET_MEM_TABLE, b"\0\0\0\0", 0),
    "a region too many descriptors": (Id.SET_MEM_TABLE, memory_table(LOW), 2),
    "a region without a descriptor": (Id.SET_MEM_TABLE, memory_table(LOW), 0),
    "regions with too few descriptors": (Id.SET_MEM_TABLE, memory_table(LOW, region(PAGE, PAGE, 0)), 1),
    "an added region without a descriptor": (Id.ADD_MEM_REG, single_region(LOW), 0),
    "an added region with two descriptors": (Id.ADD_MEM_REG, single_region(LOW), 2),
    "an added region of no bytes": (Id.ADD_MEM_REG, single_region(region(0, 0, 0)), 1),
    "removal of what is not there": (Id.REM_MEM_REG, single_region(LOW), 0),
    "removal with two descriptors": (Id.REM_MEM_REG, single_region(LOW), 2),
    # Rings.
    "a ring of 0": (Id.SET_VRING_NUM, vring_state(0, 0), 0),
    "a ring of 3": (Id.SET_VRING_NUM, vring_state(0, 3), 0),
    "a ring of 65536": (Id.SET_VRING_NUM, vring_state(0, 65536), 0),
    "a ring of 2147483648": (Id.SET_VRING_NUM, vring_state(0, 1 << 31), 0),
    "a ring of 65537, which is 1 in 16 bits": (Id.SET_VRING_NUM, vring_state(0, 65537), 0),
    "a base of 65536": (Id.SET_VRING_BASE, vring_state(0, 65536), 0),
    "a packed ring's base": (Id.SET_VRING_BASE, vring_state(0, 0x8000_8000), 0),
    "an unaligned descriptor table": (Id.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 0, 8, 0, 0, 0), 0),
    "an unaligned used ring": (Id.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 0, 0, 2, 0, 0), 0),
    "an unaligned available ring": (Id.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 0, 0, 0, 1, 0), 0),
    "an enable of 2": (Id.SET_VRING_ENABLE, vring_state(0, 2), 0),
    # Queues that do not exist.
    "SET_VRING_NUM of queue 4": (Id.SET_VRING_NUM, vring_state(4, 16), 0),
    "SET_VRING_NUM of queue 4294967295": (Id.SET_VRING_NUM, vring_state(0xFFFF_FFFF, 16), 0),
    "SET_VRING_NUM of queue 65536, which is 0 in 16 bits": (Id.SET_VRING_NUM, vring_state(65536, 16), 0),
    "SET_VRING_BASE of queue 4": (Id.SET_VRING_BASE, vring_state(4, 0), 0),
    "SET_VRING_ADDR of queue 4": (Id.SET_VRING_ADDR, struct.pack("=IIQQQQ", 4, 0, 0, 0, 0, 0), 0),
    "SET_VRING_ENABLE of queue 4": (Id.SET_VRING_ENABLE, vring_state(4, 1), 0),
    "SET_VRING_KICK of queue 4": (Id.SET_VRING_KICK, vring_descriptor(4), 1),
    "SET_VRING_CALL of queue 4": (Id.SET_VRING_CALL, vring_descriptor(4), 1),
    "SET_VRING_ERR of queue 4": (Id.SET_VRING_ERR, vring_descriptor(4), 1),
    "SET_VRING_KICK of queue 4 without a descriptor": (Id.SET_VRING_KICK, vring_descriptor(4, False), 0),
    "SET_VRING_KICK with a bit above the index": (Id.SET_VRING_KICK, u64(1 << 9), 1),
    "SET_VRING_KICK with the highest bit": (Id.SET_VRING_KICK, u64(1 << 63), 1),
    # Descriptors.
    "a kick that promises a descriptor": (Id.SET_VRING_KICK, vring_descriptor(0), 0),
    "a kick with two descriptors": (Id.SET_VRING_KICK, vring_descriptor(0), 2),
    "a kick that denies its descriptor": (Id.SET_VRING_KICK, vring_descriptor(0, False), 1),
    "a call that promises a descriptor": (Id.SET_VRING_CALL, vring_descriptor(0), 0),
    "a call with 253 descriptors": (Id.SET_VRING_CALL, vring_descriptor(0), 253),
    "an error that denies its descriptor": (Id.SET_VRING_ERR, vring_descriptor(0, False), 1),
    "a channel without a descriptor": (Id.SET_BACKEND_REQ_FD, b"", 0),
    "a channel with two descriptors": (Id.SET_BACKEND_REQ_FD, b"", 2),
    "a channel that is no socket": (Id.SET_BACKEND_REQ_FD, b"", 1),
    "an owner with a descriptor": (Id.SET_OWNER, b"", 1),
    "features with eight descriptors": (Id.SET_FEATURES, u64(VERSION_1), 8),
    "a size with a descriptor": (Id.SET_VRING_NUM, vring_state(0, 16), 1),
    # Payloads.
    "an owner with a payload": (Id.SET_OWNER, b"\0", 0),
    "features of 7 bytes": (Id.SET_FEATURES, bytes(7), 0),
    "features of 9 bytes": (Id.SET_FEATURES, bytes(9), 0),
    "features of nothing": (Id.SET_FEATURES, b"", 0),
    "protocol features of 4 bytes": (Id.SET_PROTOCOL_FEATURES, bytes(4), 0),
    "a ring's size in 4 bytes": (Id.SET_VRING_NUM, bytes(4), 0),
    "a ring's addresses in 32 bytes": (Id.SET_VRING_ADDR, bytes(32), 0),
    "an added region of 32 bytes": (Id.ADD_MEM_REG, LOW, 1),
    "a status of 9 bits": (Id.SET_STATUS, u64(0x100), 0),
    "a configuration that is shorter than it says": (Id.SET_CONFIG, config(0, b"\0\0", size=4), 0),
    "a configuration that is longer than it says": (Id.SET_CONFIG, config(0, b"\0\0\0\0", size=2), 0),
    "a configuration without a head": (Id.SET_CONFIG, bytes(11), 0),
    "a configuration behind the end": (Id.SET_CONFIG, config(4, b"\0"), 0),
    "a configuration at the end of all offsets": (Id.SET_CONFIG, config(0xFFFF_FFFF, b"\0\0"), 0),
    # Features that were not offered.
    "a packed ring": (Id.SET_FEATURES, u64(VERSION_1 | 1 << 34), 0),
    "ACCESS_PLATFORM": (Id.SET_FEATURES, u64(VERSION_1 | 1 << 33), 0),
    "an unknown feature": (Id.SET_FEATURES, u64(1 << 63), 0),
    "an unknown protocol feature": (Id.SET_PROTOCOL_FEATURES, u64(1 << 63), 0),
    "notifications in band": (Id.SET_PROTOCOL_FEATURES, u64(1 << 14), 0),
    "a dirty log": (Id.SET_LOG_BASE, struct.pack("=QQ", PAGE, 0), 1),
    "a dirty log of 2^63 pages": (Id.SET_LOG_BASE, struct.pack("=QQ", TOP - 1, TOP - 1), 1),
    "a kick in band": (Id.VRING_KICK, vring_state(0), 0),
    "a byte order": (Id.SET_VRING_ENDIAN, vring_state(0, 1), 0),
}

refused_messages = pytest.mark.parametrize(
    ("request_id", "payload", "count"), [pytest.param(*case, id=name) for name, case in REFUSED.items()]
)


@refused_messages
def test_a_message_is_refused_and_its_descriptors_are_closed(
    front: FrontEnd, memory: Memory, request_id: Id, payload: bytes, count: int
) -> None:
    front.tell(Id.SET_OWNER)
    before = open_descriptors()
    assert front.ask(request_id, payload, [memory.descriptor] * count) != 0
    assert open_descriptors() == before
    # It changed nothing, and the connection goes on.
    rings = two_rings(front, memory)
    for ring in rings:
        assert front.exchange(ring, b"abc", 8) == bytes([ring.index]) + b"cba"


@refused_messages
def test_a_message_without_a_way_to_refuse_it_closes_the_connection(
    front: FrontEnd, device: Witness, memory: Memory, request_id: Id, payload: bytes, count: int
) -> None:
    front.send(request_id, payload, [memory.descriptor] * count)
    assert front.is_closed()
    wait_until(lambda: device.ends, "the device is told")
    [error] = device.ends
    assert isinstance(error, vu.ProtocolError)
    assert str(error).startswith(request_id.name)


@pytest.mark.parametrize(
    ("request_id", "payload", "count"),
    [
        pytest.param(Id.GET_VRING_BASE, vring_state(4), 0, id="the base of queue 4"),
        pytest.param(Id.GET_VRING_BASE, vring_state(0xFFFF_FFFF), 0, id="the base of queue 4294967295"),
        pytest.param(Id.GET_VRING_BASE, b"", 0, id="the base of no queue"),
        pytest.param(Id.GET_FEATURES, b"\0", 0, id="features with a payload"),
        pytest.param(Id.GET_FEATURES, b"", 1, id="features with a descriptor"),
        pytest.param(Id.GET_STATUS, u64(0), 0, id="a status with a payload"),
    ],
)
def test_a_request_with_a_reply_that_cannot_be_answered_closes_the_connection(
    front: FrontEnd, memory: Memory, request_id: Id, payload: bytes, count: int
) -> None:
    front.send(request_id, payload, [memory.descriptor] * count, flags=NEED_REPLY)
    assert front.is_closed()


@pytest.mark.parametrize(
    "payload", [config(0, b"\0\0", size=4), config(0, bytes(4), size=0xFFFF_FFFF), bytes(11), b""], ids=repr
)
def test_a_configuration_read_that_contradicts_itself_gets_an_empty_answer(front: FrontEnd, payload: bytes) -> None:
    assert front.get(Id.GET_CONFIG, payload) == b""
    assert front.get_config(0, 4) == b"\x01\0\0\0"


def test_an_added_region_that_overlaps_is_refused(front: FrontEnd, memory: Memory) -> None:
    front.negotiate(protocol=REPLY_ACK | CONFIGURE_MEM_SLOTS)
    front.tell(Id.ADD_MEM_REG, single_region(memory.region), [memory.descriptor])
    for other in (
        memory.region,
        memory.describe(user=0x1000),
        memory.describe(guest=0x1000),
        memory.describe(guest=memory.end - 1, user=0x1000, size=PAGE),
        memory.describe(guest=0, user=memory.user - PAGE + 1, size=PAGE),
    ):
        assert front.ask(Id.ADD_MEM_REG, single_region(other), [memory.descriptor]) != 0
    front.tell(Id.REM_MEM_REG, single_region(memory.region))


def test_there_are_as_many_memory_slots_as_the_device_says(front: FrontEnd, memory: Memory) -> None:
    front.negotiate(protocol=REPLY_ACK | CONFIGURE_MEM_SLOTS)
    slots = front.get_u64(Id.GET_MAX_MEM_SLOTS)
    for slot in range(slots):
        front.tell(Id.ADD_MEM_REG, single_region(region(slot * PAGE, PAGE, slot * PAGE)), [memory.descriptor])
    one_more = single_region(region(slots * PAGE, PAGE, slots * PAGE))
    assert front.ask(Id.ADD_MEM_REG, one_more, [memory.descriptor]) != 0
    front.tell(Id.REM_MEM_REG, single_region(region(0, PAGE, 0)))
    front.tell(Id.ADD_MEM_REG, one_more, [memory.descriptor])


def test_memory_that_cannot_be_mapped_is_refused(front: FrontEnd, memory: Memory) -> None:
    read_only = os.open(f"/proc/self/fd/{memory.descriptor}", os.O_RDONLY)
    pipe = os.pipe()
    folder = os.open("/", os.O_RDONLY)
    for descriptor in (read_only, *pipe, folder, front.socket.fileno()):
        assert front.ask(Id.SET_MEM_TABLE, memory_table(memory.region), [descriptor]) != 0
    for descriptor in (read_only, *pipe, folder):
        os.close(descriptor)


@pytest.mark.parametrize("part", ["descriptors", "avail", "used"])
@pytest.mark.parametrize("place", ["outside", "over the end", "over two regions", "wrapping around"])
def test_a_ring_whose_parts_are_not_in_memory_does_not_start(
    front: FrontEnd, device: Witness, part: str, place: str
) -> None:
    with Memory(PAGE * 4) as memory, Memory(PAGE, guest=0x9000_0000, user=0x7F12_0000_4000) as after:
        front.negotiate()
        front.share(memory, after)
        ring = Ring(memory)
        signal = front.set_error(ring)
        address = {
            "outside": 0x1000,
            "over the end": after.user + PAGE - 16,
            "over two regions": after.user - 16,
            "wrapping around": TOP - 16,
        }[place]
        front.place(ring)
        front.tell(Id.SET_VRING_ADDR, ring.address_payload(**{part: address}))
        front.set_kick(ring)
        front.enable(ring)
        assert signal.came()
        assert device.queues[0].status == "broken"
        other = Ring(memory, 1)
        front.start(other)
        assert front.exchange(other, b"abc", 8) == b"\x01cba"


@pytest.mark.parametrize("part", ["descriptors", "avail", "used"])
def test_a_running_ring_is_not_moved_out_of_memory(front: FrontEnd, memory: Memory, part: str) -> None:
    ring, _ = two_rings(front, memory)
    assert front.ask(Id.SET_VRING_ADDR, ring.address_payload(**{part: memory.user + memory.size - 16})) != 0
    assert front.exchange(ring, b"abc", 8) == b"\0cba"


def test_a_ring_that_is_not_aligned_in_its_file_does_not_start(front: FrontEnd) -> None:
    with Memory(PAGE * 4, offset=8) as memory:
        front.negotiate()
        front.share(memory)
        ring = Ring(memory)
        signal = front.set_error(ring)
        front.start(ring)
        assert signal.came()


def test_memory_may_begin_inside_a_page_of_its_file(front: FrontEnd) -> None:
    with Memory(PAGE * 4, offset=PAGE + 512) as memory:
        ring, _ = two_rings(front, memory)
        assert front.exchange(ring, b"abc", 8) == b"\0cba"


# --- Descriptors ------------------------------------------------------------------------------------------------------


def test_descriptors_that_come_with_a_later_byte_are_refused_and_closed(front: FrontEnd, memory: Memory) -> None:
    table = memory_table(memory.region)
    header = HEADER.pack(Id.SET_MEM_TABLE, NEED_REPLY, len(table))
    front.tell(Id.SET_OWNER)
    before = open_descriptors()
    for first in (1, HEADER.size, HEADER.size + 8):
        message = header + table
        front.send_bytes(message[:first])
        front.wait_until_read()
        front.send_bytes(message[first:], [memory.descriptor])
        assert front.reply_to(Id.SET_MEM_TABLE) != u64(0)
    front.send_bytes(header[:1], [memory.descriptor])
    front.wait_until_read()
    front.send_bytes(header[1:] + table, [memory.descriptor])
    assert front.reply_to(Id.SET_MEM_TABLE) != u64(0)
    assert open_descriptors() == before
    front.share(memory)


def test_descriptors_are_closed_when_the_message_stays_unfinished(path: Path, device: Witness, memory: Memory) -> None:
    with FrontEnd(path) as front:
        front.tell(Id.SET_OWNER)
    wait_until(lambda: device.ends, "the first session ends")
    before = open_descriptors()
    with FrontEnd(path) as front:
        front.send_bytes(HEADER.pack(Id.SET_MEM_TABLE, REQUEST, 40), [memory.descriptor] * 200)
        front.send_bytes(b"\0" * 39)
    wait_until(lambda: open_descriptors() == before, "everything is closed")


@pytest.mark.parametrize("regions", [8, 2])
def test_descriptors_that_the_process_has_no_room_for_are_refused(
    front: FrontEnd, memory: Memory, caplog: pytest.LogCaptureFixture, regions: int
) -> None:
    front.tell(Id.SET_OWNER)
    table = memory_table(*[region(at * PAGE, PAGE, at * PAGE) for at in range(regions)])
    before = open_descriptors()
    with two_descriptors_left():
        # Of the eight, two arrive: as many as a table of two regions needs.
        assert front.ask(Id.SET_MEM_TABLE, table, [memory.descriptor] * 8) != 0
    assert "SET_MEM_TABLE: descriptors were lost on the way: this process has no room for more" in caplog.text
    assert open_descriptors() == before
    front.tell(Id.SET_MEM_TABLE, table, [memory.descriptor] * regions)


@contextlib.contextmanager
def two_descriptors_left() -> Iterator[None]:
    """This process, in which the device runs, may open two files more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = []
    try:
        free = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
        limit = max(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        for descriptor in free:
            os.close(descriptor)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("name", ["/dev/null", "/", "/proc/self/exe"])
def test_a_kick_descriptor_that_cannot_kick_is_refused_or_never_kicks(
    front: FrontEnd, memory: Memory, name: str
) -> None:
    ring, other = two_rings(front, memory)
    descriptor = os.open(name, os.O_RDONLY)
    front.ask(Id.SET_VRING_KICK, vring_descriptor(0), [descriptor])
    os.close(descriptor)
    assert front.exchange(other, b"abc", 8) == b"\x01cba"
    front.set_kick(ring)
    assert front.exchange(ring, b"abc", 8) == b"\0cba"


def test_a_kick_descriptor_whose_other_end_is_closed_does_not_spin(front: FrontEnd, memory: Memory) -> None:
    ring, other = two_rings(front, memory)
    ours, theirs = socket.socketpair()
    reader, writer = os.pipe()
    front.tell(Id.SET_VRING_KICK, vring_descriptor(0), [theirs.fileno()])
    front.tell(Id.SET_VRING_KICK, vring_descriptor(1), [reader])
    for end in (ours, theirs):
        end.close()
    for descriptor in (reader, writer):
        os.close(descriptor)
    front.tell(Id.SET_OWNER)
    time.sleep(0.02)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.1
    front.set_kick(other)
    assert front.exchange(other, b"abc", 8) == b"\x01cba"
    front.set_kick(ring)
    assert front.exchange(ring, b"abc", 8) == b"\0cba"


def test_a_kick_descriptor_that_is_always_readable_does_not_spin(front: FrontEnd, memory: Memory) -> None:
    ring, other = two_rings(front, memory)
    random = os.open("/dev/random", os.O_RDONLY)
    full = os.eventfd(0xFFFF_FFFF, os.EFD_SEMAPHORE)
    front.ask(Id.SET_VRING_KICK, vring_descriptor(0), [random])
    front.tell(Id.SET_VRING_KICK, vring_descriptor(1), [full])
    for descriptor in (random, full):
        os.close(descriptor)
    front.get_u64(Id.GET_FEATURES)
    time.sleep(0.02)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.1
    for index, each in enumerate((ring, other)):
        front.set_kick(each)
        assert front.exchange(each, b"abc", 8) == bytes([index]) + b"cba"


def test_two_rings_may_have_the_same_kick_descriptor_one_of_which_is_stopped(front: FrontEnd, memory: Memory) -> None:
    ring, other = two_rings(front, memory)
    kick = front.own(NonblockingEventfd())
    for each in (ring, other):
        front.set_kick(each, kick)
    for _ in range(3):
        assert front.exchange(ring, b"abc", 8) == b"\0cba"
        assert front.exchange(other, b"abc", 8) == b"\x01cba"
    chain = other.add([b"abc"], [8])
    front.kick(other)
    front.stop(ring)
    [(_, length)] = other.wait()
    assert chain.written(length) == b"\x01cba"
    wait_until(lambda: not select.select([kick.peer], [], [], 0)[0], "the kick was heard")
    assert front.exchange(other, b"def", 8) == b"\x01fed"


def test_call_descriptors_that_are_full_closed_or_not_writable_are_no_trouble(front: FrontEnd, memory: Memory) -> None:
    ring, _ = two_rings(front, memory)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    ours, theirs = socket.socketpair()
    ours.close()
    full = os.eventfd(0xFFFF_FFFF)
    os.eventfd_write(full, 0xFFFF_FFFF_FFFF_FFFE - 0xFFFF_FFFF)
    folder = os.open("/", os.O_RDONLY)
    for descriptor in (writer, reader, theirs.fileno(), full, folder):
        front.tell(Id.SET_VRING_CALL, vring_descriptor(0), [descriptor])
        assert front.exchange(ring, b"abc", 8) == b"\0cba"
    os.close(reader)
    front.tell(Id.SET_VRING_CALL, vring_descriptor(0), [writer])
    assert front.exchange(ring, b"abc", 8) == b"\0cba"
    theirs.close()
    for descriptor in (writer, full, folder):
        os.close(descriptor)


def test_a_call_descriptor_that_is_made_to_block_when_it_is_full_costs_a_moment(
    front: FrontEnd, memory: Memory
) -> None:
    ring, other = two_rings(front, memory)
    event = os.eventfd(0, os.EFD_NONBLOCK)
    front.tell(Id.SET_VRING_CALL, vring_descriptor(0), [event])
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(event)
    os.eventfd_write(event, 0xFFFF_FFFF_FFFF_FFFE)
    # The flag is one for all who have the descriptor.
    os.set_blocking(event, True)
    for _ in range(3):
        assert front.exchange(ring, b"abc", 8) == b"\0cba"
    assert front.exchange(other, b"abc", 8) == b"\x01cba"
    os.close(event)


# --- Streams that cannot be followed ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "error"),
    [
        ((46, NEED_REPLY, 0), "unknown request 46 of the front-end"),
        ((0, NEED_REPLY, 0), "unknown request 0"),
        ((0xFFFF_FFFF, NEED_REPLY, 0), "unknown request 4294967295"),
        ((Id.GET_FEATURES, REQUEST, 4097), "announces 4097 bytes of payload; at most 4096"),
        ((Id.GET_FEATURES, REQUEST, 0xFFFF_FFFF), "announces 4294967295 bytes"),
        ((Id.GET_FEATURES, 0, 0), "has the flags 0x0; a request has 0x1"),
        ((Id.GET_FEATURES, 2, 0), "has the flags 0x2"),
        ((Id.GET_FEATURES, 5, 0), "has the flags 0x5"),
        ((Id.GET_FEATURES, 0x11, 0), "has the flags 0x11"),
        ((Id.GET_FEATURES, 0x8000_0001, 0), "has the flags 0x80000001"),
    ],
)
def test_a_header_that_means_nothing_closes_the_connection_with_a_clear_error(
    front: FrontEnd, device: Witness, header: tuple[int, int, int], error: str
) -> None:
    front.send_bytes(HEADER.pack(*header))
    assert front.is_closed()
    wait_until(lambda: device.ends, "the device is told")
    assert isinstance(device.ends[0], vu.ProtocolError)
    assert error in str(device.ends[0])


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"\x01", "ended after 1 of the 12 bytes of a header"),
        (HEADER.pack(Id.SET_FEATURES, REQUEST, 8) + b"1234567", "after 7 of the 8 payload bytes of request 2"),
        (HEADER.pack(Id.SET_FEATURES, REQUEST, 8), "after 0 of the 8 payload bytes of request 2"),
    ],
)
def test_an_end_inside_a_message_is_an_error(path: Path, device: Witness, data: bytes, error: str) -> None:
    with FrontEnd(path) as front:
        front.send_bytes(data)
    wait_until(lambda: device.ends, "the device is told")
    assert error in str(device.ends[0])


def test_an_end_between_two_messages_is_not_an_error(path: Path, device: Witness) -> None:
    with FrontEnd(path) as front:
        front.tell(Id.SET_OWNER)
    wait_until(lambda: device.ends, "the device is told")
    assert device.ends == [None]


def test_noise_is_refused(path: Path) -> None:
    for size in range(12, 2000, 40):
        with FrontEnd(path) as front, contextlib.suppress(ConnectionError):
            front.send_bytes(os.urandom(size))
            assert front.is_closed()


#: Numbers at which something begins or ends.
EDGES = st.sampled_from([0, 1, 2, 3, 4, 15, 16, 17, 255, 256, 4095, 4096, 32768, 65535, 65536]) | st.sampled_from(
    [1 << 20, 0x4000_0000, 0x7F12_0000_0000, (1 << 32) - 1, 1 << 32, 1 << 63, TOP - 4096, TOP - 1]
)
WORDS = st.lists(EDGES, max_size=9).map(lambda words: struct.pack(f"={len(words)}Q", *words))
HALVES = st.lists(EDGES.map(lambda word: word & 0xFFFF_FFFF), max_size=6).map(
    lambda words: struct.pack(f"={len(words)}I", *words)
)
MESSAGES = st.lists(
    st.tuples(st.integers(1, 45), st.sampled_from([REQUEST, NEED_REPLY]), WORDS | HALVES, st.integers(0, 2)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=MESSAGES)
def test_messages_of_strange_numbers_do_no_harm_while_rings_run(
    path: Path, messages: list[tuple[int, int, bytes, int]]
) -> None:
    with FrontEnd(path) as front, Memory() as memory:
        two_rings(front, memory)
        with contextlib.suppress(ConnectionError):
            for request, flags, payload, count in messages:
                front.send(request, payload, [memory.descriptor] * count, flags=flags)
    # Of what it set up nothing is left; the fixtures look for the rest.
    with FrontEnd(path) as front:
        assert front.get(Id.GET_VRING_BASE, vring_state(0)) == vring_state(0, 0)


# --- Peers that take their time ---------------------------------------------------------------------------------------


def unread(front: FrontEnd) -> int:
    """Bytes that the device has not read."""
    (count,) = struct.unpack("=i", fcntl.ioctl(front.socket, termios.TIOCOUTQ, bytes(4)))
    return int(count)


def wait_for_turns(device: vu.Device) -> None:
    """Wait until the device has looked at everything that has happened so far."""
    for _ in range(3):
        came = threading.Event()
        device.loop.call_soon(came.set)
        assert came.wait(DEADLINE)


def wait_until_nothing_is_read(front: FrontEnd, device: vu.Device) -> None:
    while True:
        left = unread(front)
        wait_for_turns(device)
        if left and left == unread(front):
            break


def ask_until_nothing_goes(front: FrontEnd, device: vu.Device) -> None:
    """Send requests and read no answers, until the socket takes no more, because the device reads nothing."""
    front.socket.setblocking(False)
    message = HEADER.pack(Id.GET_CONFIG, REQUEST, 4096) + config(0, bytes(4084))
    rest, left = message, 0
    while not left or left != unread(front):
        with contextlib.suppress(BlockingIOError):
            while True:
                rest = rest[front.socket.send(rest) :] or message
        left = unread(front)
        wait_for_turns(device)
    front.socket.setblocking(True)


def test_a_front_end_that_reads_no_answers_is_given_up(front: FrontEnd, device: Witness) -> None:
    ask_until_nothing_goes(front, device)
    wait_until(lambda: device.ends, "the device gives up")
    assert isinstance(device.ends[0], vu.PeerTimeout)
    assert str(device.ends[0]) == "the front-end has read none of our answers for 3 seconds"


def test_the_process_goes_on_while_a_front_end_reads_no_answers(
    front: FrontEnd, device: Witness, memory: Memory
) -> None:
    ring, _ = two_rings(front, memory)
    ask_until_nothing_goes(front, device)
    assert front.exchange(ring, b"abc", 8) == b"\0cba"
    assert device.ends == []


def test_answers_that_are_read_late_are_complete(front: FrontEnd, device: Witness) -> None:
    requests = 300

    def ask() -> None:
        for _ in range(requests):
            front.send(Id.GET_CONFIG, config(0, bytes(4084)))

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: unread(front), "it asks faster than it is answered")
    wait_until_nothing_is_read(front, device)
    assert asking.is_alive()
    for _ in range(requests):
        assert front.reply_to(Id.GET_CONFIG) == config(0, b"\x01".ljust(4084, b"\0"))
    asking.join()


def test_a_device_stops_although_its_front_end_reads_nothing(tmp_path: Path, level: None) -> None:
    device = Witness()
    server = device.start(tmp_path / "stop.sock")
    with FrontEnd(tmp_path / "stop.sock") as front:
        ask_until_nothing_goes(front, device)
        server.stop()
    # Not because it was given up.
    assert device.ends == [None]


def test_half_a_message_does_not_hold_the_rings_up(front: FrontEnd, memory: Memory) -> None:
    ring, _ = two_rings(front, memory)
    front.send_bytes(HEADER.pack(Id.GET_FEATURES, REQUEST, 0)[:5])
    assert front.exchange(ring, b"abc", 8) == b"\0cba"


def test_a_queue_that_is_never_empty_leaves_time_for_the_others(serve: Serve, connect: Connect, memory: Memory) -> None:
    class Slow(vu.Device, device_id=NO_TYPE):
        slowq = vu.Queue()
        fastq = vu.Queue()
        level = vu.config.u8(0, writable=True)
        done = 0

        def __init__(self) -> None:
            self.go = threading.Event()
            self.begun = threading.Event()
            self.when: dict[str, int] = {}

        @slowq.handler
        def dawdle(self, request: vu.Request) -> None:
            self.begun.set()
            assert self.go.wait(DEADLINE)
            time.sleep(0.0001)
            self.done += 1

        @fastq.handler
        def answer(self, request: vu.Request) -> None:
            request.write(b"ok")
            self.when["the other queue"] = self.done

        def on_config_write(self, field: vu.config.Field[Any], old: object, new: object) -> None:
            self.when["the front-end"] = self.done

    device = Slow()
    front = connect(serve(device))
    front.negotiate()
    front.share(memory)
    slow, fast = Ring(memory, 0, size=1024), Ring(memory, 1)
    front.start(slow)
    front.start(fast)
    for _ in range(1000):
        slow.add([], [1])
    front.kick(slow)
    assert device.begun.wait(DEADLINE)
    fast.add([], [8])
    front.kick(fast)
    front.send(Id.SET_CONFIG, config(0, b"\1"), flags=NEED_REPLY)
    device.go.set()
    slow.wait(1000)
    assert len(fast.wait()) == 1
    assert front.reply_to(Id.SET_CONFIG) == u64(0)
    assert device.when.keys() == {"the other queue", "the front-end"}
    assert max(device.when.values()) < 200


# --- Memory that goes away --------------------------------------------------------------------------------------------


def test_memory_that_is_cut_off_under_a_ring_ends_the_session(
    front: FrontEnd, device: Witness, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    ring, _ = two_rings(front, memory)
    assert front.exchange(ring, b"abc", 8) == b"\0cba"
    memory.map.close()
    os.truncate(memory.descriptor, 0)
    front.kick(ring)
    assert front.is_closed()
    wait_until(lambda: device.ends, "the device is told")
    assert "shrank the file behind the 0x100000 bytes of guest memory at 0x40000000" in str(device.ends[0])


def test_memory_that_is_cut_off_under_a_request_reads_as_zeroes_and_ends_the_session(
    serve: Serve, connect: Connect, memory: Memory, tmp_path: Path
) -> None:
    device = Hold()
    front = connect(serve(device))
    with Memory(PAGE * 4, guest=0x8000_0000, user=0x7E00_0000_0000) as buffers:
        front.negotiate()
        front.share(memory, buffers)
        ring = Ring(memory)
        front.start(ring)
        for _ in range(3):
            ring.add([b"abc"], [8], memory=buffers)
        front.kick(ring)
        reader, mover, lender = device.next(), device.next(), device.next()
        [view] = lender.readable_buffers()
        assert bytes(view) == b"abc"
        os.truncate(buffers.descriptor, 0)

        with open(tmp_path / "file", "w+b") as file, contextlib.suppress(OSError):
            mover.copy_to_file(file, 0)
        assert reader.read() == bytes(3)
        assert bytes(view) == bytes(3)
        del view
        for request in (reader, mover, lender):
            request.complete()
        front.kick(ring)
        assert front.is_closed()


def test_memory_that_grows_back_does_not_matter(front: FrontEnd, memory: Memory) -> None:
    ring, _ = two_rings(front, memory)
    os.truncate(memory.descriptor, memory.size * 2)
    assert front.exchange(ring, b"abc", 8) == b"\0cba"


def test_the_log_follows_the_level_that_its_logger_has_now(front: FrontEnd, caplog: pytest.LogCaptureFixture) -> None:
    front.tell(Id.SET_OWNER)
    with caplog.at_level(logging.CRITICAL, "vhost_user"):
        assert front.ask(Id.SET_VRING_NUM, vring_state(0, 48)) != 0
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING, "vhost_user"):
        assert front.ask(Id.SET_VRING_NUM, vring_state(0, 48)) != 0
    assert "refused: SET_VRING_NUM: queue 0 asked for 48 entries" in caplog.text


def test_a_flood_of_refused_messages_does_not_fill_the_log(front: FrontEnd, caplog: pytest.LogCaptureFixture) -> None:
    before = time.monotonic()
    for _ in range(1000):
        assert front.ask(Id.SET_VRING_NUM, vring_state(0, 48)) != 0
    seconds = time.monotonic() - before
    assert 20 <= caplog.text.count("refused: SET_VRING_NUM") <= 21 + seconds


def test_a_ring_that_breaks_again_and_again_does_not_fill_the_log(
    front: FrontEnd, device: Witness, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    before = time.monotonic()
    ring, _ = two_rings(front, memory)
    ring.offer(ring.size)
    front.kick(ring)
    for times in range(1, 200):
        wait_until(lambda: len(device.queue_errors) == times, "the ring is broken")  # noqa: B023
        # It starts anew where it was.
        front.set_kick(ring)
    wait_until(lambda: len(device.queue_errors) == 200, "the ring is broken")
    seconds = time.monotonic() - before
    assert 20 <= caplog.text.count("the queue is stopped") <= 21 + seconds
