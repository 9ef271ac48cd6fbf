"""A small disk in plain Python that does everything right, so that others can be derived from it that do not.

It shares no code with the package. Every step is a method of its own: what is wrong on purpose overrides one.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

NEED_REPLY = 8
NEXT, WRITE, INDIRECT = 1, 2, 4
EVENT_IDX, PROTOCOL_FEATURES = 1 << 29, 1 << 30
TRANSPORT = 1 << 28 | EVENT_IDX | PROTOCOL_FEATURES | 1 << 32
BLK_SIZE, FLUSH, CONFIG_WCE, MQ = 1 << 6, 1 << 9, 1 << 11, 1 << 12

NAMES = {
    1: "get_features", 2: "set_features", 3: "set_owner", 4: "reset_owner", 5: "set_mem_table", 8: "set_vring_num",
    9: "set_vring_addr", 10: "set_vring_base", 11: "get_vring_base", 12: "set_vring_kick", 13: "set_vring_call",
    14: "set_vring_err", 15: "get_protocol_features", 16: "set_protocol_features", 17: "get_queue_num",
    18: "set_vring_enable", 21: "set_backend_req_fd", 24: "get_config", 25: "set_config", 34: "reset_device",
    36: "get_max_mem_slots", 37: "add_mem_reg", 38: "rem_mem_reg", 39: "set_status", 40: "get_status",
}  # fmt: skip

#: Bytes of payload, and descriptors, of the messages that always have as many.
SIZES = {
    "get_features": 0, "set_features": 8, "set_owner": 0, "reset_owner": 0, "set_vring_num": 8, "set_vring_addr": 40,
    "set_vring_base": 8, "get_vring_base": 8, "set_vring_kick": 8, "set_vring_call": 8, "set_vring_err": 8,
    "get_protocol_features": 0, "set_protocol_features": 8, "get_queue_num": 0, "set_vring_enable": 8,
    "set_backend_req_fd": 0, "reset_device": 0, "get_max_mem_slots": 0, "add_mem_reg": 40, "rem_mem_reg": 40,
    "set_status": 8, "get_status": 0,
}  # fmt: skip


class Refused(Exception):
    """This message cannot be."""


class Broken(Exception):
    """This ring cannot be."""


class Crash(BaseException):
    """What a signal would be to a process."""


class Region:
    def __init__(self, description: bytes, descriptor: int) -> None:
        words: tuple[int, ...] = struct.unpack("=QQQQ", description)
        self.guest, self.size, self.user, self.offset = words
        if not self.size or self.guest + self.size > 1 << 64 or self.user + self.size > 1 << 64:
            raise Refused
        if os.fstat(descriptor).st_size < self.offset + self.size:
            raise Refused
        self.map = mmap.mmap(descriptor, self.offset + self.size)
        # Which keeps a descriptor of its own.
        self.file_size = self.map.size

    def overlaps(self, other: Region) -> bool:
        return max(self.guest, other.guest) < min(self.guest + self.size, other.guest + other.size)


class Ring:
    def __init__(self, index: int) -> None:
        self.index = index
        self.size = self.next_avail = self.next_used = 0
        self.addresses: tuple[int, int, int] | None = None
        self.kick = self.call = self.error = -1
        self.polls = self.started = self.enabled = self.broken = False


class Session:
    """One connection to the disk. What outlives it is `disk`."""

    features: ClassVar[int] = TRANSPORT | BLK_SIZE | FLUSH | CONFIG_WCE | MQ
    protocol: ClassVar[int] = 1 << 0 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 13 | 1 << 15 | 1 << 16
    queues: ClassVar[int] = 2
    slots: ClassVar[int] = 32
    #: Requests that are looked at after a kick.
    per_kick: ClassVar[int] = 1 << 16

    def __init__(self, connection: socket.socket, disk: Disk) -> None:
        self.socket = connection
        self.disk = disk
        self.set: int | None = None
        self.status_word = 0
        self.regions: list[Region] = []
        self.rings = [Ring(index) for index in range(self.queues)]
        self.channel: int | None = None
        self.until = -1

    # --- Messages ---------------------------------------------------------------------------------------------------

    def serve(self, stop: int) -> None:
        """Until the end of the connection, or of the test."""
        self.until = stop
        try:
            self.begin()
            while True:
                kicks = {ring.kick: ring for ring in self.rings if ring.kick >= 0}
                polling = any(ring.polls and ring.started for ring in self.rings)
                waits: list[socket.socket | int] = [self.socket, stop, *kicks]
                ready, _, _ = select.select(waits, [], [], 0.002 if polling else None)
                if stop in ready:
                    return
                for descriptor in ready:
                    if descriptor in kicks:
                        self.kicked(kicks[descriptor])
                for ring in self.rings:
                    if ring.polls:
                        self.look_at(ring)
                if self.socket in ready and not self.message():
                    return
        except OSError:
            return
        finally:
            self.end()

    def begin(self) -> None:
        pass

    @property
    def agreed(self) -> int:
        """The features that were set."""
        return self.set or 0

    def end(self) -> None:
        self.socket.close()
        for ring in self.rings:
            for name in ("kick", "call", "error"):
                self.replace(ring, name, -1)
        if self.channel is not None:
            os.close(self.channel)

    def message(self) -> bool:
        """Handle the next message. Returns whether the connection goes on."""
        head, descriptors = self.receive(12)
        if len(head) < 12:
            return False
        request, flags, size = struct.unpack("=III", head)
        if not self.is_request(flags) or size > 4096:
            return self.hang_up(descriptors)
        payload, _ = self.receive(size)
        if len(payload) < size:
            return False
        try:
            return self.handle(request, flags, payload, descriptors)
        finally:
            self.close_all(descriptors)

    def close_all(self, descriptors: list[int]) -> None:
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def hang_up(self, descriptors: list[int]) -> bool:
        self.close_all(descriptors)
        return False

    def is_request(self, flags: int) -> bool:
        return flags & ~NEED_REPLY == 1

    def receive(self, size: int) -> tuple[bytes, list[int]]:
        data, descriptors = b"", list[int]()
        while len(data) < size:
            piece, came, _, _ = socket.recv_fds(self.socket, size - len(data), 16)
            descriptors += came
            if not piece:
                break
            data += piece
        return data, descriptors

    def handle(self, request: int, flags: int, payload: bytes, descriptors: list[int]) -> bool:
        name = NAMES.get(request, "")
        try:
            if not name:
                raise Refused
            self.check(name, payload, descriptors)
            answer: bytes | None = getattr(self, name)(payload, descriptors)
            status = 0
        except Refused:
            answer, status = None, 1
            if name == "get_config":
                answer = b""
            elif name == "get_vring_base" or not flags & NEED_REPLY:
                return False
        if answer is not None:
            self.answer(request, flags, answer)
        elif flags & NEED_REPLY:
            self.acknowledge(request, flags, status)
        return True

    def check(self, name: str, payload: bytes, descriptors: list[int]) -> None:
        if len(payload) != SIZES.get(name, len(payload)):
            raise Refused
        expected = 0
        if name in {"set_vring_kick", "set_vring_call", "set_vring_err"}:
            expected = not payload[1] & 1
        elif name in {"set_backend_req_fd", "add_mem_reg"}:
            expected = 1
        elif name == "set_mem_table":
            expected = struct.unpack_from("=I", payload)[0]
        if len(descriptors) != expected:
            raise Refused

    def answer(self, request: int, flags: int, payload: bytes) -> None:
        self.send(request, 5, payload)

    def acknowledge(self, request: int, flags: int, status: int) -> None:
        self.send(request, 5, struct.pack("=Q", status))

    def send(self, request: int, flags: int, payload: bytes) -> None:
        self.socket.sendall(struct.pack("=III", request, flags, len(payload)) + payload)

    # --- Features ---------------------------------------------------------------------------------------------------

    def get_features(self, payload: bytes, descriptors: list[int]) -> bytes:
        return struct.pack("=Q", self.features)

    def set_features(self, payload: bytes, descriptors: list[int]) -> None:
        (bits,) = struct.unpack("=Q", payload)
        if bits & ~self.features:
            raise Refused
        self.set = bits
        if not bits & PROTOCOL_FEATURES:
            for ring in self.rings:
                ring.enabled = True

    def get_protocol_features(self, payload: bytes, descriptors: list[int]) -> bytes:
        return struct.pack("=Q", self.protocol)

    def set_protocol_features(self, payload: bytes, descriptors: list[int]) -> None:
        if struct.unpack("=Q", payload)[0] & ~self.protocol:
            raise Refused

    def get_queue_num(self, payload: bytes, descriptors: list[int]) -> bytes:
        return struct.pack("=Q", self.queues)

    def set_owner(self, payload: bytes, descriptors: list[int]) -> None:
        pass

    def reset_owner(self, payload: bytes, descriptors: list[int]) -> None:
        pass

    def set_status(self, payload: bytes, descriptors: list[int]) -> None:
        (self.status_word,) = struct.unpack("=Q", payload)

    def get_status(self, payload: bytes, descriptors: list[int]) -> bytes:
        return struct.pack("=Q", self.status_word)

    def reset_device(self, payload: bytes, descriptors: list[int]) -> None:
        self.status_word = 0
        for ring in self.rings:
            ring.enabled = False

    def set_backend_req_fd(self, payload: bytes, descriptors: list[int]) -> None:
        self.channel = os.dup(descriptors[0])

    # --- Configuration space ----------------------------------------------------------------------------------------

    def get_config(self, payload: bytes, descriptors: list[int]) -> bytes:
        offset, size, flags = struct.unpack_from("=III", payload)
        if len(payload) != 12 + size or offset + size > len(self.disk.config):
            raise Refused
        return struct.pack("=III", offset, size, flags) + bytes(self.disk.config[offset : offset + size])

    def set_config(self, payload: bytes, descriptors: list[int]) -> None:
        offset, size, _ = struct.unpack_from("=III", payload)
        if len(payload) != 12 + size or offset + size > len(self.disk.config):
            raise Refused
        for at in range(size):
            if self.is_writable(offset + at):
                self.disk.config[offset + at] = payload[12 + at]

    def is_writable(self, at: int) -> bool:
        return at == 32

    # --- Memory -----------------------------------------------------------------------------------------------------

    def set_mem_table(self, payload: bytes, descriptors: list[int]) -> None:
        (count,) = struct.unpack_from("=I", payload)
        if count > 8 or len(payload) < 8 + 32 * count:
            raise Refused
        regions: list[Region] = []
        for at, descriptor in enumerate(descriptors):
            self.map(payload[8 + 32 * at :][:32], descriptor, regions)
        self.use(regions)

    def add_mem_reg(self, payload: bytes, descriptors: list[int]) -> None:
        regions = list(self.regions)
        if len(regions) >= self.slots:
            raise Refused
        self.map(payload[8:], descriptors[0], regions)
        self.use(regions)

    def rem_mem_reg(self, payload: bytes, descriptors: list[int]) -> None:
        guest, size, user, _ = struct.unpack("=QQQQ", payload[8:])
        left = [each for each in self.regions if (each.guest, each.size, each.user) != (guest, size, user)]
        if len(left) == len(self.regions):
            raise Refused
        self.use(left)

    def get_max_mem_slots(self, payload: bytes, descriptors: list[int]) -> bytes:
        return struct.pack("=Q", self.slots)

    def map(self, description: bytes, descriptor: int, regions: list[Region]) -> None:
        region = Region(description, descriptor)
        if any(region.overlaps(other) for other in regions):
            raise Refused
        regions.append(region)

    def use(self, regions: list[Region]) -> None:
        self.regions = regions

    def pieces(self, guest: int, size: int) -> Iterator[tuple[mmap.mmap, int, int]]:
        """Where a buffer is: mappings, offsets and sizes."""
        while size:
            for region in self.regions:
                if region.guest <= guest < region.guest + region.size:
                    break
            else:
                raise Broken
            here = min(size, region.guest + region.size - guest)
            yield region.map, guest - region.guest + region.offset, here
            guest, size = guest + here, size - here

    def read_guest(self, guest: int, size: int) -> bytes:
        return b"".join(memory[at : at + here] for memory, at, here in self.pieces(guest, size))

    def write_guest(self, guest: int, data: bytes) -> None:
        for memory, at, here in list(self.pieces(guest, len(data))):
            memory[at : at + here], data = data[:here], data[here:]

    def user(self, address: int, size: int) -> tuple[mmap.mmap, int]:
        for region in self.regions:
            if region.user <= address and address + size <= region.user + region.size:
                return region.map, address - region.user + region.offset
        raise Broken

    def load(self, address: int, form: str) -> tuple[int, ...]:
        memory, at = self.user(address, struct.calcsize(form))
        return struct.unpack_from(form, memory, at)

    def store(self, address: int, form: str, *values: int) -> None:
        memory, at = self.user(address, struct.calcsize(form))
        struct.pack_into(form, memory, at, *values)

    # --- Rings ------------------------------------------------------------------------------------------------------

    def ring(self, index: int) -> Ring:
        if index >= len(self.rings):
            raise Refused
        return self.rings[index]

    def set_vring_num(self, payload: bytes, descriptors: list[int]) -> None:
        index, size = struct.unpack("=II", payload)
        ring = self.ring(index)
        if not 0 < size <= 1024 or size & (size - 1):
            raise Refused
        ring.size = size

    def set_vring_base(self, payload: bytes, descriptors: list[int]) -> None:
        index, base = struct.unpack("=II", payload)
        ring = self.ring(index)
        if base > 0xFFFF:
            raise Refused
        ring.next_avail = base

    def set_vring_addr(self, payload: bytes, descriptors: list[int]) -> None:
        index, _, table, used, avail, _ = struct.unpack("=IIQQQQ", payload)
        ring = self.ring(index)
        if table % 16 or used % 4 or avail % 2:
            raise Refused
        try:
            (ring.next_used,) = self.load(used + 2, "<H")
            self.user(table, 16 * ring.size)
        except Broken:
            raise Refused from None
        ring.addresses = table, used, avail

    def get_vring_base(self, payload: bytes, descriptors: list[int]) -> bytes:
        index, _ = struct.unpack("=II", payload)
        ring = self.ring(index)
        self.stop(ring)
        return struct.pack("=II", index, ring.next_avail)

    def stop(self, ring: Ring) -> None:
        ring.started = ring.broken = ring.polls = False
        self.replace(ring, "kick", -1)
        self.replace(ring, "call", -1)

    def set_vring_kick(self, payload: bytes, descriptors: list[int]) -> None:
        ring = self.ring(payload[0])
        self.replace(ring, "kick", *descriptors[:1] or [-1])
        ring.polls = not descriptors
        ring.started, ring.broken = True, False
        self.look_at(ring)

    def set_vring_call(self, payload: bytes, descriptors: list[int]) -> None:
        self.replace(self.ring(payload[0]), "call", *descriptors[:1] or [-1])

    def set_vring_err(self, payload: bytes, descriptors: list[int]) -> None:
        self.replace(self.ring(payload[0]), "error", *descriptors[:1] or [-1])

    def set_vring_enable(self, payload: bytes, descriptors: list[int]) -> None:
        index, on = struct.unpack("=II", payload)
        ring = self.ring(index)
        if on > 1:
            raise Refused
        ring.enabled = bool(on)
        self.look_at(ring)

    def replace(self, ring: Ring, name: str, descriptor: int) -> None:
        old = getattr(ring, name)
        setattr(ring, name, os.dup(descriptor) if descriptor >= 0 else -1)
        if old >= 0:
            os.close(old)

    def kicked(self, ring: Ring) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(ring.kick, 8)
        self.look_at(ring)

    def may_run(self, ring: Ring) -> bool:
        return ring.started and ring.enabled and not ring.broken and ring.addresses is not None and ring.size > 0

    def look_at(self, ring: Ring) -> None:
        """Do what is available."""
        if not self.may_run(ring):
            return
        try:
            self.work(ring)
        except Broken:
            self.give_up(ring)

    def give_up(self, ring: Ring) -> None:
        ring.broken = True
        if ring.error >= 0:
            os.write(ring.error, struct.pack("=Q", 1))

    def work(self, ring: Ring) -> None:
        assert ring.addresses is not None
        table, _, avail = ring.addresses
        before = ring.next_used
        for _ in range(self.per_kick):
            (index,) = self.load(avail + 2, "<H")
            waiting = (index - ring.next_avail) & 0xFFFF
            if waiting > ring.size:
                raise Broken
            if not waiting:
                break
            (head,) = self.load(avail + 4 + 2 * (ring.next_avail % ring.size), "<H")
            readable, writable = self.chain(table, ring.size, head)
            ring.next_avail = (ring.next_avail + 1) & 0xFFFF
            self.finish(ring, head, self.perform(readable, writable))
        self.want_kicks(ring)
        if ring.next_used != before and self.wants_call(ring, before):
            self.notify(ring)

    def want_kicks(self, ring: Ring) -> None:
        """The driver shall kick for the next request."""
        assert ring.addresses is not None
        if self.agreed & EVENT_IDX:
            self.store(ring.addresses[1] + 4 + 8 * ring.size, "<H", ring.next_avail)

    def finish(self, ring: Ring, head: int, written: int) -> None:
        assert ring.addresses is not None
        used = ring.addresses[1]
        self.store(used + 4 + 8 * (ring.next_used % ring.size), "<II", head, written)
        ring.next_used = (ring.next_used + 1) & 0xFFFF
        self.store(used + 2, "<H", ring.next_used)

    def wants_call(self, ring: Ring, before: int) -> bool:
        assert ring.addresses is not None
        avail = ring.addresses[2]
        if self.agreed & EVENT_IDX:
            (event,) = self.load(avail + 4 + 2 * ring.size, "<H")
            return (ring.next_used - event - 1) & 0xFFFF < (ring.next_used - before) & 0xFFFF
        return not self.load(avail, "<H")[0] & 1

    def notify(self, ring: Ring) -> None:
        if ring.call >= 0:
            os.write(ring.call, struct.pack("=Q", 1))

    def chain(self, table: int, size: int, head: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The readable and the writable buffers of a request."""
        rows = self.rows(table, size)
        if head >= size:
            raise Broken
        address, length, flags, _ = rows(head)
        if flags & INDIRECT:
            if length % 16 or not length or flags & NEXT:
                raise Broken
            content = self.read_guest(address, length)
            size, head = length // 16, 0
            inner = list(struct.iter_unpack("<QIHH", content))
            rows = inner.__getitem__
        readable, writable = list[tuple[int, int]](), list[tuple[int, int]]()
        for _ in range(size):
            address, length, flags, following = rows(head)
            if flags & INDIRECT or address + length > 1 << 64 or (writable and not flags & WRITE):
                raise Broken
            (writable if flags & WRITE else readable).append((address, length))
            if not flags & NEXT:
                return readable, writable
            if following >= size:
                raise Broken
            head = following
        raise Broken

    def rows(self, table: int, size: int) -> Callable[[int], tuple[int, ...]]:
        return lambda at: self.load(table + 16 * at, "<QIHH")

    # --- The disk ---------------------------------------------------------------------------------------------------

    def perform(self, readable: list[tuple[int, int]], writable: list[tuple[int, int]]) -> int:
        """Do a request. Returns the bytes that were written."""
        room = sum(size for _, size in writable)
        if sum(size for _, size in readable) > 1 << 20:
            raise Broken
        header = b"".join(self.read_guest(*buffer) for buffer in readable)
        if len(header) < 16 or not 0 < room < 1 << 20:
            raise Broken
        kind, sector = struct.unpack_from("<I4xQ", header)
        content, status = self.read_disk(sector, room - 1) if kind == 0 else (bytes(room - 1), 2)
        data = content + bytes([status])
        for address, size in writable:
            self.write_guest(address, data[:size])
            data = data[size:]
        return room

    def read_disk(self, sector: int, count: int) -> tuple[bytes, int]:
        data = bytes(self.disk.data[512 * sector : 512 * sector + count])
        return data.ljust(count, b"\0"), int(len(data) < count)


class Disk:
    """What outlives a connection."""

    listener: socket.socket
    connections = 0
    drivers = 0

    def __init__(self) -> None:
        self.data = bytearray(b"sector 0".ljust(512, b"."))
        self.config = bytearray(96)
        struct.pack_into("<Q", self.config, 0, 1)
        struct.pack_into("<I", self.config, 20, 512)
        self.config[32] = 1
        struct.pack_into("<H", self.config, 34, 2)


class Server:
    """Serves sessions of a kind at `path`, one after the other, until it is closed, or crashes."""

    def __init__(self, path: Path, kind: type[Session] = Session) -> None:
        self._kind = kind
        self._disk = disk = Disk()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        disk.listener = self._listener
        self._stop = os.eventfd(0)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            waits: list[socket.socket | int] = [self._listener, self._stop]
            while self._stop not in select.select(waits, [], [])[0]:
                session = self._kind(self._listener.accept()[0], self._disk)
                session.serve(self._stop)
        except Crash:
            pass
        finally:
            self._listener.close()

    def close(self) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        os.close(self._stop)
