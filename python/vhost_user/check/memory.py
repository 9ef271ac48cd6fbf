"""Guest memory: tables, slots, and what cannot be mapped."""

from __future__ import annotations

import struct

from .harness import Case, Differs, check, fail
from .wire import WRITE, Memory, Protocol

_TABLE = "vhost-user: VHOST_USER_SET_MEM_TABLE"
_SLOTS = "vhost-user: VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS"
PAGE = 0x1000


def _table(*regions: bytes, count: int | None = None) -> bytes:
    return struct.pack("=II", len(regions) if count is None else count, 0) + b"".join(regions)


def _single(region: bytes) -> bytes:
    return bytes(8) + region


@check("memory.table", _TABLE, needs="REPLY_ACK")
def table(case: Case) -> None:
    """A table of one region is accepted."""
    case.share(case.negotiated(), case.memory())


@check("memory.eight-regions", _TABLE, needs="REPLY_ACK")
def eight_regions(case: Case) -> None:
    """A table may have eight regions."""
    memories = [case.memory(size=PAGE, guest=at << 20, user=(at + 64) << 20) for at in range(1, 9)]
    case.share(case.negotiated(), *memories)


@check("memory.file-offset", "vhost-user: Memory region description", needs="request")
def file_offset(case: Case) -> None:
    """A region begins in its file where mmap_offset says."""
    wire = case.negotiated()
    memory = case.memory(offset=16 * PAGE)
    case.share(wire, memory)
    ring = case.new_ring(memory)
    case.start(wire, ring)
    case.perform(ring)


@check("memory.two-regions", "vhost-user: Memory access", needs="request")
def two_regions(case: Case) -> None:
    """A ring in one region has its requests in another."""
    wire = case.negotiated()
    memory, other = case.memory(), case.memory(guest=0x9000_0000, user=0x7000_0000)
    case.share(wire, memory, other)
    ring = case.new_ring(memory)
    case.start(wire, ring)
    case.perform(ring, memory=other)


@check("memory.table-replaced", _TABLE, needs="request")
def table_replaced(case: Case) -> None:
    """A table replaces the one before, also at the same addresses."""
    wire, ring = case.running()
    case.perform(ring)
    case.stop(wire, ring)
    memory = case.memory()
    case.share(wire, memory)
    ring = case.new_ring(memory)
    case.start(wire, ring)
    case.perform(ring)


@check("memory.table-while-running", _TABLE, needs="request")
def table_while_running(case: Case) -> None:
    """A table may come while a ring runs, as when QEMU plugs memory, and the ring goes on."""
    wire, ring = case.running()
    case.perform(ring)
    case.share(wire, ring.memory, case.memory(guest=0x9000_0000, user=0x7000_0000))
    case.perform(ring)


@check("memory.buffer-across-regions", "Virtio 1.3, 2.7.5: The Virtqueue Descriptor Table", needs="request")
def buffer_across_regions(case: Case) -> None:
    """A buffer may begin in one region and end in the next, which is another file."""
    size = max([len(data) for data in case.exercise.readable] + case.exercise.writable)
    if size < 2:
        return
    wire = case.negotiated()
    first = case.memory(size=16 * PAGE)
    second = case.memory(size=PAGE, guest=first.guest + first.size, user=0x7000_0000)
    case.share(wire, first, second)
    ring = case.new_ring(first)
    case.start(wire, ring)
    plain = case.perform(ring)
    lengths = [(len(data), 0) for data in case.exercise.readable] + [(room, WRITE) for room in case.exercise.writable]
    border = first.guest + first.size
    crossing = max(range(len(lengths)), key=lambda at: lengths[at][0])
    pieces = [
        (border - length // 2 if at == crossing else first.allocate(length), length, flags)
        for at, (length, flags) in enumerate(lengths)
    ]
    for (address, length, _), data in zip(pieces, case.exercise.readable, strict=False):
        _write(first, second, address, data[:length])
    head = ring.add_pieces(pieces)
    ring.kick.signal()
    entries = ring.wait(1, case.timeout)
    if not entries:
        raise Differs(
            "the request was not completed; rust-vmm translates a buffer within one region only", "a used entry"
        )
    room = b"".join(_read(first, second, address, length) for address, length, flags in pieces if flags)
    problem = case.exercise.problem(room, entries[0][1])
    if problem and case.device.name == "blk" and entries[0][0] == head and room[-1:] == b"\1":
        raise Differs("the request ended with an error; rust-vmm translates within one region only", "status 0")
    case.judge(ring, [(head, room)], entries)
    if case.device.name == "blk" and room != plain:
        fail("sector 0 reads otherwise than into one region", "the same bytes")


def _write(first: Memory, second: Memory, address: int, data: bytes) -> None:
    border = second.guest
    here = data[: max(0, border - address)]
    first.write(address, here)
    if len(here) < len(data):
        second.write(border, data[len(here) :])


def _read(first: Memory, second: Memory, address: int, size: int) -> bytes:
    here = min(size, max(0, second.guest - address))
    return first.read(address, here) + second.read(second.guest, size - here)


@check("memory.table-without-descriptors", _TABLE, needs="REPLY_ACK")
def table_without_descriptors(case: Case) -> None:
    """A table whose regions have no descriptors is refused."""
    region = case.memory().region()
    case.must_refuse(case.negotiated(), "a region came without its descriptor", "SET_MEM_TABLE", _table(region))


@check("memory.table-cut-short", _TABLE, needs="REPLY_ACK")
def table_cut_short(case: Case) -> None:
    """A table that announces more regions than its payload has is refused."""
    memory = case.memory()
    fds = [memory.descriptor] * 2
    wire = case.negotiated()
    case.must_refuse(wire, "of two regions one was sent", "SET_MEM_TABLE", _table(memory.region(), count=2), fds)


@check("memory.table-of-thousands", _TABLE, needs="REPLY_ACK")
def table_of_thousands(case: Case) -> None:
    """A table that announces 2^32 - 1 regions is refused."""
    memory = case.memory()
    payload = _table(memory.region(), count=0xFFFF_FFFF)
    case.must_refuse(
        case.negotiated(), "there cannot be as many regions", "SET_MEM_TABLE", payload, [memory.descriptor]
    )


@check("memory.region-past-end-of-file", "vhost-user: Memory region description", needs="REPLY_ACK")
def region_past_end_of_file(case: Case) -> None:
    """A region that is larger than its file is refused: touching its end would be fatal."""
    memory = case.memory()
    payload = _table(memory.region(size=memory.size * 2))
    who = "libvhost-user does so, and dies if a driver uses the part that is not there"
    case.should_refuse(
        case.negotiated(), "half of the region is not in its file", who, "SET_MEM_TABLE", payload, [memory.descriptor]
    )


@check("memory.region-of-no-size", "vhost-user: Memory region description", needs="REPLY_ACK")
def region_of_no_size(case: Case) -> None:
    """A region of no bytes is refused."""
    memory = case.memory()
    payload = _table(memory.region(size=0))
    who = "nothing can be mapped, and nothing is lost"
    case.should_refuse(case.negotiated(), "it has no bytes", who, "SET_MEM_TABLE", payload, [memory.descriptor])


@check("memory.region-wraps", "vhost-user: Memory region description", needs="REPLY_ACK")
def region_wraps(case: Case) -> None:
    """A region that ends beyond the last address is refused."""
    memory = case.memory()
    payload = _table(memory.region(guest=(1 << 64) - PAGE))
    who = "libvhost-user does not look, either"
    case.should_refuse(case.negotiated(), "it wraps around", who, "SET_MEM_TABLE", payload, [memory.descriptor])


@check("memory.regions-overlap", "vhost-user: Memory region description", needs="REPLY_ACK")
def regions_overlap(case: Case) -> None:
    """Regions that overlap are refused."""
    memory = case.memory()
    payload = _table(memory.region(), memory.region(user=0x7000_0000))
    who = "older versions of libvhost-user use the one that they find first"
    case.should_refuse(
        case.negotiated(),
        "two regions have the same guest addresses",
        who,
        "SET_MEM_TABLE",
        payload,
        [memory.descriptor] * 2,
    )


# --- Slots ------------------------------------------------------------------------------------------------------------


@check("memory.slots", _SLOTS, needs="CONFIGURE_MEM_SLOTS REPLY_ACK")
def slots(case: Case) -> None:
    """GET_MAX_MEM_SLOTS answers a number of slots, and as many regions can be added (32 are tried)."""
    wire = case.negotiated(Protocol.CONFIGURE_MEM_SLOTS)
    count = wire.ask("GET_MAX_MEM_SLOTS").u64
    if count < 1:
        fail(f"{count} slots", "at least one")
    for at in range(1, min(count, 32) + 1):
        memory = case.memory(size=PAGE, guest=at << 20, user=(at + 64) << 20)
        case.tell(wire, "ADD_MEM_REG", _single(memory.region()), [memory.descriptor])


@check("memory.add", _SLOTS, needs="CONFIGURE_MEM_SLOTS request")
def add(case: Case) -> None:
    """A region that was added is used."""
    wire = case.negotiated(Protocol.CONFIGURE_MEM_SLOTS)
    memory = case.memory()
    case.tell(wire, "ADD_MEM_REG", _single(memory.region()), [memory.descriptor])
    ring = case.new_ring(memory)
    case.start(wire, ring)
    case.perform(ring)


@check("memory.remove", _SLOTS, needs="CONFIGURE_MEM_SLOTS REPLY_ACK")
def remove(case: Case) -> None:
    """A region that was added can be removed, and added again."""
    wire = case.negotiated(Protocol.CONFIGURE_MEM_SLOTS)
    memory = case.memory()
    case.tell(wire, "ADD_MEM_REG", _single(memory.region()), [memory.descriptor])
    case.tell(wire, "REM_MEM_REG", _single(memory.region()))
    case.tell(wire, "ADD_MEM_REG", _single(memory.region()), [memory.descriptor])


@check("memory.remove-unknown", _SLOTS, needs="CONFIGURE_MEM_SLOTS REPLY_ACK")
def remove_unknown(case: Case) -> None:
    """Removing a region that was never added is refused."""
    wire = case.negotiated(Protocol.CONFIGURE_MEM_SLOTS)
    why = "no such region was ever added"
    region = _single(case.memory().region())
    case.should_refuse(wire, why, "nothing is lost; libvhost-user refuses", "REM_MEM_REG", region)


@check("memory.add-without-descriptor", _SLOTS, needs="CONFIGURE_MEM_SLOTS REPLY_ACK")
def add_without_descriptor(case: Case) -> None:
    """Adding a region without its descriptor is refused."""
    wire = case.negotiated(Protocol.CONFIGURE_MEM_SLOTS)
    case.must_refuse(wire, "the region came without its descriptor", "ADD_MEM_REG", _single(case.memory().region()))


@check("memory.add-twice", _SLOTS, needs="CONFIGURE_MEM_SLOTS REPLY_ACK")
def add_twice(case: Case) -> None:
    """Adding a region where one is already is refused."""
    wire = case.negotiated(Protocol.CONFIGURE_MEM_SLOTS)
    memory = case.memory()
    case.tell(wire, "ADD_MEM_REG", _single(memory.region()), [memory.descriptor])
    who = "older versions of libvhost-user use the one that they find first"
    case.should_refuse(wire, "it overlaps another", who, "ADD_MEM_REG", _single(memory.region()), [memory.descriptor])
