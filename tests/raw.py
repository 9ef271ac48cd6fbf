"""A vhost-user front-end that does exactly what it is told, also nonsense.

It shares no code with the package, so that the two have to agree by the specification alone: messages and rings are
`struct` formats, memory is a memfd, and every message may be cut short, lengthened, or sent with the wrong descriptors.
vhost-user specification, "Message Specification"; Virtio 1.3, section 2.7.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import mmap
import os
import select
import socket
import struct
import termios
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self, TypeVar

#: Seconds after which something that should happen did not.
DEADLINE = 30.0
#: Seconds after which something that should not happen did not.
QUIET = 0.05

HEADER = struct.Struct("=III")
REQUEST = 0x1
REPLY = 0x5
NEED_REPLY = 0x9

LOG_ALL = 1 << 26
INDIRECT_DESC = 1 << 28
EVENT_IDX = 1 << 29
PROTOCOL_FEATURES = 1 << 30
VERSION_1 = 1 << 32
ACCESS_PLATFORM = 1 << 33
RING_RESET = 1 << 40

MQ = 1 << 0
LOG_SHMFD = 1 << 1
RARP = 1 << 2
REPLY_ACK = 1 << 3
NET_MTU = 1 << 4
BACKEND_REQ = 1 << 5
CROSS_ENDIAN = 1 << 6
CRYPTO_SESSION = 1 << 7
CONFIG = 1 << 9
BACKEND_SEND_FD = 1 << 10
HOST_NOTIFIER = 1 << 11
RESET_DEVICE = 1 << 13
INBAND = 1 << 14
CONFIGURE_MEM_SLOTS = 1 << 15
STATUS = 1 << 16
DEVICE_STATE = 1 << 19
SHARED_OBJECT = 1 << 18
GPA_ADDRESSES = 1 << 21
SHMEM = 1 << 22

NEXT = 1
WRITE = 2
INDIRECT = 4

NO_INTERRUPT = 1
NO_NOTIFY = 1

CONFIG_CHANGE = 2


class Id(enum.IntEnum):
    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    GET_SHMEM_CONFIG = 44


def u64(value: int) -> bytes:
    return struct.pack("=Q", value)


def vring_state(index: int, num: int = 0) -> bytes:
    return struct.pack("=II", index, num)


def vring_descriptor(index: int, with_descriptor: bool = True) -> bytes:
    return u64(index | (0 if with_descriptor else 1 << 8))


def vring_address(index: int, descriptors: int, used: int, avail: int, *, flags: int = 0, log: int = 0) -> bytes:
    return struct.pack("=IIQQQQ", index, flags, descriptors, used, avail, log)


def memory_table(*regions: bytes) -> bytes:
    return struct.pack("=II", len(regions), 0) + b"".join(regions)


def single_region(region: bytes) -> bytes:
    return bytes(8) + region


def iotlb(kind: int, iova: int, size: int = 0, user: int = 0, permission: int = 0) -> bytes:
    return struct.pack("=QQQBB6x", iova, size, user, permission, kind)


def config(offset: int, data: bytes, *, flags: int = 0, size: int | None = None) -> bytes:
    return struct.pack("=III", offset, len(data) if size is None else size, flags) + data


def wait_until(condition: Callable[[], object], what: str, timeout: float = DEADLINE) -> None:
    """Wait for something that has no descriptor to wait for."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {timeout} s"
        time.sleep(0.001)


Owned = TypeVar("Owned", bound="HasClose")


# --- Messages ---------------------------------------------------------------------------------------------------------


@dataclass
class Message:
    request: int
    flags: int
    payload: bytes
    descriptors: list[int] = field(default_factory=list)


class Channel:
    """One end of a stream of messages."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(DEADLINE)
        self.socket = connection

    def send(
        self,
        request: int,
        payload: bytes = b"",
        descriptors: Sequence[int] = (),
        *,
        flags: int = REQUEST,
        size: int | None = None,
    ) -> None:
        """Send a message; `size` is what its header says, if that is not the truth."""
        self.send_bytes(HEADER.pack(request, flags, len(payload) if size is None else size) + payload, descriptors)

    def send_bytes(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        sent = socket.send_fds(self.socket, [data], list(descriptors)) if descriptors else self.socket.send(data)
        if sent < len(data):
            self.socket.sendall(data[sent:])

    def wait_until_read(self) -> None:
        """Wait until the peer has read everything that was sent: what follows comes in another read."""
        wait_until(lambda: fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4)) == bytes(4), "the peer reads")

    def receive(self) -> Message:
        """The next message, whatever it is.

        Raises:
            ConnectionError: the peer closed the connection.
            TimeoutError: nothing came.
        """
        head, descriptors, _, _ = socket.recv_fds(self.socket, HEADER.size, 8)
        if not head:
            raise ConnectionError("closed by the back-end")
        head += self._receive_exactly(HEADER.size - len(head))
        request, flags, size = HEADER.unpack(head)
        return Message(request, flags, self._receive_exactly(size), descriptors)

    def _receive_exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            if not part:
                raise ConnectionError("closed by the back-end, inside a message")
            data += part
        return data

    def is_silent(self, seconds: float = QUIET) -> bool:
        """Whether nothing comes for a while, not even the end."""
        return not select.select([self.socket], [], [], seconds)[0]

    def is_closed(self) -> bool:
        """Whether the peer closes the connection, without another word, before the deadline."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True

    def close(self) -> None:
        self.socket.close()


class FrontEnd(Channel):
    """The main channel, and what a well-behaved front-end does with it. Each step can be left out or done wrong."""

    def __init__(self, path: object) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path))
        except BaseException:
            connection.close()
            raise
        super().__init__(connection)
        self._owned = contextlib.ExitStack()
        self._kicks: dict[int, Notifier] = {}

    def own(self, thing: Owned) -> Owned:
        """Close `thing` with the connection."""
        self._owned.callback(thing.close)
        return thing

    def get(self, request: int, payload: bytes = b"", *, flags: int = REQUEST) -> bytes:
        """The reply to a request that always has one."""
        self.send(request, payload, flags=flags)
        return self.reply_to(request)

    def get_u64(self, request: int, *, flags: int = REQUEST) -> int:
        (value,) = struct.unpack("=Q", self.get(request, flags=flags))
        return int(value)

    def ask(self, request: int, payload: bytes = b"", descriptors: Sequence[int] = ()) -> int:
        """The acknowledgement of a request: 0 if it was accepted."""
        self.send(request, payload, descriptors, flags=NEED_REPLY)
        (status,) = struct.unpack("=Q", self.reply_to(request))
        return int(status)

    def tell(self, request: int, payload: bytes = b"", descriptors: Sequence[int] = ()) -> None:
        """A request that must be accepted."""
        status = self.ask(request, payload, descriptors)
        assert status == 0, f"{Id(request).name} was refused: {status:#x}"

    def reply_to(self, request: int) -> bytes:
        reply = self.receive()
        assert (reply.request, reply.flags, reply.descriptors) == (request, REPLY, [])
        return reply.payload

    # --- The steps of a set-up --------------------------------------------------------------------------------------

    def negotiate(self, features: int = PROTOCOL_FEATURES | VERSION_1, protocol: int = REPLY_ACK | MQ) -> None:
        self.tell(Id.SET_OWNER)
        if features & PROTOCOL_FEATURES:
            self.tell(Id.SET_PROTOCOL_FEATURES, u64(protocol))
        self.tell(Id.SET_FEATURES, u64(features))

    def share(self, *memories: Memory) -> None:
        table = memory_table(*(memory.region for memory in memories))
        self.tell(Id.SET_MEM_TABLE, table, [memory.descriptor for memory in memories])

    def place(self, ring: Ring, base: int = 0) -> None:
        """Everything about a ring that is not a descriptor."""
        self.tell(Id.SET_VRING_NUM, vring_state(ring.index, ring.size))
        self.tell(Id.SET_VRING_BASE, vring_state(ring.index, base))
        self.tell(Id.SET_VRING_ADDR, ring.address_payload())

    def set_log(self, log: Log) -> None:
        self.send(Id.SET_LOG_BASE, log.payload, [log.descriptor], flags=NEED_REPLY)
        assert self.reply_to(Id.SET_LOG_BASE) == log.payload

    def set_call(self, ring: Ring) -> Eventfd:
        call = self.own(Eventfd())
        self.tell(Id.SET_VRING_CALL, vring_descriptor(ring.index), [call.peer])
        return call

    def set_error(self, ring: Ring) -> Eventfd:
        error = self.own(Eventfd())
        self.tell(Id.SET_VRING_ERR, vring_descriptor(ring.index), [error.peer])
        return error

    def set_kick(self, ring: Ring, kick: Notifier | None = None) -> None:
        kick = kick or self.own(Eventfd())
        self._kicks[ring.index] = kick
        self.tell(Id.SET_VRING_KICK, vring_descriptor(ring.index), [kick.peer])

    def enable(self, ring: Ring, on: bool = True) -> None:
        self.tell(Id.SET_VRING_ENABLE, vring_state(ring.index, int(on)))

    def start(self, ring: Ring, base: int = 0) -> None:
        """Set a ring up and enable it."""
        self.place(ring, base)
        self.set_kick(ring)
        self.enable(ring)

    def stop(self, ring: Ring) -> int:
        """Stop a ring. Returns its base."""
        index, base = struct.unpack("=II", self.get(Id.GET_VRING_BASE, vring_state(ring.index)))
        assert index == ring.index
        return int(base)

    def kick(self, ring: Ring) -> None:
        self._kicks[ring.index].signal()

    def exchange(self, ring: Ring, data: bytes = b"", room: int = 0, *, indirect: bool = False) -> bytes:
        """One request: its data, and the answer."""
        chain = ring.add([data] if data else [], [room] if room else [], indirect=indirect)
        self.kick(ring)
        [(head, length)] = ring.wait()
        assert head == chain.head
        return chain.written(length)

    def get_config(self, offset: int, size: int) -> bytes:
        reply = self.get(Id.GET_CONFIG, config(offset, bytes(size)))
        assert reply[:12] == struct.pack("=III", offset, size, 0)
        return reply[12:]

    def set_config(self, offset: int, data: bytes) -> int:
        return self.ask(Id.SET_CONFIG, config(offset, data))

    def open_backend_channel(self) -> Channel:
        ours, theirs = socket.socketpair()
        with theirs:
            self.tell(Id.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        return self.own(Channel(ours))

    def close(self) -> None:
        super().close()
        self._owned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


# --- Notifications ----------------------------------------------------------------------------------------------------


class HasClose(Protocol):
    def close(self) -> None: ...


class Notifier(Protocol):
    """What SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR carry."""

    #: The descriptor to send to the back-end.
    peer: int

    def signal(self) -> None: ...

    def came(self, timeout: float = DEADLINE) -> bool:
        """Whether a notification comes within `timeout` seconds; it is taken."""
        ...

    def close(self) -> None: ...


class Eventfd:
    def __init__(self, *, blocking: bool = True) -> None:
        self.peer = os.eventfd(0, os.EFD_CLOEXEC | (0 if blocking else os.EFD_NONBLOCK))

    def signal(self) -> None:
        os.eventfd_write(self.peer, 1)

    def came(self, timeout: float = DEADLINE) -> bool:
        if not select.select([self.peer], [], [], timeout)[0]:
            return False
        os.eventfd_read(self.peer)
        return True

    def close(self) -> None:
        os.close(self.peer)


class NonblockingEventfd(Eventfd):
    def __init__(self) -> None:
        super().__init__(blocking=False)


class Socketpair:
    """What User-Mode Linux uses for calls."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self.peer = self._theirs.fileno()

    def signal(self) -> None:
        self._ours.send(struct.pack("=Q", 1))

    def came(self, timeout: float = DEADLINE) -> bool:
        if not select.select([self._ours], [], [], timeout)[0]:
            return False
        assert len(self._ours.recv(4096)) % 8 == 0
        return True

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()


class Pipe:
    """The back-end reads."""

    def __init__(self) -> None:
        self.peer, self._ours = os.pipe()

    def signal(self) -> None:
        os.write(self._ours, struct.pack("=Q", 1))

    def came(self, timeout: float = DEADLINE) -> bool:
        raise NotImplementedError("the other end is the back-end's")

    def close(self) -> None:
        os.close(self.peer)
        os.close(self._ours)


# --- Memory and rings -------------------------------------------------------------------------------------------------


class Memory:
    """A piece of guest memory: a memfd, with a guest address and another user address."""

    def __init__(
        self, size: int = 1 << 20, *, guest: int = 0x4000_0000, user: int = 0x7F12_0000_0000, offset: int = 0
    ) -> None:
        self.size = size
        self.guest = guest
        self.user = user
        self.offset = offset
        self.descriptor = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.truncate(self.descriptor, offset + size)
        self.map = mmap.mmap(self.descriptor, offset + size)
        self._free = guest

    @property
    def region(self) -> bytes:
        """How the protocol describes it."""
        return self.describe()

    def describe(self, **other: int) -> bytes:
        """The same with other numbers."""
        words = {"guest": self.guest, "size": self.size, "user": self.user, "offset": self.offset} | other
        return struct.pack("=QQQQ", *words.values())

    @property
    def end(self) -> int:
        return self.guest + self.size

    def allocate(self, size: int, alignment: int = 16) -> int:
        """The guest address of some bytes that nobody has yet."""
        address = -(-self._free // alignment) * alignment
        assert address + size <= self.end
        self._free = address + size
        return address

    def put(self, data: bytes) -> int:
        address = self.allocate(len(data))
        self.write(address, data)
        return address

    def write(self, address: int, data: bytes) -> None:
        at = self._position(address, len(data))
        self.map[at : at + len(data)] = data

    def read(self, address: int, size: int) -> bytes:
        at = self._position(address, size)
        return self.map[at : at + size]

    def to_user(self, address: int) -> int:
        return address - self.guest + self.user

    def _position(self, address: int, size: int) -> int:
        assert self.guest <= address <= address + size <= self.end
        return address - self.guest + self.offset

    def close(self) -> None:
        self.map.close()
        os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@dataclass
class Chain:
    """What a driver offered."""

    memory: Memory
    head: int
    readable: list[tuple[int, int]]
    writable: list[tuple[int, int]]

    def written(self, length: int) -> bytes:
        """The first `length` bytes of the writable part."""
        data = b"".join(self.memory.read(address, size) for address, size in self.writable)
        assert length <= len(data)
        return data[:length]


class Log:
    """A dirty log: a bit for each page of 4096 bytes from guest address 0 on."""

    def __init__(self, size: int, *, offset: int = 0, slack: int = 0) -> None:
        """`size` bytes at `offset` of a file with `slack` more."""
        self.size = size
        self.offset = offset
        self.descriptor = os.memfd_create("guest-log", os.MFD_CLOEXEC)
        os.truncate(self.descriptor, offset + size + slack)

    @classmethod
    def of(cls, *memories: Memory) -> Self:
        """As large as these memories need it."""
        return cls(-(-max(memory.end for memory in memories) // (8 * 4096)))

    @property
    def payload(self) -> bytes:
        """The payload of SET_LOG_BASE."""
        return struct.pack("=QQ", self.size, self.offset)

    def dirty(self) -> set[int]:
        """The guest addresses of the pages that are marked."""
        bits = os.pread(self.descriptor, self.size, self.offset)
        return {4096 * (8 * at + bit) for at, byte in enumerate(bits) if byte for bit in range(8) if byte & 1 << bit}

    def clear(self) -> None:
        """Only while the device does nothing: it is not atomic."""
        os.pwrite(self.descriptor, bytes(self.size), self.offset)

    def close(self) -> None:
        os.close(self.descriptor)


class Ring:
    """The driver's side of a split ring, field by field. Virtio 1.3, section 2.7.

    `order` is its byte order, as in :mod:`struct`.
    """

    def __init__(self, memory: Memory, index: int = 0, size: int = 16, order: str = "<") -> None:
        self.order = order
        self.memory = memory
        self.index = index
        self.size = size
        self.descriptors = memory.allocate(16 * size, 16)
        self.avail = memory.allocate(6 + 2 * size, 2)
        self.used = memory.allocate(6 + 8 * size, 4)
        self._next_descriptor = 0
        self.seen = 0

    def address_payload(self, **other: int) -> bytes:
        """The payload of SET_VRING_ADDR, which takes user addresses."""
        to_user = self.memory.to_user
        addresses = {
            "descriptors": to_user(self.descriptors),
            "used": to_user(self.used),
            "avail": to_user(self.avail),
        } | other
        return vring_address(self.index, **addresses)

    def clear(self, index: int = 0) -> None:
        """Begin anew, as a driver that is bound again does."""
        self.memory.write(self.descriptors, bytes(16 * self.size))
        self.memory.write(self.avail, bytes(6 + 2 * self.size))
        self.memory.write(self.used, bytes(6 + 8 * self.size))
        self._next_descriptor = 0
        self.avail_index = self.used_index = self.seen = index

    # --- Fields -----------------------------------------------------------------------------------------------------

    def set_descriptor(self, at: int, address: int, length: int, flags: int = 0, next: int = 0) -> None:  # noqa: A002
        self.memory.write(self.descriptors + 16 * at, struct.pack(self.order + "QIHH", address, length, flags, next))

    @property
    def avail_flags(self) -> int:
        return self._u16(self.avail)

    @avail_flags.setter
    def avail_flags(self, value: int) -> None:
        self._set_u16(self.avail, value)

    @property
    def avail_index(self) -> int:
        return self._u16(self.avail + 2)

    @avail_index.setter
    def avail_index(self, value: int) -> None:
        self._set_u16(self.avail + 2, value)

    @property
    def used_event(self) -> int:
        return self._u16(self.avail + 4 + 2 * self.size)

    @used_event.setter
    def used_event(self, value: int) -> None:
        self._set_u16(self.avail + 4 + 2 * self.size, value)

    @property
    def used_flags(self) -> int:
        return self._u16(self.used)

    @property
    def used_index(self) -> int:
        return self._u16(self.used + 2)

    @used_index.setter
    def used_index(self, value: int) -> None:
        self._set_u16(self.used + 2, value)

    @property
    def avail_event(self) -> int:
        return self._u16(self.used + 4 + 8 * self.size)

    def _u16(self, address: int) -> int:
        (value,) = struct.unpack(self.order + "H", self.memory.read(address, 2))
        return int(value)

    def _set_u16(self, address: int, value: int) -> None:
        self.memory.write(address, struct.pack(self.order + "H", value & 0xFFFF))

    # --- Requests ---------------------------------------------------------------------------------------------------

    def add(
        self,
        readable: Iterable[bytes] = (),
        writable: Iterable[int] = (),
        *,
        indirect: bool = False,
        memory: Memory | None = None,
    ) -> Chain:
        """Offer a chain, with one descriptor for each piece. Descriptors are reused when the table is full."""
        memory = memory or self.memory
        pieces = [(memory.put(data), len(data), 0) for data in readable]
        room = [(memory.allocate(size), size, WRITE) for size in writable]
        for address, size, _ in room:
            memory.write(address, bytes(size))
        chain = Chain(memory, -1, [piece[:2] for piece in pieces], [piece[:2] for piece in room])
        chain.head = self.add_pieces([*pieces, *room], indirect=indirect)
        return chain

    def add_pieces(self, pieces: Sequence[tuple[int, int, int]], *, indirect: bool = False) -> int:
        """The same from (address, length, flags); NEXT is set where it belongs. Returns the head."""
        if indirect:
            table = b"".join(
                struct.pack(self.order + "QIHH", address, length, flags | (NEXT if at + 1 < len(pieces) else 0), at + 1)
                for at, (address, length, flags) in enumerate(pieces)
            )
            return self.add_pieces([(self.memory.put(table), len(table), INDIRECT)])
        heads = [(self._next_descriptor + at) % self.size for at in range(len(pieces))]
        self._next_descriptor = (self._next_descriptor + len(pieces)) % self.size
        following = [*heads[1:], None]
        for head, after, (address, length, flags) in zip(heads, following, pieces, strict=True):
            self.set_descriptor(head, address, length, flags | (0 if after is None else NEXT), after or 0)
        self.offer(heads[0])
        return heads[0]

    def offer(self, *heads: int) -> None:
        """Make heads available, be they good or not."""
        for head in heads:
            slot = self.avail_index % self.size
            self._set_u16(self.avail + 4 + 2 * slot, head)
            self.avail_index += 1

    def take(self) -> list[tuple[int, int]]:
        """The used entries that were not seen yet: (head, bytes written)."""
        return list(self._take())

    def _take(self) -> Iterator[tuple[int, int]]:
        while self.seen != self.used_index:
            slot = self.seen % self.size
            head, length = struct.unpack(self.order + "II", self.memory.read(self.used + 4 + 8 * slot, 8))
            self.seen = (self.seen + 1) & 0xFFFF
            yield head, length

    def wait(self, count: int = 1, timeout: float = DEADLINE) -> list[tuple[int, int]]:
        """The next `count` used entries."""
        entries: list[tuple[int, int]] = []

        def enough() -> bool:
            entries.extend(self.take())
            return len(entries) >= count

        wait_until(enough, f"queue {self.index}: {count} used entries", timeout)
        assert len(entries) == count, f"{len(entries)} used entries instead of {count}"
        return entries
