"""Requests and completions, as the rings in shared memory show them. Virtio 1.3, sections 2.7 and 2.8.

Nothing is ever written, nor mapped: memory is read with pread from the descriptors that the front-end shares, so that
a file that is cut short is an error here and not a signal. Kick descriptors are watched by edge, which takes nothing
out of them. What changed between two looks is seen late, or not at all if the ring went round: the records say so.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import selectors
import struct
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from .model import Activity, Buffer, Record
from .packed import Descriptor, Positions, chains, wish

#: Seconds between two looks while something goes on, and while nothing does.
BUSY = 0.001
IDLE = 0.005
#: Bytes of a request that are shown.
SHOWN = 32
#: Entries of an indirect table, as many as any driver uses.
MAX_INDIRECT = 1024

NEXT, WRITE, INDIRECT = 1, 2, 4
RING_PACKED, IN_ORDER = 1 << 34, 1 << 35
EPOLLET = select.EPOLLET

DESCRIPTOR_SIZE = 16


class NotThere(Exception):
    """Memory that is needed is not in the regions that the front-end shares, or not in their files any more."""


@dataclass(frozen=True)
class Region:
    guest: int
    size: int
    user: int
    offset: int
    descriptor: int


class Memory:
    """The guest memory that the front-end shares, to be read."""

    def __init__(self) -> None:
        self.regions: list[Region] = []

    def read(self, address: int, size: int, *, user: bool = False) -> bytes:
        """Read from a guest address, or from a user address.

        Raises:
            NotThere: some of it is in no region, or the file is shorter than it should be.
        """
        data = b""
        while len(data) < size:
            region, offset = self.find(address + len(data), user=user)
            count = min(size - len(data), region.offset + region.size - offset)
            try:
                piece = os.pread(region.descriptor, count, offset)
            except (OSError, OverflowError) as error:
                raise NotThere(f"memory cannot be read: {error}") from None
            if len(piece) < count:
                raise NotThere(f"the file behind the region at {region.guest:#x} is shorter than the region")
            data += piece
        return data

    def find(self, address: int, *, user: bool = False) -> tuple[Region, int]:
        """The region that has an address, and where that is in its file.

        Raises:
            NotThere: there is none.
        """
        for region in self.regions:
            start = region.user if user else region.guest
            if start <= address < start + region.size:
                return region, address - start + region.offset
        raise NotThere(f"{address:#x} is in no region that is shared")

    def close(self) -> None:
        for region in self.regions:
            os.close(region.descriptor)
        self.regions = []


@dataclass
class Pending:
    """A request that the device has."""

    index: int
    head: int
    time: int
    writable: tuple[Buffer, ...]
    late: bool


@dataclass
class Ring:
    """What the front-end said of a ring, and how far it was looked at."""

    number: int
    size: int = 0
    addresses: tuple[int, int, int] | None = None
    """User addresses of the descriptor table, the used ring and the available ring."""
    started: bool = False
    disabled: bool = False
    avail: int = 0
    used: int = 0
    pending: dict[int, deque[Pending]] = field(default_factory=lambda: defaultdict(deque))
    """By first descriptor, or by buffer id in a packed ring."""
    made: deque[int] = field(default_factory=deque)
    """The same, as the requests of a split ring were made, if they are completed in that order."""
    order: str = "<"
    """The byte order of its fields, as `struct` has it."""
    positions: Positions = field(default_factory=Positions)
    """Of a packed ring."""
    count: int = 0
    """Requests that were seen in a packed ring, whose descriptors have no number of their own."""
    complained: str = ""
    kick: int | None = None

    @property
    def running(self) -> bool:
        return self.started and not self.disabled

    def restart(self, base: int) -> None:
        self.avail = self.used = base & 0xFFFF
        self.positions = Positions.of(base)
        self.pending.clear()
        self.made.clear()


class Follower:
    """Follows the rings of a connection. It is told every message, and asked to look from time to time."""

    def __init__(
        self,
        connection: int,
        sink: Callable[[Record], None],
        clock: Callable[[], int],
        selector: selectors.BaseSelector,
    ) -> None:
        self._blank = Record(0, connection, "note")
        self._sink = sink
        self._clock = clock
        self._selector = selector
        self._memory = Memory()
        self._rings: dict[int, Ring] = {}
        self._packed = False
        self._in_order = False
        self._last_activity = 0
        self._last_look = 0
        self._kicks = select.epoll()
        selector.register(self._kicks, selectors.EVENT_READ, self._kicked)

    @property
    def pause(self) -> float | None:
        """Seconds until it wants to look again. None: it waits for a message."""
        if not any(ring.running for ring in self._rings.values()):
            return None
        return BUSY if self._clock() - self._last_activity < 1e8 else IDLE

    def saw(self, record: Record, descriptors: Sequence[int]) -> None:
        """A message went by. The descriptors are copies, and the follower's from now on."""
        taken: set[int] = set()
        try:
            if record.event == "message" and record.channel == "main" and not record.problem:
                if record.sender == "front-end":
                    taken = self._asked(record, descriptors)
                else:
                    self._answered(record)
        finally:
            for number in set(descriptors) - taken:
                os.close(number)

    def look(self, now: bool = False) -> None:
        """See what happened in the rings, if it is time to."""
        pause = self.pause
        if pause is None or (not now and self._clock() - self._last_look < pause * 0.9e9):
            return
        self._last_look = self._clock()
        for ring in self._rings.values():
            if ring.running:
                self._look_at(ring)

    def close(self) -> None:
        for ring in self._rings.values():
            self._forget_kick(ring)
        self._selector.unregister(self._kicks)
        self._kicks.close()
        self._memory.close()

    # --- What the front-end says ------------------------------------------------------------------------------------

    def _asked(self, record: Record, descriptors: Sequence[int]) -> set[int]:
        """Follow a good message. Returns the descriptors that are kept."""
        name, fields = record.decoded.name, record.decoded.fields
        match name:
            case "SET_FEATURES":
                self._packed = bool(fields["value"] & RING_PACKED)
                self._in_order = bool(fields["value"] & IN_ORDER)
            case "SET_MEM_TABLE" | "ADD_MEM_REG" | "REM_MEM_REG":
                self.look(True)
                return self._share(name, fields, descriptors)
            case "SET_VRING_NUM":
                self._ring(fields).size = fields["num"]
            case "SET_VRING_ADDR":
                self._ring(fields).addresses = (fields["descriptors"], fields["used"], fields["avail"])
            case "SET_VRING_ENDIAN":
                self._ring(fields).order = ">" if fields["num"] == 1 else "<"
            case "SET_VRING_BASE":
                self._ring(fields).restart(fields["num"])
            case "SET_VRING_KICK":
                ring = self._ring(fields)
                ring.started = True
                return self._watch(ring, record, descriptors)
            case "VRING_KICK":
                self._ring(fields).started = True
                self.look(True)
            case "SET_VRING_ENABLE":
                # The driver may free the memory of a ring that it disables.
                self.look(True)
                self._ring(fields).disabled = not fields["num"]
            case "RESET_DEVICE" | "RESET_OWNER":
                self.look(True)
                for ring in self._rings.values():
                    ring.started = False
        return set()

    def _answered(self, record: Record) -> None:
        if record.decoded.name in ("GET_VRING_BASE", "GET_VRING_BASE_SKIP_DRAIN"):
            self.look(True)
            ring = self._ring(record.decoded.fields)
            ring.started = False
            ring.restart(record.decoded.fields["num"])
            self._forget_kick(ring)

    def _ring(self, fields: dict[str, int]) -> Ring:
        return self._rings.setdefault(fields["index"], Ring(fields["index"]))

    def _share(self, name: str, fields: dict[str, object], descriptors: Sequence[int]) -> set[int]:
        regions = fields["regions"] if name == "SET_MEM_TABLE" else [fields["region"]]
        assert isinstance(regions, list)
        described = [
            (region["guest_address"], region["size"], region["user_address"], region["file_offset"])
            for region in regions
        ]
        if name == "REM_MEM_REG":
            for region in list(self._memory.regions):
                if (region.guest, region.size, region.user) == described[0][:3]:
                    self._memory.regions.remove(region)
                    os.close(region.descriptor)
            return set()
        if name == "SET_MEM_TABLE":
            self._memory.close()
        pairs = zip(described, descriptors, strict=True)
        self._memory.regions += [Region(*region, descriptor) for region, descriptor in pairs]
        return set(descriptors)

    # --- Kicks ------------------------------------------------------------------------------------------------------

    def _watch(self, ring: Ring, record: Record, descriptors: Sequence[int]) -> set[int]:
        self._forget_kick(ring)
        if [descriptor.kind for descriptor in record.descriptors] != ["eventfd"]:
            return set()
        # By edge: a kick wakes us as it wakes the back-end, who is the only one to read it.
        with contextlib.suppress(OSError):
            self._kicks.register(descriptors[0], select.EPOLLIN | EPOLLET)
            ring.kick = descriptors[0]
            return {ring.kick}
        return set()

    def _kicked(self) -> None:
        if not self._kicks.closed:
            self._kicks.poll(0)
            self.look(True)

    def _forget_kick(self, ring: Ring) -> None:
        if ring.kick is not None:
            self._kicks.unregister(ring.kick)
            os.close(ring.kick)
            ring.kick = None

    # --- The ring itself --------------------------------------------------------------------------------------------

    def _look_at(self, ring: Ring) -> None:
        if ring.addresses is None or not ring.size:
            self._complain(ring, "a ring without addresses or size is not followed")
        elif ring.size & (ring.size - 1) and not self._packed:
            self._complain(ring, "a split ring whose size is not a power of two is not followed")
        else:
            try:
                if self._packed:
                    self._compare_packed(ring, *ring.addresses)
                else:
                    self._compare(ring, *ring.addresses)
            except NotThere as error:
                self._complain(ring, str(error))

    def _compare(self, ring: Ring, table: int, used: int, avail: int) -> None:
        # In this order: the request of every completion is seen.
        used_index = self._index(ring, used)
        avail_index = self._index(ring, avail)
        available = self._moved(ring, "available", ring.avail, avail_index)
        done = self._moved(ring, "used", ring.used, used_index)
        if available or done:
            self._last_activity = self._clock()
        entry = struct.Struct(ring.order + "II")
        seen = [
            entry.unpack(self._user(used + 4 + 8 * ((ring.used + number) % ring.size), 8)) for number in range(done)
        ]
        finished, before = Counter(head for head, _ in seen), len(ring.made)
        for number in range(available):
            index = (ring.avail + number) & 0xFFFF
            (head,) = struct.unpack(ring.order + "H", self._user(avail + 4 + 2 * (index % ring.size), 2))
            late = before + number < done if self._in_order else finished[head] > len(ring.pending[head])
            if self._in_order:
                ring.made.append(head)
            self._requested(ring, index, head, head, self._chain(ring, head, table), late)
        while seen:
            head, written = seen[0]
            for skipped in self._skipped(ring, head, len(seen)):
                self._completed(ring, skipped, None)
                del seen[0]
            self._completed(ring, head, written)
            del seen[0]
        ring.avail, ring.used = avail_index, used_index

    def _skipped(self, ring: Ring, head: int, count: int) -> list[int]:
        """The requests before `head`, of the next `count`, that its used entry gives back as well.

        The device skips their entries of the used ring. Virtio 1.3, section 2.7.
        """
        if head not in itertools.islice(ring.made, count):
            return []
        return list(iter(ring.made.popleft, head))

    def _compare_packed(self, ring: Ring, table: int, device: int, driver: int) -> None:
        # From where the next chain begins: the driver writes its first descriptor last, and this one is read first.
        begin = DESCRIPTOR_SIZE * (ring.positions.avail % ring.size)
        late = self._user(table + begin, DESCRIPTOR_SIZE * ring.size - begin)
        content = (self._user(table, begin) if begin else b"") + late
        calls, kicks = wish(self._user(driver, 4)), wish(self._user(device, 4))
        descriptors = list(itertools.starmap(Descriptor, struct.iter_unpack("<QIHH", content)))
        requests, completions = chains(descriptors, ring.positions, in_order=self._in_order)
        if requests or completions:
            self._last_activity = self._clock()
        for request in requests:
            rows = self._rows(ring, request.descriptors)
            self._requested(ring, ring.count, request.slot, request.number, rows, request.late, kicks)
            ring.count = (ring.count + 1) & 0xFFFF
        for number, written in completions:
            self._completed(ring, number, written, calls)

    def _rows(self, ring: Ring, descriptors: Sequence[Descriptor]) -> Iterator[tuple[int, int, int]]:
        for descriptor in descriptors:
            yield descriptor.size, descriptor.flags, descriptor.address
            if descriptor.flags & INDIRECT:
                # Its entries follow each other, whatever they say.
                for address, size, _, flags in self._table(ring, descriptor.address, descriptor.size):
                    yield size, flags & WRITE, address

    def _moved(self, ring: Ring, name: str, before: int, after: int) -> int:
        """How many entries are new, and still there."""
        moved = (after - before) & 0xFFFF
        if moved <= ring.size:
            return moved
        self._note(f"queue {ring.number}: the {name} index went from {before} to {after}: what lies between is lost")
        ring.pending.clear()
        ring.made.clear()
        return 0

    def _requested(
        self,
        ring: Ring,
        index: int,
        head: int,
        key: int,
        rows: Iterator[tuple[int, int, int]],
        late: bool,
        wish: str = "",
    ) -> None:
        problem, buffers, indirect = "", [], False
        try:
            for size, flags, address in rows:
                if flags & INDIRECT:
                    indirect = True
                else:
                    buffers.append((bool(flags & WRITE), Buffer(address, size)))
        except NotThere as error:
            problem = str(error)
        readable = tuple(buffer for writes, buffer in buffers if not writes)
        writable = tuple(buffer for writes, buffer in buffers if writes)
        activity = Activity(ring.number, index, head, readable, writable, indirect, late=late, wish=wish)
        with contextlib.suppress(NotThere):
            activity = replace(activity, data=self._first(readable, SHOWN))
        now = self._clock()
        ring.pending[key].append(Pending(index, head, now, writable, late))
        self._sink(replace(self._blank, time=now, event="request", text=problem, activity=activity))

    def _completed(self, ring: Ring, key: int, written: int | None, wish: str = "") -> None:
        """Follow a completion, of the whole request if nobody says how much was written."""
        requests = ring.pending[key]
        now = self._clock()
        pending = requests.popleft() if requests else None
        found = pending or Pending(0, key, now, (), False)
        if written is None:
            written = sum(buffer.size for buffer in found.writable)
        activity = Activity(
            ring.number, found.index, found.head, writable=found.writable, written=written, late=found.late, wish=wish
        )
        problem = "" if pending else "no request was made with this descriptor"
        with contextlib.suppress(NotThere):
            activity = replace(activity, data=self._first(activity.writable, min(SHOWN, written)))
        self._sink(
            replace(
                self._blank,
                time=now,
                event="completion",
                sender="back-end",
                latency=now - pending.time if pending and not pending.late else None,
                text=problem,
                activity=activity,
            )
        )

    def _chain(self, ring: Ring, head: int, table: int) -> Iterator[tuple[int, int, int]]:
        """Size, flags and guest address of every descriptor of a chain, and of its indirect table."""
        at = head
        for _ in range(ring.size):
            if at >= ring.size:
                raise NotThere(f"descriptor {at} does not exist: the table has {ring.size}")
            address, size, flags, following = struct.unpack(ring.order + "QIHH", self._user(table + 16 * at, 16))
            yield size, flags, address
            if flags & INDIRECT:
                yield from self._indirect(ring, address, size)
            if not flags & NEXT:
                return
            at = following
        raise NotThere(f"the chain at descriptor {head} loops")

    def _indirect(self, ring: Ring, table: int, size: int) -> Iterator[tuple[int, int, int]]:
        entries = self._table(ring, table, size)
        at = 0
        for _ in entries:
            if at >= len(entries):
                raise NotThere(f"entry {at} of an indirect table does not exist: it has {len(entries)}")
            address, length, flags, following = entries[at]
            yield length, flags & ~INDIRECT, address
            if not flags & NEXT:
                return
            at = following
        raise NotThere("an indirect table loops")

    def _table(self, ring: Ring, table: int, size: int) -> list[tuple[int, int, int, int]]:
        if not size or size % DESCRIPTOR_SIZE or size > MAX_INDIRECT * DESCRIPTOR_SIZE:
            raise NotThere(f"an indirect table has a multiple of 16 bytes, up to {MAX_INDIRECT * 16}, not {size}")
        return list(struct.iter_unpack(ring.order + "QIHH", self._memory.read(table, size)))

    def _first(self, buffers: Sequence[Buffer], count: int) -> bytes:
        data = b""
        for buffer in buffers:
            if len(data) < count:
                data += self._memory.read(buffer.address, min(buffer.size, count - len(data)))
        return data

    def _index(self, ring: Ring, part: int) -> int:
        """The index of the available or of the used ring."""
        (index,) = struct.unpack(ring.order + "H", self._user(part + 2, 2))
        return int(index)

    def _user(self, address: int, size: int) -> bytes:
        return self._memory.read(address, size, user=True)

    def _complain(self, ring: Ring, text: str) -> None:
        """Say once why a ring is not followed."""
        if ring.complained != text:
            ring.complained = text
            self._note(f"queue {ring.number}: {text}")

    def _note(self, text: str) -> None:
        self._sink(replace(self._blank, time=self._clock(), text=text))
