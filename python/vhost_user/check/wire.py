"""A front-end that does exactly what a check tells it, also nonsense: messages, guest memory and rings by hand.

It shares no code with `vhost_user.Frontend`, which would not send what checks have to send, and whose own mistakes a
check could not see. Every wait has a deadline. vhost-user specification, "Message Specification"; Virtio 1.3, 2.7, 2.8.
"""

from __future__ import annotations

import abc
import contextlib
import enum
import mmap
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

from .._core import messages

HEADER = struct.Struct("=III")
VERSION = 0x1
REPLY = 0x4
NEED_REPLY = 0x8

NEXT, WRITE, INDIRECT = 1, 2, 4
AVAILABLE, USED = 1 << 7, 1 << 15

#: Where a packed ring begins: at its first descriptor, with both wrap counters 1.
PACKED_BASE = 0x8000_8000

#: Ids by name, and names by id, of what a front-end may send.
IDS = {info.name: info.id for info in messages() if info.channel == "main"}
NAMES = {number: name for name, number in IDS.items()}


class Feature(enum.IntFlag):
    """Bits of GET_FEATURES that checks care for."""

    LOG_ALL = 1 << 26
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32
    RING_PACKED = 1 << 34


class Protocol(enum.IntFlag):
    """Bits of GET_PROTOCOL_FEATURES that checks care for."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    DEVICE_STATE = 1 << 19


class Closed(Exception):
    """The back-end closed the connection where it should have answered."""


class Silent(Exception):
    """The back-end did not do in time what it should have done."""


class Answer(NamedTuple):
    """A message of the back-end."""

    request: int
    flags: int
    payload: bytes
    descriptors: int

    @property
    def u64(self) -> int:
        """Its payload as a number, or -1 if that has not eight bytes."""
        return int(struct.unpack("=Q", self.payload)[0]) if len(self.payload) == 8 else -1

    def __str__(self) -> str:
        shown = self.payload[:24].hex(" ") + (" …" if len(self.payload) > 24 else "")
        more = f", {self.descriptors} descriptors" if self.descriptors else ""
        size = len(self.payload)
        return (
            f"{NAMES.get(self.request, self.request)} flags {self.flags:#x} size {size}{more}: {shown or 'no payload'}"
        )


class Wire:
    """One end of a channel. It keeps `log`, the last of what was said."""

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        self.timeout = timeout
        self.log: deque[str] = deque(maxlen=8)
        self.protocol = 0
        """The protocol features that were negotiated."""
        self.socket = connection
        connection.settimeout(timeout)

    @classmethod
    def connect(cls, path: str, timeout: float) -> Self:
        """The main channel of a back-end."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout)
            connection.connect(path)
        except BaseException:
            connection.close()
            raise
        return cls(connection, timeout)

    def send(
        self,
        request: str | int,
        payload: bytes = b"",
        descriptors: Sequence[int] = (),
        *,
        flags: int = VERSION,
        size: int | None = None,
    ) -> None:
        """Send a message. `size` is what its header says, if that is not the truth."""
        number = IDS[request] if isinstance(request, str) else request
        size = len(payload) if size is None else size
        more = f", {len(descriptors)} descriptors" if descriptors else ""
        shown = payload[:40].hex(" ") + (" …" if len(payload) > 40 else "")
        self.log.append(f"-> {request} flags {flags:#x} size {size}{more}: {shown or 'no payload'}")
        self.send_bytes(HEADER.pack(number, flags, size) + payload, descriptors)

    def send_bytes(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send bytes as they are.

        Raises:
            Closed: the back-end has closed the connection.
            Silent: it does not read.
        """
        try:
            sent = socket.send_fds(self.socket, [data], list(descriptors)) if descriptors else self.socket.send(data)
            if sent < len(data):
                self.socket.sendall(data[sent:])
        except TimeoutError:
            raise Silent(f"the back-end did not read for {self.timeout:g} s") from None
        except OSError as error:
            raise Closed(f"the back-end closed the connection ({error.strerror})") from None

    def receive(self) -> Answer:
        """The next message.

        Raises:
            Closed: the back-end closed the connection.
            Silent: nothing came in time.
        """
        answer, descriptors = self.receive_with_descriptors()
        for descriptor in descriptors:
            os.close(descriptor)
        return answer

    def receive_with_descriptors(self) -> tuple[Answer, list[int]]:
        """The next message, and the descriptors that came with it, which are the caller's."""
        deadline = time.monotonic() + self.timeout
        descriptors: list[int] = []
        try:
            head = self._read(HEADER.size, deadline, descriptors)
            request, flags, size = HEADER.unpack(head)
            # Nobody sends more; a garbled header is not waited for.
            payload = self._read(min(size, 1 << 16), deadline, descriptors) if size else b""
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        answer = Answer(request, flags, payload, len(descriptors))
        self.log.append(f"<- {answer}")
        return answer, descriptors

    def _read(self, size: int, deadline: float, descriptors: list[int]) -> bytes:
        data = b""
        while len(data) < size:
            if not select.select([self.socket], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self.log.append(f"<- nothing for {self.timeout:g} s" if not data else f"<- only {data.hex(' ')}")
                raise Silent(f"the back-end did not answer within {self.timeout:g} s")
            try:
                piece, received, _, _ = socket.recv_fds(self.socket, size - len(data), 16)
            except OSError as error:
                self.log.append(f"<- {error.strerror}")
                raise Closed(f"the back-end closed the connection ({error.strerror})") from None
            descriptors += received
            if not piece:
                self.log.append("<- end of the connection")
                raise Closed("the back-end closed the connection")
            data += piece
        return data

    def is_quiet(self, seconds: float) -> bool:
        """Whether nothing comes for a while, be it the end."""
        return not select.select([self.socket], [], [], seconds)[0]

    def ask(
        self, request: str | int, payload: bytes = b"", descriptors: Sequence[int] = (), *, flags: int = VERSION
    ) -> Answer:
        """Send a request that is always answered, and wait for the answer."""
        self.send(request, payload, descriptors, flags=flags)
        return self.receive()

    def acknowledged(self, request: str | int, payload: bytes = b"", descriptors: Sequence[int] = ()) -> int:
        """Send a request with NEED_REPLY. Returns its acknowledgement: 0 if it was accepted."""
        return self.ask(request, payload, descriptors, flags=VERSION | NEED_REPLY).u64

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()


class Notifier:
    """An eventfd for kicks, calls and errors."""

    def __init__(self) -> None:
        self.descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def signal(self) -> None:
        """Notify the other side."""
        os.eventfd_write(self.descriptor, 1)

    def came(self, timeout: float) -> bool:
        """Whether a notification comes within `timeout` seconds; it is taken."""
        if not select.select([self.descriptor], [], [], timeout)[0]:
            return False
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)
        return True

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.descriptor)


class Memory:
    """A region of guest memory in a memfd, at different guest, user and file addresses."""

    def __init__(
        self, size: int = 1 << 18, *, guest: int = 0x4000_0000, user: int = 0x7F55_0000_0000, offset: int = 0
    ) -> None:
        self.size = size
        self.guest = guest
        self.user = user
        self.offset = offset
        self.descriptor = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.truncate(self.descriptor, offset + size)
        self._map = mmap.mmap(self.descriptor, offset + size)
        self._free = guest

    def region(self, **other: int) -> bytes:
        """How the protocol describes it; with `other`, not quite."""
        words = {"guest": self.guest, "size": self.size, "user": self.user, "offset": self.offset} | other
        return struct.pack("=QQQQ", *words.values())

    def allocate(self, size: int, alignment: int = 16) -> int:
        """The guest address of bytes that nobody has yet."""
        address = -(-self._free // alignment) * alignment
        assert address + size <= self.guest + self.size, "a check wants more guest memory than there is"
        self._free = address + size
        return address

    def read(self, address: int, size: int) -> bytes:
        """What is at a guest address."""
        at = address - self.guest + self.offset
        return self._map[at : at + size]

    def write(self, address: int, data: bytes) -> None:
        """Change what is at a guest address."""
        at = address - self.guest + self.offset
        self._map[at : at + len(data)] = data

    def to_user(self, address: int) -> int:
        """The user address of a guest address."""
        return address - self.guest + self.user

    def close(self) -> None:
        """Unmap it here; the back-end may have it still."""
        self._map.close()
        os.close(self.descriptor)


class Chain(NamedTuple):
    """A request in a ring."""

    head: int
    """What its used entry says: the first descriptor, or the buffer id."""
    writable: list[tuple[int, int]]


class Ring(abc.ABC):
    """The driver's side of a ring of either format."""

    #: What SET_VRING_BASE says of a ring that never ran.
    fresh = 0
    #: Guest addresses of its three parts; in a packed ring the driver and the device event suppression.
    descriptors: int
    avail: int
    used: int

    def __init__(self, memory: Memory, index: int, size: int) -> None:
        self.memory = memory
        self.index = index
        self.size = size
        self.kick = Notifier()
        self.call = Notifier()
        self.error = Notifier()

    def address_payload(self, *, log: int | None = None, **other: int) -> bytes:
        """The payload of SET_VRING_ADDR; with `log`, the used ring is logged as if it were at that guest address."""
        to_user = self.memory.to_user
        parts = {"descriptors": to_user(self.descriptors), "used": to_user(self.used), "avail": to_user(self.avail)}
        return struct.pack("=IIQQQQ", self.index, log is not None, *(parts | other).values(), log or 0)

    def add(
        self,
        readable: Sequence[bytes] = (),
        writable: Sequence[int] = (),
        *,
        indirect: bool = False,
        memory: Memory | None = None,
    ) -> Chain:
        """Offer a chain with one descriptor for each piece."""
        memory = memory or self.memory
        pieces = []
        for data in readable:
            pieces.append((memory.allocate(len(data)), len(data), 0))
            memory.write(pieces[-1][0], data)
        room = [(memory.allocate(size), size) for size in writable]
        head = self.add_pieces([*pieces, *((address, size, WRITE) for address, size in room)], indirect=indirect)
        return Chain(head, room)

    def add_pieces(self, pieces: Sequence[tuple[int, int, int]], *, indirect: bool = False) -> int:
        """Offer a chain of (address, length, flags). Returns its head."""
        if not indirect:
            return self._offer_pieces(pieces)
        table = b"".join(
            struct.pack("<QIHH", address, size, *self._link(flags, at, len(pieces)))
            for at, (address, size, flags) in enumerate(pieces)
        )
        address = self.memory.allocate(len(table))
        self.memory.write(address, table)
        return self._offer_pieces([(address, len(table), INDIRECT)])

    @abc.abstractmethod
    def _offer_pieces(self, pieces: Sequence[tuple[int, int, int]]) -> int: ...

    @abc.abstractmethod
    def _link(self, flags: int, at: int, count: int) -> tuple[int, int]:
        """The last two words of a descriptor in an indirect table of `count`."""

    @abc.abstractmethod
    def take(self) -> list[tuple[int, int]]:
        """The used entries that were not seen yet: head, and bytes written."""

    def wait(self, count: int, timeout: float) -> list[tuple[int, int]]:
        """Up to `count` used entries, or more if more come: as many as there are in time."""
        entries: list[tuple[int, int]] = []

        def enough() -> bool:
            entries.extend(self.take())
            return len(entries) >= count

        wait_until(enough, timeout)
        return entries

    def data(self, chain: Chain) -> bytes:
        """What is in the room of a chain."""
        return b"".join(self.memory.read(address, size) for address, size in chain.writable)

    def close(self) -> None:
        """Close its descriptors."""
        for notifier in (self.kick, self.call, self.error):
            notifier.close()

    def _get(self, address: int) -> int:
        return int.from_bytes(self.memory.read(address, 2), "little")

    def _set(self, address: int, value: int) -> None:
        self.memory.write(address, (value & 0xFFFF).to_bytes(2, "little"))


class SplitRing(Ring):
    """A split ring, field by field."""

    def __init__(self, memory: Memory, index: int, size: int = 16, base: int = 0) -> None:
        super().__init__(memory, index, size)
        self.descriptors = memory.allocate(16 * size, 16)
        self.avail = memory.allocate(6 + 2 * size, 2)
        self.used = memory.allocate(6 + 8 * size, 4)
        self._next = 0
        self.avail_index = base
        self._set(self.used + 2, base)
        self.seen = base

    # --- Fields -----------------------------------------------------------------------------------------------------

    @property
    def avail_index(self) -> int:
        """Where the driver will put the next head."""
        return self._get(self.avail + 2)

    @avail_index.setter
    def avail_index(self, value: int) -> None:
        self._set(self.avail + 2, value)

    @property
    def used_index(self) -> int:
        """Where the device will put the next used entry."""
        return self._get(self.used + 2)

    def set_avail_flags(self, flags: int) -> None:
        """1: notifications are not wanted."""
        self._set(self.avail, flags)

    @property
    def used_flags(self) -> int:
        """1: kicks are not wanted."""
        return self._get(self.used)

    def set_used_event(self, index: int) -> None:
        """With EVENT_IDX: the used index after which a notification is wanted."""
        self._set(self.avail + 4 + 2 * self.size, index)

    @property
    def avail_event(self) -> int:
        """With EVENT_IDX: the available index after which a kick is wanted."""
        return self._get(self.used + 4 + 8 * self.size)

    # --- Requests ---------------------------------------------------------------------------------------------------

    def _offer_pieces(self, pieces: Sequence[tuple[int, int, int]]) -> int:
        slots = [(self._next + at) % self.size for at in range(len(pieces))]
        self._next = (self._next + len(pieces)) % self.size
        for at, (address, size, flags) in enumerate(pieces):
            is_last = at == len(pieces) - 1
            self.set_descriptor(
                slots[at], address, size, flags | (0 if is_last else NEXT), 0 if is_last else slots[at + 1]
            )
        self.offer(slots[0])
        return slots[0]

    def _link(self, flags: int, at: int, count: int) -> tuple[int, int]:
        return (flags | NEXT, at + 1) if at < count - 1 else (flags, 0)

    def set_descriptor(self, slot: int, address: int, size: int, flags: int = 0, following: int = 0) -> None:
        """Write a descriptor, whatever it says."""
        self.memory.write(self.descriptors + 16 * slot, struct.pack("<QIHH", address, size, flags, following))

    def offer(self, head: int) -> None:
        """Make a head available, be it good or not."""
        self._set(self.avail + 4 + 2 * (self.avail_index % self.size), head)
        self.avail_index += 1

    def complete(self, head: int, written: int = 0) -> None:
        """Be the device: put a head into the used ring, which the driver has seen then."""
        index = self.used_index
        self.memory.write(self.used + 4 + 8 * (index % self.size), struct.pack("<II", head, written))
        self._set(self.used + 2, index + 1)
        self.seen = (index + 1) & 0xFFFF

    def take(self) -> list[tuple[int, int]]:
        entries: list[tuple[int, int]] = []
        while self.seen != self.used_index and len(entries) <= self.size:
            head, length = struct.unpack("<II", self.memory.read(self.used + 4 + 8 * (self.seen % self.size), 8))
            entries.append((head, length))
            self.seen = (self.seen + 1) & 0xFFFF
        return entries


class PackedRing(Ring):
    """A packed ring, descriptor by descriptor. Buffer ids run against the slots. Virtio 1.3, 2.8."""

    fresh = PACKED_BASE

    def __init__(self, memory: Memory, index: int, size: int = 16, base: int = PACKED_BASE) -> None:
        super().__init__(memory, index, size)
        self.descriptors = memory.allocate(16 * size, 16)
        self.avail = memory.allocate(4, 4)
        self.used = memory.allocate(4, 4)
        self._slot, self._wrap = base & 0x7FFF, base >> 15 & 1
        self._used_slot, self._used_wrap = base >> 16 & 0x7FFF, base >> 31
        self.consumed = 0
        """Descriptors that were used so far."""
        self._free = list(range(size))
        self._offered_last = 0
        self._chains: dict[int, int] = {}
        # As the laps before have left it: used, up to where it begins in this lap, and behind that in the last.
        for slot in range(size):
            wrap = self._used_wrap ^ (slot >= self._used_slot)
            self.set_descriptor(slot, 0, 0, 0, (AVAILABLE | USED) * wrap)

    @property
    def base(self) -> int:
        """Where both sides are when everything that was offered is used."""
        position = self._wrap << 15 | self._slot
        return position << 16 | position

    @property
    def will_want_kick(self) -> bool:
        """Whether the device wants to be told of the next chain."""
        flags = self._get(self.used + 2)
        return flags == 0 or (flags == 2 and self._get(self.used) == self._wrap << 15 | self._slot)

    @property
    def available(self) -> int:
        """The flags that show a descriptor to the device, in this lap."""
        return AVAILABLE if self._wrap else USED

    def event(self, ahead: int) -> int:
        """The descriptor that is so many behind the next to be used, as event suppression names it."""
        laps, slot = divmod(self._used_slot + ahead, self.size)
        return slot | (self._used_wrap ^ laps & 1) << 15

    def suppress_calls(self, flags: int, event: int = 0) -> None:
        """0: notify; 1: do not; 2, with EVENT_IDX: when the descriptor is used that `event` names."""
        self._set(self.avail, event)
        self._set(self.avail + 2, flags)

    @property
    def wants_kick(self) -> bool:
        """Whether the device wants to be told of the chain that was offered last."""
        flags = self._get(self.used + 2)
        if flags != 2:
            return flags == 0
        event = self._get(self.used)
        offset = event & 0x7FFF
        if event >> 15 != self._wrap:
            offset -= self.size
        return (self._slot - offset - 1) & 0xFFFF < self._offered_last

    def _offer_pieces(self, pieces: Sequence[tuple[int, int, int]]) -> int:
        number = self._free.pop()
        head, flags_of_head = self._slot, 0
        for at, (address, size, flags) in enumerate(pieces):
            more = flags | (NEXT if at < len(pieces) - 1 else 0) | self.available
            self.set_descriptor(
                self._slot, address, size, number, more if at else 0 if self._wrap else AVAILABLE | USED
            )
            if not at:
                flags_of_head = more
            self._slot += 1
            if self._slot == self.size:
                self._slot, self._wrap = 0, self._wrap ^ 1
        self._chains[number] = self._offered_last = len(pieces)
        # Last, for it shows the whole chain.
        self._set(self.descriptors + 16 * head + 14, flags_of_head)
        return number

    def _link(self, flags: int, at: int, count: int) -> tuple[int, int]:
        return 0, flags

    def set_descriptor(self, slot: int, address: int, size: int, number: int, flags: int) -> None:
        """Write a descriptor, whatever it says."""
        self.memory.write(self.descriptors + 16 * slot, struct.pack("<QIHH", address, size, number, flags))

    def take(self) -> list[tuple[int, int]]:
        entries: list[tuple[int, int]] = []
        while len(entries) <= self.size:
            at = self.descriptors + 16 * self._used_slot
            flags = self._get(at + 14)
            if bool(flags & AVAILABLE) != self._used_wrap or bool(flags & USED) != self._used_wrap:
                break
            length, number = struct.unpack("<IH", self.memory.read(at + 8, 6))
            # What cannot be read past is told, and the end of it.
            is_known = number in self._chains
            entries.append((number, length))
            if is_known:
                self._free.insert(0, number)
            count = self._chains.pop(number, 1)
            self.consumed += count
            self._used_slot += count
            if self._used_slot >= self.size:
                self._used_slot, self._used_wrap = self._used_slot - self.size, self._used_wrap ^ 1
            if not is_known:
                break
        return entries


def wait_until(condition: Callable[[], object], timeout: float) -> bool:
    """Whether `condition()` becomes true within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    pause = 0.0001
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.002)
    return True


def vring_state(index: int, number: int = 0) -> bytes:
    """The payload of most messages about a ring."""
    return struct.pack("=II", index, number)


def u64(value: int) -> bytes:
    """A payload of one number."""
    return struct.pack("=Q", value)


def config(offset: int, data: bytes, *, size: int | None = None, flags: int = 0) -> bytes:
    """The payload of GET_CONFIG and SET_CONFIG; `size` is what it says, if that is not the truth."""
    return struct.pack("=III", offset, len(data) if size is None else size, flags) + data
