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
AVAILABLE, USED = 1 << 7, 1 << 15
LOG_ALL, EVENT_IDX, PROTOCOL_FEATURES, RING_PACKED = 1 << 26, 1 << 29, 1 << 30, 1 << 34
TRANSPORT = LOG_ALL | 1 << 28 | EVENT_IDX | PROTOCOL_FEATURES | 1 << 32 | RING_PACKED
IN_BAND = 1 << 14
BLK_SIZE, FLUSH, CONFIG_WCE, MQ = 1 << 6, 1 << 9, 1 << 11, 1 << 12

NAMES = {
    1: "get_features", 2: "set_features", 3: "set_owner", 4: "reset_owner", 5: "set_mem_table", 6: "set_log_base",
    7: "set_log_fd", 8: "set_vring_num", 9: "set_vring_addr", 10: "set_vring_base", 11: "get_vring_base",
    12: "set_vring_kick", 13: "set_vring_call", 14: "set_vring_err", 15: "get_protocol_features",
    16: "set_protocol_features", 17: "get_queue_num", 18: "set_vring_enable", 21: "set_backend_req_fd",
    24: "get_config", 25: "set_config", 31: "get_inflight_fd", 32: "set_inflight_fd", 34: "reset_device",
    35: "vring_kick", 36: "get_max_mem_slots", 37: "add_mem_reg", 38: "rem_mem_reg", 39: "set_status",
    40: "get_status", 42: "set_device_state_fd", 43: "check_device_state",
}  # fmt: skip

#: Bytes of payload, and descriptors, of the messages that always have as many.
SIZES = {
    "get_features": 0, "set_features": 8, "set_owner": 0, "reset_owner": 0, "set_vring_num": 8, "set_vring_addr": 40,
    "set_vring_base": 8, "get_vring_base": 8, "set_vring_kick": 8, "set_vring_call": 8, "set_vring_err": 8,
    "get_protocol_features": 0, "set_protocol_features": 8, "get_queue_num": 0, "set_vring_enable": 8,
    "set_backend_req_fd": 0, "reset_device": 0, "get_max_mem_slots": 0, "add_mem_reg": 40, "rem_mem_reg": 40,
    "set_status": 8, "get_status": 0, "set_log_base": 16, "set_log_fd": 0, "get_inflight_fd": 24, "set_inflight_fd": 24,
    "vring_kick": 8, "set_device_state_fd": 8, "check_device_state": 0,
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
        # Of a packed ring: the next descriptor to take and to use, and their wrap counters.
        self.slot = self.used_slot = 0
        self.wrap = self.used_wrap = 1
        # The guest address at which its used ring is logged.
        self.log: int | None = None
        # What was in flight when the device before was killed.
        self.resubmit: list[int] = []


class Log:
    """A bit for each page of guest memory."""

    def __init__(self, payload: bytes, descriptor: int) -> None:
        self.size, self.offset = struct.unpack("=QQ", payload)
        if self.offset + self.size > self.room(descriptor):
            raise Refused
        self.map = mmap.mmap(descriptor, 0)

    def room(self, descriptor: int) -> int:
        return os.fstat(descriptor).st_size

    def mark(self, guest: int, size: int) -> None:
        for page in range(guest // 4096, (guest + size - 1) // 4096 + 1):
            self.mark_page(page)

    def mark_page(self, page: int) -> None:
        if page // 8 < self.size:
            self.map[self.offset + page // 8] |= 1 << page % 8


class Record:
    """What is in flight, of split rings."""

    def __init__(self, payload: bytes, descriptor: int) -> None:
        words: tuple[int, ...] = struct.unpack_from("=QQHH", payload)
        self.size, self.offset, self.queues, self.queue_size = words
        if self.size < self.queues * stride(self.queue_size, packed=False):
            raise Refused
        if self.offset + self.size > os.fstat(descriptor).st_size:
            raise Refused
        self.map = mmap.mmap(descriptor, 0)

    def header(self, ring: Ring) -> tuple[int, ...]:
        """Version, descriptors, the head of the last batch, the used index."""
        return struct.unpack_from("=HHHH", self.map, self.part(ring) + 8)

    def set_header(self, ring: Ring, *words: int) -> None:
        struct.pack_into("=HHHH", self.map, self.part(ring) + 8, *words)

    def entry(self, ring: Ring, head: int) -> tuple[int, ...]:
        """In flight or not, the next in its batch, its number."""
        return struct.unpack_from("=B5xHQ", self.map, self.part(ring) + 16 + 16 * head)

    def set_entry(self, ring: Ring, head: int, *words: int) -> None:
        struct.pack_into("=B5xHQ", self.map, self.part(ring) + 16 + 16 * head, *words)

    def part(self, ring: Ring) -> int:
        return self.offset + ring.index * stride(self.queue_size, packed=False)


def stride(queue_size: int, *, packed: bool) -> int:
    entry = 32 if packed else 16
    return (entry + entry * queue_size + 63) // 64 * 64


class Session:
    """One connection to the disk. What outlives it is `disk`."""

    features: ClassVar[int] = TRANSPORT | BLK_SIZE | FLUSH | CONFIG_WCE | MQ
    protocol: ClassVar[int] = sum(1 << bit for bit in (0, 1, 3, 5, 9, 12, 13, 14, 15, 16, 19))
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
        self.protocol_set = 0
        self.log: Log | None = None
        self.log_descriptor = -1
        self.record: Record | None = None
        self.taken = 0
        self.loading = -1
        self.attached: list[int] = []
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
        self.close_all([self.log_descriptor, self.loading])
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
        if name == "vring_kick" and not status:
            self.look_at(self.ring(payload[0]))
        return True

    def check(self, name: str, payload: bytes, descriptors: list[int]) -> None:
        if len(payload) != SIZES.get(name, len(payload)):
            raise Refused
        expected = 0
        if name in {"set_vring_kick", "set_vring_call", "set_vring_err"}:
            expected = not payload[1] & 1
        elif name in {
            "set_backend_req_fd", "add_mem_reg", "set_log_base", "set_log_fd", "set_inflight_fd", "set_device_state_fd"
        }:  # fmt: skip
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
        attached, self.attached = self.attached, []
        socket.send_fds(self.socket, [struct.pack("=III", request, flags, len(payload)) + payload], attached)
        self.close_all(attached)

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
        (bits,) = struct.unpack("=Q", payload)
        if bits & ~self.protocol:
            raise Refused
        self.protocol_set = bits

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
        self.log_data(guest, len(data))
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
        if not 0 < size <= 1024 or (size & (size - 1) and not self.is_packed):
            raise Refused
        ring.size = size

    def set_vring_base(self, payload: bytes, descriptors: list[int]) -> None:
        index, base = struct.unpack("=II", payload)
        ring = self.ring(index)
        if self.is_packed:
            self.set_positions(ring, base)
        elif base > 0xFFFF:
            raise Refused
        ring.next_avail = base & 0xFFFF

    def set_vring_addr(self, payload: bytes, descriptors: list[int]) -> None:
        index, flags, table, used, avail, log = struct.unpack("=IIQQQQ", payload)
        ring = self.ring(index)
        ring.log = log if flags & 1 else None
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
        return struct.pack("=II", index, self.base(ring))

    def base(self, ring: Ring) -> int:
        if not self.is_packed:
            return ring.next_avail
        return ring.used_wrap << 31 | ring.used_slot << 16 | ring.wrap << 15 | ring.slot

    def stop(self, ring: Ring) -> None:
        ring.started = ring.broken = ring.polls = False
        self.replace(ring, "kick", -1)
        self.replace(ring, "call", -1)

    def set_vring_kick(self, payload: bytes, descriptors: list[int]) -> None:
        ring = self.ring(payload[0])
        self.replace(ring, "kick", *descriptors[:1] or [-1])
        ring.polls = not descriptors
        if not ring.started and self.record is not None and not self.is_packed:
            self.recover(ring, self.record)
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
        if self.is_packed:
            self.work_packed(ring)
            return
        table, _, avail = ring.addresses
        before = ring.next_used
        while ring.resubmit:
            head = ring.resubmit.pop(0)
            self.finish(ring, head, self.perform(*self.chain(table, ring.size, head)))
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
            self.begin_request(ring, head)
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
        slot = ring.next_used % ring.size
        ring.next_used = (ring.next_used + 1) & 0xFFFF
        self.log_used(ring, 4 + 8 * slot, 8)
        self.log_used(ring, 2, 2)
        self.store(used + 2, "<H", ring.next_used)
        self.end_request(ring, head)

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
        elif self.protocol_set & IN_BAND and self.channel is not None:
            self.call_in_band(ring, self.channel)

    def call_in_band(self, ring: Ring, channel: int) -> None:
        os.write(channel, struct.pack("=IIIII", 4, 1 | NEED_REPLY, 8, ring.index, 0))
        os.read(channel, 20)

    def vring_kick(self, payload: bytes, descriptors: list[int]) -> None:
        self.ring(payload[0]).started = True

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

    # --- Packed rings -----------------------------------------------------------------------------------------------

    @property
    def is_packed(self) -> bool:
        return bool(self.agreed & RING_PACKED)

    def set_positions(self, ring: Ring, base: int) -> None:
        ring.slot, ring.wrap = base & 0x7FFF, base >> 15 & 1
        ring.used_slot, ring.used_wrap = base >> 16 & 0x7FFF, base >> 31

    def work_packed(self, ring: Ring) -> None:
        used = 0
        for _ in range(self.per_kick):
            rows = self.packed_rows(ring)
            if not rows:
                break
            readable, writable = self.packed_buffers(rows)
            ring.slot, ring.wrap = self.advance(ring, ring.slot, ring.wrap, self.slots_of(rows))
            written = self.perform(readable, writable)
            self.finish_packed(ring, self.buffer_id(ring, rows), self.slots_of(rows), written)
            used += self.slots_of(rows)
        self.want_kicks_packed(ring)
        if used and self.wants_call_packed(ring, used):
            self.notify(ring)

    def packed_rows(self, ring: Ring) -> list[tuple[int, ...]]:
        """The descriptors of the next chain, if there is one."""
        assert ring.addresses is not None
        slot, wrap = ring.slot, ring.wrap
        rows = list[tuple[int, ...]]()
        for _ in range(ring.size):
            row = self.load(ring.addresses[0] + 16 * slot, "<QIHH")
            if not rows and (bool(row[3] & AVAILABLE) != wrap or bool(row[3] & USED) == wrap):
                return []
            rows.append(row)
            if not row[3] & NEXT:
                return rows
            slot, wrap = self.advance(ring, slot, wrap, 1)
        raise Broken

    def packed_buffers(self, rows: list[tuple[int, ...]]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        address, length, _, flags = rows[0]
        if flags & INDIRECT:
            rows = list(struct.iter_unpack("<QIHH", self.read_guest(address, length)))
        readable = [(address, length) for address, length, _, flags in rows if not flags & WRITE]
        writable = [(address, length) for address, length, _, flags in rows if flags & WRITE]
        return readable, writable

    def slots_of(self, rows: list[tuple[int, ...]]) -> int:
        return len(rows)

    def buffer_id(self, ring: Ring, rows: list[tuple[int, ...]]) -> int:
        return rows[-1][2]

    def advance(self, ring: Ring, slot: int, wrap: int, count: int) -> tuple[int, int]:
        laps, slot = divmod(slot + count, ring.size)
        return slot, wrap ^ laps

    def finish_packed(self, ring: Ring, number: int, slots: int, written: int) -> None:
        assert ring.addresses is not None
        at = ring.addresses[0] + 16 * ring.used_slot
        self.store(at + 8, "<IH", written, number)
        self.log_used(ring, 16 * ring.used_slot, 16)
        self.store(at + 14, "<H", (AVAILABLE | USED) * ring.used_wrap)
        ring.used_slot, ring.used_wrap = self.advance(ring, ring.used_slot, ring.used_wrap, slots)

    def want_kicks_packed(self, ring: Ring) -> None:
        assert ring.addresses is not None
        event = ring.wrap << 15 | ring.slot
        self.store(ring.addresses[1], "<HH", event, 2 if self.agreed & EVENT_IDX else 0)

    def wants_call_packed(self, ring: Ring, used: int) -> bool:
        assert ring.addresses is not None
        event, flags = self.load(ring.addresses[2], "<HH")
        if flags != 2:
            return flags == 0
        offset = event & 0x7FFF
        if event >> 15 != ring.used_wrap:
            offset -= ring.size
        return (ring.used_slot - offset - 1) & 0xFFFF < used

    # --- What is in flight ------------------------------------------------------------------------------------------

    def get_inflight_fd(self, payload: bytes, descriptors: list[int]) -> bytes:
        _, _, queues, queue_size = struct.unpack_from("=QQHH", payload)
        size = queues * stride(queue_size, packed=self.is_packed)
        file = os.memfd_create("record")
        os.write(file, self.new_record(size))
        self.attached = [file]
        return struct.pack("=QQHHI", size, 0, queues, queue_size, 0)

    def new_record(self, size: int) -> bytes:
        return bytes(size)

    def set_inflight_fd(self, payload: bytes, descriptors: list[int]) -> None:
        self.record = Record(payload, descriptors[0])

    def recover(self, ring: Ring, record: Record) -> None:
        version, _, batch, used = record.header(ring)
        if not version:
            record.set_header(ring, 1, ring.size, 0, ring.next_used)
            return
        for _ in range((ring.next_used - used) & 0xFFFF):
            _, following, number = record.entry(ring, batch)
            record.set_entry(ring, batch, 0, following, number)
            batch = following
        marked = [(record.entry(ring, head)[2], head) for head in range(ring.size) if record.entry(ring, head)[0]]
        ring.resubmit = [head for _, head in sorted(marked)]
        ring.next_avail = (ring.next_used + len(marked)) & 0xFFFF

    def begin_request(self, ring: Ring, head: int) -> None:
        self.taken += 1
        if self.record is not None:
            self.record.set_entry(ring, head, 1, 0, self.taken)

    def end_request(self, ring: Ring, head: int) -> None:
        if self.record is not None:
            self.record.set_entry(ring, head, 0, 0, self.taken)
            self.record.set_header(ring, 1, ring.size, head, ring.next_used)

    # --- What is dirty ----------------------------------------------------------------------------------------------

    def set_log_base(self, payload: bytes, descriptors: list[int]) -> bytes:
        self.log = Log(payload, descriptors[0])
        return payload

    def set_log_fd(self, payload: bytes, descriptors: list[int]) -> None:
        self.close_all([self.log_descriptor])
        self.log_descriptor = os.dup(descriptors[0])

    def log_data(self, guest: int, size: int) -> None:
        if self.agreed & LOG_ALL:
            self.mark(guest, size)

    def log_used(self, ring: Ring, at: int, size: int) -> None:
        if ring.log is not None:
            self.mark(ring.log + at, size)

    def mark(self, guest: int, size: int) -> None:
        if self.log is not None:
            self.log.mark(guest, size)
            if self.log_descriptor >= 0:
                os.eventfd_write(self.log_descriptor, 1)

    # --- The device's own state -------------------------------------------------------------------------------------

    def set_device_state_fd(self, payload: bytes, descriptors: list[int]) -> bytes:
        direction, _ = struct.unpack("=II", payload)
        if direction > 1:
            return struct.pack("=Q", 0x101)
        if direction:
            self.loading = os.dup(descriptors[0])
        else:
            os.write(descriptors[0], b"the state of a disk")
        return struct.pack("=Q", 0x100)

    def check_device_state(self, payload: bytes, descriptors: list[int]) -> bytes:
        state = b""
        while self.loading >= 0:
            piece = os.read(self.loading, 4096)
            state += piece
            if not piece:
                os.close(self.loading)
                self.loading = -1
        return struct.pack("=Q", state not in (b"", b"the state of a disk"))

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
