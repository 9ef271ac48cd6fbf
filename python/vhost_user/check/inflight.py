"""The in-flight record: what a device that is killed leaves to the next. vhost-user, "Inflight I/O tracking"."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from typing import NamedTuple

from .harness import QUIET, Case, Differs, Skipped, check, fail
from .wire import Chain, Feature, Protocol, SplitRing, Wire, wait_until

_TRACKING = "vhost-user: Inflight I/O tracking"
_GET = "vhost-user: VHOST_USER_GET_INFLIGHT_FD"
_SET = "vhost-user: VHOST_USER_SET_INFLIGHT_FD"
_SIZE = 16


class Entry(NamedTuple):
    """What the record of a split ring has of a descriptor."""

    inflight: int
    following: int
    counter: int


class Record:
    """A record in a file: the parts of the queues, one behind the other, in the byte order of the machine."""

    def __init__(self, case: Case, descriptor: int, size: int, offset: int, queues: int, queue_size: int) -> None:
        self.descriptor = descriptor
        self.size = size
        self.offset = offset
        self.queues = queues
        self.queue_size = queue_size
        self.file_size = os.fstat(descriptor).st_size
        self._timeout = case.timeout
        self._map: mmap.mmap | None = None

    @property
    def payload(self) -> bytes:
        """The payload of SET_INFLIGHT_FD."""
        return _description(self.size, self.offset, self.queues, self.queue_size)

    @property
    def bytes(self) -> mmap.mmap:
        """The whole file."""
        if self._map is None:
            self._map = mmap.mmap(self.descriptor, self.file_size)
        return self._map

    def part(self, queue: int) -> int:
        """Where the part of a queue begins."""
        return self.offset + queue * _stride(self.queue_size, packed=False)

    def header(self, queue: int) -> tuple[int, ...]:
        """Version, number of descriptors, the head of the last batch, used index."""
        return struct.unpack_from("=HHHH", self.bytes, self.part(queue) + 8)

    def entries(self, queue: int) -> list[Entry]:
        """One for each descriptor."""
        at = self.part(queue) + 16
        return [Entry(*struct.unpack_from("=B5xHQ", self.bytes, at + 16 * n)) for n in range(self.queue_size)]

    def write(self, queue: int, used_index: int, last_batch_head: int, entries: dict[int, Entry]) -> None:
        """What a device that died has left."""
        struct.pack_into("=QHHHH", self.bytes, self.part(queue), 0, 1, self.queue_size, last_batch_head, used_index)
        for head, entry in entries.items():
            struct.pack_into("=B5xHQ", self.bytes, self.part(queue) + 16 + 16 * head, *entry)

    def becomes_clear(self, queue: int) -> bool:
        """Whether no entry is marked any more, soon."""
        return wait_until(lambda: not any(entry.inflight for entry in self.entries(queue)), self._timeout)

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
        os.close(self.descriptor)


def _description(size: int, offset: int, queues: int, queue_size: int) -> bytes:
    return struct.pack("=QQHHI", size, offset, queues, queue_size, 0)


def _stride(queue_size: int, *, packed: bool) -> int:
    """Bytes of a queue's part: a header and its entries, 16 bytes each or, in a packed ring's, 32, aligned to 64."""
    entry = 32 if packed else 16
    return -(-(entry + entry * queue_size) // 64) * 64


def _get(case: Case, wire: Wire, queues: int) -> Record:
    """GET_INFLIGHT_FD."""
    wire.send("GET_INFLIGHT_FD", _description(0, 0, queues, _SIZE))
    answer, descriptors = wire.receive_with_descriptors()
    for descriptor in descriptors[1:]:
        os.close(descriptor)
    if descriptors:
        record = Record(case, descriptors[0], 0, 0, queues, _SIZE)
        case.own(record)
    if len(answer.payload) < 20 or len(descriptors) != 1:
        fail(f"the back-end answered {answer}", "a description of 24 bytes, and a file")
    record.size, record.offset, record.queues, record.queue_size = struct.unpack_from("=QQHH", answer.payload)
    if (record.queues, record.queue_size) != (queues, _SIZE):
        fail(f"{record.queues} queues of {record.queue_size}", f"{queues} of {_SIZE}, as was asked for")
    if record.size > record.file_size - record.offset:
        fail(f"{record.size} bytes at {record.offset} of a file of {record.file_size}", "a file that has them")
    return record


def _negotiated(case: Case, *extra: Feature) -> Wire:
    return case.negotiated(Protocol.INFLIGHT_SHMFD, *extra)


def _queues(case: Case) -> int:
    """As many as the exercise needs."""
    return case.exercise.queue + 1


# --- The messages -----------------------------------------------------------------------------------------------------


@check("inflight.layout", _GET, needs="INFLIGHT_SHMFD")
def layout(case: Case) -> None:
    """The record has a part for each queue, with an entry for each descriptor, and is as large as the answer says."""
    _has_room(_get(case, _negotiated(case), _queues(case)), packed=False)


@check("inflight.layout-of-packed-rings", _GET, needs="INFLIGHT_SHMFD RING_PACKED")
def layout_of_packed_rings(case: Case) -> None:
    """When the rings are packed, the entries are larger."""
    _has_room(_get(case, _negotiated(case, Feature.RING_PACKED), _queues(case)), packed=True)


def _has_room(record: Record, *, packed: bool) -> None:
    expected = record.queues * _stride(record.queue_size, packed=packed)
    if record.size < expected:
        fail(f"{record.size} bytes for {record.queues} queues of {record.queue_size}", f"at least {expected}")


@check("inflight.zeroes", _GET, needs="INFLIGHT_SHMFD")
def zeroes(case: Case) -> None:
    """A new record is all zeroes: nothing is in flight."""
    record = _get(case, _negotiated(case), _queues(case))
    content = record.bytes[record.offset : record.offset + record.size]
    if any(content):
        fail(f"{len(content) - content.count(0)} of its {len(content)} bytes are not 0", "zeroes")


@check("inflight.set-past-end-of-file", _SET, needs="INFLIGHT_SHMFD REPLY_ACK", may_kill=True)
def set_past_end_of_file(case: Case) -> None:
    """SET_INFLIGHT_FD with a record that ends behind its file is refused."""
    wire = _negotiated(case)
    asked = _get(case, wire, _queues(case))
    file = os.memfd_create("record", os.MFD_CLOEXEC)
    short = case.own(Record(case, file, asked.size, 0, asked.queues, asked.queue_size))
    case.should_refuse(
        wire, "its file is empty", "libvhost-user finds out when it writes there",
        "SET_INFLIGHT_FD", short.payload, [short.descriptor],
    )  # fmt: skip


@check("inflight.set-too-small", _SET, needs="INFLIGHT_SHMFD REPLY_ACK", may_kill=True)
def set_too_small(case: Case) -> None:
    """SET_INFLIGHT_FD with a record that has no room for its queues is refused."""
    wire = _negotiated(case)
    record = _get(case, wire, _queues(case))
    record.size = 64
    case.should_refuse(
        wire, "64 bytes hold no entries of all descriptors", "libvhost-user looks at no size",
        "SET_INFLIGHT_FD", record.payload, [record.descriptor],
    )  # fmt: skip


# --- What a device writes there ---------------------------------------------------------------------------------------


def _running(case: Case) -> tuple[SplitRing, Record]:
    """A ring that runs with a new record."""
    wire = _negotiated(case)
    memory = case.memory()
    case.share(wire, memory)
    record = _get(case, wire, _queues(case))
    case.tell(wire, "SET_INFLIGHT_FD", record.payload, [record.descriptor])
    ring = case.new_ring(memory, size=_SIZE)
    case.start(wire, ring)
    return ring, record


@check("inflight.is-kept", _TRACKING, needs="request INFLIGHT_SHMFD")
def is_kept(case: Case) -> None:
    """Requests are counted in the record: its version, the number of descriptors, and the used index are there."""
    ring, record = _running(case)
    case.perform(ring, 3)
    if not wait_until(lambda: record.header(ring.index)[3] == 3, case.timeout):
        fail(f"the used index in the record is {record.header(ring.index)[3]} after three requests", "3")
    version, descriptors, _, _ = record.header(ring.index)
    if (version, descriptors) != (1, _SIZE):
        fail(f"version {version} and {descriptors} descriptors", f"version 1 and {_SIZE}")
    if not any(entry.counter for entry in record.entries(ring.index)):
        raise Differs("every counter is 0, so that the order of requests is lost", "one that grows for each request")


@check("inflight.marks-are-cleared", _TRACKING, needs="request INFLIGHT_SHMFD")
def marks_are_cleared(case: Case) -> None:
    """A request that was completed is not in flight."""
    ring, record = _running(case)
    for _ in range(2):
        case.perform(ring, 3)
        if not record.becomes_clear(ring.index):
            marked = [head for head, entry in enumerate(record.entries(ring.index)) if entry.inflight]
            fail(f"descriptors {marked} are marked, but every request was completed", "no mark")


@check("inflight.resubmits", _TRACKING, needs="request INFLIGHT_SHMFD")
def resubmits(case: Case) -> None:
    """A device that starts completes what was in flight, and not again what the device before it completed."""
    _take_over(case, lambda first, second: {first: Entry(1, 0, 1)}, used_index=1)


@check("inflight.knows-what-was-published", _TRACKING, needs="request INFLIGHT_SHMFD")
def knows_what_was_published(case: Case) -> None:
    """What was in the used ring, though still marked when the device was killed, is not completed again."""
    _take_over(case, lambda first, second: {first: Entry(1, 0, 1), second: Entry(1, 0, 2)}, used_index=0)


def _take_over(case: Case, marks: Callable[[int, int], dict[int, Entry]], used_index: int) -> None:
    """Two requests were taken, the second was completed, and then the device was killed."""
    wire = _negotiated(case)
    memory = case.memory()
    case.share(wire, memory)
    record = _get(case, wire, _queues(case))
    ring = case.new_ring(memory, size=_SIZE)
    pieces = len(case.exercise.readable) + len(case.exercise.writable)
    if 3 * pieces > _SIZE:
        raise Skipped(f"three requests of {pieces} descriptors are more than the ring has")
    first, second = _offer(case, ring), _offer(case, ring)
    ring.complete(second.head)
    record.write(ring.index, used_index, second.head, marks(first.head, second.head))
    case.tell(wire, "SET_INFLIGHT_FD", record.payload, [record.descriptor])
    # Where QEMU has it: at the used index, since nobody knows how far the device had read.
    case.start(wire, ring, 1)
    entries = ring.wait(1, case.timeout)
    wait_until(lambda: ring.used_index != ring.seen, QUIET)
    entries += ring.take()
    if not entries:
        fail("what was in flight was not completed", "a used entry, without a kick")
    case.judge(ring, [(first.head, ring.data(first))], entries)
    case.perform(ring)
    if not record.becomes_clear(ring.index):
        fail("marks are left when everything is completed", "none")


def _offer(case: Case, ring: SplitRing) -> Chain:
    return ring.add(case.exercise.readable, case.exercise.writable)
