"""A vhost-user back-end that does what a test tells it, also nonsense.

It shares no code with the package. Messages are answered by rote, by a thread, unless a test has put another answer
into `answers`; rings are worked on by the test itself, entry by entry.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import Self

import raw
from raw import Id

FEATURES = raw.PROTOCOL_FEATURES | raw.VERSION_1 | 1 << 5
PROTOCOL = raw.MQ | raw.REPLY_ACK | raw.BACKEND_REQ | raw.CONFIG | raw.RESET_DEVICE

Answer = Callable[[raw.Message], None]


class BackEnd(raw.Channel):
    """Serves `connection` in a thread, until it is closed."""

    def __init__(self, connection: socket.socket, *, features: int = FEATURES, protocol: int = PROTOCOL) -> None:
        super().__init__(connection)
        self.socket.settimeout(None)
        #: Instead of the answer by rote, for those who want to see another one.
        self.answers: dict[int, Answer] = {}
        self.messages: list[raw.Message] = []
        self.channel: raw.Channel | None = None
        self.config = bytearray(16)
        self.rings: dict[int, Ring] = {}
        self._words = {Id.GET_FEATURES: features, Id.GET_PROTOCOL_FEATURES: protocol, Id.GET_QUEUE_NUM: 2}
        self._words |= {Id.GET_MAX_MEM_SLOTS: 8}
        self._memory: list[tuple[int, mmap.mmap]] = []
        self._regions: list[tuple[int, int, int]] = []
        self._descriptors: list[int] = []
        self._thread = threading.Thread(target=self._run, name="raw back-end")
        self._thread.start()

    def names(self) -> list[str]:
        """The requests that came, by name."""
        return [Id(message.request).name for message in self.messages]

    def reply(self, message: raw.Message, payload: bytes) -> None:
        self.send(message.request, payload, flags=raw.REPLY)

    def answer(self, message: raw.Message) -> None:
        """The answer by rote."""
        match message.request:
            case request if request in self._words:
                self.reply(message, raw.u64(self._words[Id(request)]))
                return
            case Id.GET_VRING_BASE:
                (index,) = struct.unpack_from("=I", message.payload)
                self.reply(message, raw.vring_state(index, self.rings[index].next_avail))
                return
            case Id.GET_CONFIG:
                offset, size, _ = struct.unpack_from("=III", message.payload)
                self.reply(message, raw.config(offset, bytes(self.config[offset : offset + size])))
                return
            case Id.SET_CONFIG:
                offset, size, _ = struct.unpack_from("=III", message.payload)
                self.config[offset : offset + size] = message.payload[12:]
            case Id.SET_MEM_TABLE:
                self._unmap()
                for at, descriptor in enumerate(message.descriptors):
                    self._map(message.payload[8 + 32 * at :][:32], descriptor)
            case Id.ADD_MEM_REG:
                self._map(message.payload[8:], message.descriptors[0])
            case Id.SET_BACKEND_REQ_FD:
                self.channel = raw.Channel(socket.socket(fileno=os.dup(message.descriptors[0])))
            case Id.SET_VRING_NUM:
                index, size = struct.unpack("=II", message.payload)
                self.rings[index] = Ring(self, size)
            case Id.SET_VRING_ADDR:
                index, _, *addresses = struct.unpack("=IIQQQQ", message.payload)
                self.rings[index].descriptors, self.rings[index].used, self.rings[index].avail, _ = addresses
            case Id.SET_VRING_CALL | Id.SET_VRING_ERR | Id.SET_VRING_KICK:
                ring = self.rings[message.payload[0]]
                setattr(ring, Id(message.request).name[10:].lower(), self._own(message.descriptors[0]))
        if message.flags == raw.NEED_REPLY:
            self.reply(message, raw.u64(0))

    def user_address(self, guest_address: int) -> int:
        for start, to_user, size in self._regions:
            if start <= guest_address < start + size:
                return guest_address + to_user
        raise AssertionError(f"{guest_address:#x} is not in the memory that was shared")

    def read(self, address: int, size: int) -> bytes:
        """Memory at a user address."""
        memory, at = self._find(address)
        return memory[at : at + size]

    def write(self, address: int, data: bytes) -> None:
        memory, at = self._find(address)
        memory[at : at + len(data)] = data

    def close(self) -> None:
        # The thread is in the middle of reading from it; or the peer is gone already.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        super().close()
        if self.channel is not None:
            self.channel.close()
        self._unmap()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            try:
                message = self.receive()
                self.messages.append(message)
                self.answers.get(message.request, self.answer)(message)
            except OSError:
                break
            for descriptor in message.descriptors:
                os.close(descriptor)

    def _own(self, descriptor: int) -> int:
        self._descriptors.append(os.dup(descriptor))
        return self._descriptors[-1]

    def _map(self, region: bytes, descriptor: int) -> None:
        guest_address, size, user_address, offset = struct.unpack("=QQQQ", region)
        self._regions.append((guest_address, user_address - guest_address, size))
        self._memory.append((user_address, mmap.mmap(descriptor, size, offset=offset)))

    def _unmap(self) -> None:
        for _, memory in self._memory:
            memory.close()
        self._memory.clear()
        self._regions.clear()

    def _find(self, address: int) -> tuple[mmap.mmap, int]:
        for start, memory in self._memory:
            if start <= address < start + len(memory):
                return memory, address - start
        raise AssertionError(f"{address:#x} is not in the memory that was shared")


class Ring:
    """A split ring, and what a back-end does to it."""

    descriptors = avail = used = 0
    kick = call = err = -1

    def __init__(self, back_end: BackEnd, size: int) -> None:
        self._back_end = back_end
        self._size = size
        self._next_used = 0
        self.next_avail = 0

    def take(self) -> int:
        """The descriptor that the next available chain begins with, which comes soon if it is not there."""
        raw.wait_until(lambda: self._word(self.avail + 2) != self.next_avail, "a chain is available")
        head = self._word(self.avail + 4 + 2 * (self.next_avail % self._size))
        self.next_avail += 1
        return head

    def complete(self, head: int, written: int = 0) -> None:
        """Give a chain back, whether there is one or not."""
        self.put(head, written)
        self.publish(self._next_used)

    def put(self, head: int, written: int) -> None:
        entry = struct.pack("<II", head, written)
        self._back_end.write(self.used + 4 + 8 * (self._next_used % self._size), entry)
        self._next_used += 1

    def skip(self, count: int) -> None:
        """Give back `count` chains more without entries of their own, as with IN_ORDER, and notify."""
        self._next_used += count
        self.publish(self._next_used)

    def publish(self, index: int) -> None:
        """Write the used index, and notify."""
        self._back_end.write(self.used + 2, struct.pack("<H", index))
        os.eventfd_write(self.call, 1)

    def fill(self, head: int, data: bytes) -> None:
        """Write `data` where a descriptor says."""
        (guest_address,) = struct.unpack("<Q", self._back_end.read(self.descriptors + 16 * head, 8))
        self._back_end.write(self._back_end.user_address(guest_address), data)

    def _word(self, address: int) -> int:
        (word,) = struct.unpack("<H", self._back_end.read(address, 2))
        return int(word)
