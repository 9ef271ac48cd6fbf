"""The dirty log, by which a front-end that migrates a guest learns what the device wrote. vhost-user, "Migration"."""

from __future__ import annotations

import mmap
import os
import struct

from .harness import QUIET, Case, Differs, Skipped, check, fail
from .wire import Chain, Closed, Feature, Memory, Notifier, PackedRing, Protocol, Ring, SplitRing, Wire, u64

_MIGRATION = "vhost-user: Migration"
_BASE = "vhost-user: VHOST_USER_SET_LOG_BASE"
_NEEDS = "request LOG_SHMFD LOG_ALL"
_PAGE = 4096


class Log:
    """A bit for each page of guest memory, in a file with a page on either side that is not the log's."""

    def __init__(self, memory: Memory, *, size: int | None = None) -> None:
        self.offset = _PAGE
        # A bit for every page up to the end of memory.
        self.size = size or -(-(memory.guest + memory.size) // (8 * _PAGE))
        self.descriptor = os.memfd_create("log", os.MFD_CLOEXEC)
        os.truncate(self.descriptor, _PAGE + self.size + _PAGE)
        self._map = mmap.mmap(self.descriptor, 0)

    @property
    def payload(self) -> bytes:
        """The payload of SET_LOG_BASE."""
        return struct.pack("=QQ", self.size, self.offset)

    def take(self) -> set[int]:
        """The guest addresses of the pages that are marked. Their marks are cleared."""
        content = self._map[self.offset : self.offset + self.size]
        self._map[self.offset : self.offset + self.size] = bytes(self.size)
        return {
            (8 * at + bit) * _PAGE for at, byte in enumerate(content) if byte for bit in range(8) if byte >> bit & 1
        }

    @property
    def is_overrun(self) -> bool:
        """Whether something was written beside it."""
        return any(self._map[: self.offset]) or any(self._map[self.offset + self.size :])

    def close(self) -> None:
        self._map.close()
        os.close(self.descriptor)


# --- What QEMU says when a migration begins ---------------------------------------------------------------------------


def _running(case: Case) -> tuple[Wire, SplitRing]:
    """A ring that runs in pages of its own; nothing is logged."""
    wire = case.negotiated(Protocol.LOG_SHMFD)
    memory = case.memory()
    case.share(wire, memory)
    ring = case.new_ring(memory)
    case.start(wire, ring)
    return wire, ring


def _is_taken(wire: Wire, log: Log) -> bool:
    """SET_LOG_BASE, which is always answered: with nothing, 0, or what was said, of which libvhost-user has 8 bytes."""
    answer = wire.ask("SET_LOG_BASE", log.payload, [log.descriptor])
    return len(answer.payload) != 8 or answer.u64 in {0, log.size}


def _set_base(wire: Wire, log: Log) -> None:
    if not _is_taken(wire, log):
        fail(f"SET_LOG_BASE was refused: {wire.log[-1]}", "the log is taken")


def _switch(case: Case, wire: Wire, ring: Ring, on: bool, *extra: Feature) -> None:
    """Log from now on what the device writes, and its used ring; or nothing any more."""
    features = case.device_features | case.facts.features & (Feature.VERSION_1 | Feature.PROTOCOL_FEATURES)
    for flag in (*extra, *([Feature.LOG_ALL] if on else [])):
        features |= flag
    case.tell(wire, "SET_FEATURES", u64(features))
    written = ring.descriptors if isinstance(ring, PackedRing) else ring.used
    case.tell(wire, "SET_VRING_ADDR", ring.address_payload(log=written if on else None))


def _logged(case: Case) -> tuple[Wire, SplitRing, Log]:
    """A ring that runs, of which all is logged."""
    wire, ring = _running(case)
    log = case.own(Log(ring.memory))
    _set_base(wire, log)
    _switch(case, wire, ring, True)
    log.take()
    return wire, ring, log


def _perform(case: Case, ring: Ring) -> set[int]:
    """Do a request whose room is in pages of its own. Returns the pages that the device wrote to."""
    ring.memory.allocate(0, _PAGE)
    chain = ring.add(case.exercise.readable, case.exercise.writable)
    ring.kick.signal()
    entries = ring.wait(1, case.timeout)
    if not entries:
        fail(f"the request was not completed within {case.timeout:g} s", "a used entry")
    case.judge(ring, [(chain.head, ring.data(chain))], entries)
    return _pages(chain, entries[0][1])


def _pages(chain: Chain, written: int) -> set[int]:
    pages: set[int] = set()
    for address, size in chain.writable:
        count = min(size, written)
        written -= count
        if count:
            pages.update(range(address // _PAGE * _PAGE, address + count, _PAGE))
    return pages


def _page(address: int) -> int:
    return address // _PAGE * _PAGE


def _must_be_clean(log: Log) -> None:
    marked = log.take()
    if marked:
        fail(f"{_shown(marked)} is marked", "nothing")


def _must_have(log: Log, pages: set[int], what: str) -> None:
    marked = log.take()
    missing = pages - marked
    if missing:
        fail(f"{what}, at {_shown(missing)}, is not marked; {_shown(marked) or 'nothing'} is", "a mark")


def _shown(pages: set[int]) -> str:
    return ", ".join(f"{page:#x}" for page in sorted(pages))


# --- Marks ------------------------------------------------------------------------------------------------------------


@check("log.data", _MIGRATION, needs=_NEEDS)
def data(case: Case) -> None:
    """With LOG_ALL, set while the ring runs, the pages that the device writes to are marked."""
    _, ring, log = _logged(case)
    for _ in range(3):
        pages = _perform(case, ring)
        if not pages:
            raise Skipped("the device wrote nothing but the used ring")
        _must_have(log, pages, "what the device wrote")


@check("log.used-ring", _MIGRATION, needs=_NEEDS)
def used_ring(case: Case) -> None:
    """With the flag of SET_VRING_ADDR, the used ring is marked where that message says."""
    wire, ring, log = _logged(case)
    _perform(case, ring)
    _must_have(log, {_page(ring.used)}, "the used ring")
    # Elsewhere, as nobody has it, so that it is plain whose address is taken.
    elsewhere = ring.memory.guest + ring.memory.size - _PAGE
    case.tell(wire, "SET_VRING_ADDR", ring.address_payload(log=elsewhere))
    _perform(case, ring)
    _must_have(log, {elsewhere}, "the used ring as it is logged")


@check("log.packed", _MIGRATION, needs=f"{_NEEDS} RING_PACKED")
def packed(case: Case) -> None:
    """What is written to a packed ring is marked, too."""
    wire, ring = case.running_packed(Protocol.LOG_SHMFD)
    log = case.own(Log(ring.memory))
    _set_base(wire, log)
    _switch(case, wire, ring, True, Feature.RING_PACKED)
    log.take()
    _must_have(log, _perform(case, ring) | {_page(ring.descriptors)}, "what the device wrote, or the ring")


@check("log.nothing-else", _MIGRATION, needs=_NEEDS)
def nothing_else(case: Case) -> None:
    """Pages that the device does not write to are not marked."""
    _, ring, log = _logged(case)
    pages = _perform(case, ring) | {_page(ring.used), _page(ring.used + 6 + 8 * ring.size - 1)}
    more = log.take() - pages
    memory = ring.memory
    outside = {page for page in more if not memory.guest <= page < memory.guest + memory.size}
    if outside:
        fail(f"{len(outside)} pages are marked, from {min(outside):#x}, where there is no memory", "no such mark")
    if more:
        raise Differs(f"{_shown(more)} is marked as well, which costs time and does no harm", "no other mark")


@check("log.off", _MIGRATION, needs=_NEEDS)
def off(case: Case) -> None:
    """Without LOG_ALL and the flag of SET_VRING_ADDR, nothing is marked, though there is a log."""
    wire, ring = _running(case)
    log = case.own(Log(ring.memory))
    _set_base(wire, log)
    _perform(case, ring)
    _must_be_clean(log)


@check("log.switched-off", _MIGRATION, needs=_NEEDS)
def switched_off(case: Case) -> None:
    """After LOG_ALL and the flag are taken back, nothing is marked any more."""
    wire, ring, log = _logged(case)
    _perform(case, ring)
    _switch(case, wire, ring, False)
    log.take()
    _perform(case, ring)
    _must_be_clean(log)


# --- Messages ---------------------------------------------------------------------------------------------------------


@check("log.replaced", _BASE, needs=_NEEDS)
def replaced(case: Case) -> None:
    """A log may be replaced while the ring runs; after the answer nothing is marked in the one before."""
    wire, ring, before = _logged(case)
    _perform(case, ring)
    log = case.own(Log(ring.memory))
    _set_base(wire, log)
    before.take()
    pages = _perform(case, ring) | {_page(ring.used)}
    _must_have(log, pages, "what the device wrote")
    marked = before.take()
    if marked:
        fail(f"{_shown(marked)} is marked in the log that was replaced", "nothing")


@check("log.smaller-than-memory", _BASE, needs=_NEEDS, may_kill=True)
def smaller_than_memory(case: Case) -> None:
    """A log that has no bits for all of memory is refused, or kept to: nothing is written beside it."""
    wire, ring = _running(case)
    log = case.own(Log(ring.memory, size=_PAGE))
    try:
        if not _is_taken(wire, log):
            return
    except Closed:
        return
    _switch(case, wire, ring, True)
    _perform(case, ring)
    if log.is_overrun:
        fail("the device wrote beside the log", "nothing")


@check("log.larger-than-its-file", _BASE, needs=_NEEDS, may_kill=True)
def larger_than_its_file(case: Case) -> None:
    """A log that ends behind its file is refused."""
    wire, ring = _running(case)
    log = case.own(Log(ring.memory))
    os.truncate(log.descriptor, 2 * _PAGE)
    try:
        if not _is_taken(wire, log):
            return
    except Closed:
        return
    # Whoever takes it shall at least live on when there is nothing to write to.
    _switch(case, wire, ring, True)
    _perform(case, ring)
    raise Differs("accepted, and the marks are lost", "a refusal, or the end of the connection")


@check("log.descriptor", "vhost-user: VHOST_USER_SET_LOG_FD", needs=_NEEDS)
def descriptor(case: Case) -> None:
    """The descriptor of SET_LOG_FD is told of marks."""
    wire, ring, _ = _logged(case)
    notifier = case.own(Notifier())
    case.tell(wire, "SET_LOG_FD", b"", [notifier.descriptor])
    notifier.came(QUIET)
    _perform(case, ring)
    if not notifier.came(min(case.timeout, 10 * QUIET)):
        raise Differs("nothing came; the text says no more than that there is such a descriptor", "a notification")
