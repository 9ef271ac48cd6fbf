"""What a guest or a front-end does that is broken, hostile, or gone: the back-end lives, and serves the next one."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

from .harness import QUIET, Case, Differs, TargetError, check, fail
from .wire import (
    HEADER,
    IDS,
    INDIRECT,
    NEXT,
    VERSION,
    WRITE,
    Closed,
    Feature,
    Memory,
    Silent,
    SplitRing,
    Wire,
    wait_until,
)

_TABLE = "Virtio 1.3, 2.7.5: The Virtqueue Descriptor Table"
_INDIRECT = "Virtio 1.3, 2.7.5.3: Indirect Descriptors"
_STATES = "vhost-user: Ring states"
_COMMUNICATION = "vhost-user: Communication"


# --- Connections ------------------------------------------------------------------------------------------------------


@check("robustness.cut-in-a-header", _COMMUNICATION)
def cut_in_a_header(case: Case) -> None:
    """A connection that ends in the middle of a header is forgotten."""
    wire = case.connect()
    wire.send_bytes(HEADER.pack(IDS["GET_FEATURES"], 1, 0)[:7])
    wire.close()


@check("robustness.cut-in-a-payload", _COMMUNICATION)
def cut_in_a_payload(case: Case) -> None:
    """A connection that ends in the middle of a payload is forgotten."""
    wire = case.connect()
    wire.send_bytes(HEADER.pack(IDS["SET_FEATURES"], VERSION, 8) + bytes(3))
    wire.close()


@check("robustness.gone-before-the-answer", _COMMUNICATION)
def gone_before_the_answer(case: Case) -> None:
    """A front-end that does not wait for its answer is forgotten."""
    wire = case.connect()
    wire.send("GET_FEATURES")
    wire.close()


@check("robustness.does-not-read", _COMMUNICATION)
def does_not_read(case: Case) -> None:
    """A front-end that asks thousands of times and reads no answer does not stop the back-end for ever."""
    wire = case.connect()
    wire.socket.setblocking(False)
    message = HEADER.pack(IDS["GET_FEATURES"], 1, 0)
    for _ in range(4000):
        try:
            wire.socket.send(message)
        except OSError:
            break
    wire.close()


@check("robustness.next-connection", _COMMUNICATION)
def next_connection(case: Case) -> None:
    """A second front-end is refused, waits for the end of the first, or is served; the first goes on."""
    first = case.connect()
    first.ask("GET_FEATURES")
    try:
        second = case.connect()
    except TargetError:
        return
    if first.ask("GET_FEATURES").u64 != case.facts.features:
        fail("the first connection suffers", "the same answer as before")
    first.close()
    try:
        second.ask("GET_FEATURES")
    except Closed:
        return
    except Silent:
        fail("the second front-end waits although the first is gone", "an answer, or the end of the connection")


@check("robustness.gone-while-running", _STATES, needs="request")
def gone_while_running(case: Case) -> None:
    """A front-end that ends while its ring runs leaves nothing behind: the next one starts from nothing."""
    wire, ring = case.running()
    case.perform(ring)
    wire.close()
    _, ring = case.running()
    case.perform(ring)


@check("robustness.twenty-times", _COMMUNICATION, needs="request")
def twenty_times(case: Case) -> None:
    """Twenty front-ends are served one after the other."""
    for _ in range(20):
        wire, ring = case.running()
        case.perform(ring)
        wire.close()


@check("robustness.descriptors-are-closed", "vhost-user: Message types, ancillary data", needs="REPLY_ACK")
def descriptors_are_closed(case: Case) -> None:
    """The descriptors of a connection are closed when it ends."""
    wire = case.negotiated()
    payload = struct.pack("=Q", case.exercise.queue)
    if not case.is_closed(wire, lambda error: case.tell(wire, "SET_VRING_ERR", payload, error)):
        raise Differs("the descriptor of SET_VRING_ERR is still open after the connection has ended", "closed")


# --- Rings ------------------------------------------------------------------------------------------------------------

Damage = Callable[[Case, SplitRing], object]


def _damaged(case: Case, damage: Damage, *extra: Feature, kick: bool = True) -> tuple[Wire, SplitRing]:
    """A ring that works, is damaged, and kicked. The back-end may give up the ring, or the connection."""
    wire, ring = case.running(*extra)
    case.perform(ring)
    damage(case, ring)
    if kick:
        ring.kick.signal()
    wait_until(lambda: ring.used_index != ring.seen, QUIET)
    case.alive(wire)
    return wire, ring


def _not_completed(case: Case, damage: Damage, why: str, *extra: Feature) -> None:
    """Nothing that a driver could take for an answer comes of it."""
    _, ring = _damaged(case, damage, *extra)
    entries = ring.take()
    for head, _ in entries:
        if head >= ring.size:
            fail(f"a used entry of descriptor {head}, of {ring.size}", "none")
    if entries:
        raise Differs(
            f"completed with {entries} (head, length), though {why}; the text leaves open what becomes of it", "nothing"
        )


@check("robustness.descriptor-loop", _TABLE, needs="request")
def descriptor_loop(case: Case) -> None:
    """A chain that never ends is given up."""

    def damage(_case: Case, ring: SplitRing) -> None:
        address = ring.memory.allocate(64)
        ring.set_descriptor(0, address, 16, NEXT, 1)
        ring.set_descriptor(1, address, 16, NEXT, 0)
        ring.offer(0)

    _not_completed(case, damage, "it never ends")


@check("robustness.head-out-of-range", "Virtio 1.3, 2.7.6: The Virtqueue Available Ring", needs="request")
def head_out_of_range(case: Case) -> None:
    """A head beyond the descriptor table is not followed."""
    _not_completed(case, lambda _, ring: ring.offer(ring.size + 100), "there is no such descriptor")


@check("robustness.next-out-of-range", _TABLE, needs="request")
def next_out_of_range(case: Case) -> None:
    """A descriptor whose successor is beyond the table is not followed there."""

    def damage(_case: Case, ring: SplitRing) -> None:
        ring.set_descriptor(0, ring.memory.allocate(64), 16, NEXT, ring.size + 100)
        ring.offer(0)

    _not_completed(case, damage, "its next descriptor does not exist")


@check("robustness.index-jumps", "Virtio 1.3, 2.7.6: The Virtqueue Available Ring", needs="request")
def index_jumps(case: Case) -> None:
    """An available index that is further than the ring is large is not believed."""

    def damage(_case: Case, ring: SplitRing) -> None:
        ring.avail_index += 1000

    _, ring = _damaged(case, damage)
    count = (ring.used_index - ring.seen) & 0xFFFF
    if count > ring.size:
        raise Differs(f"{count} requests were completed, of a ring of {ring.size}", "none: there cannot be so many")


def _buffer(case: Case, address: int, size: int = 4096) -> Damage:
    """A request whose largest buffer is somewhere else."""

    def damage(_case: Case, ring: SplitRing) -> None:
        pieces = [(ring.memory.allocate(len(data)), data) for data in case.exercise.readable]
        for at, data in pieces:
            ring.memory.write(at, data)
        room = [(ring.memory.allocate(length), length, WRITE) for length in case.exercise.writable]
        chain = [(at, len(data), 0) for at, data in pieces] + room
        chain[-1 if len(room) < 2 else -2] = (address, size, chain[-1][2])
        ring.add_pieces(chain)

    return damage


@check("robustness.buffer-nowhere", "vhost-user: Memory access", needs="request")
def buffer_nowhere(case: Case) -> None:
    """A buffer outside of guest memory is not touched, and nothing else suffers."""
    _damaged(case, _buffer(case, 0xDEAD_0000_0000))


@check("robustness.buffer-over-the-end", "vhost-user: Memory access", needs="request")
def buffer_over_the_end(case: Case) -> None:
    """A buffer that begins in guest memory and ends outside of it is not touched beyond the end."""
    memory = Memory()
    end = memory.guest + memory.size
    memory.close()
    _damaged(case, _buffer(case, end - 512))


@check("robustness.buffer-wraps", "vhost-user: Memory access", needs="request")
def buffer_wraps(case: Case) -> None:
    """A buffer whose end is beyond the last address is not touched."""
    _damaged(case, _buffer(case, (1 << 64) - 512, 1024))


@check("robustness.buffer-of-4-gigabytes", "vhost-user: Memory access", needs="request")
def buffer_of_4_gigabytes(case: Case) -> None:
    """A buffer of 4 GiB in a quarter of a megabyte is not touched beyond the end."""
    _damaged(case, _buffer(case, 0x4000_0000, 0xFFFF_FFFF))


@check("robustness.readable-after-writable", "Virtio 1.3, 2.7.4.2: Message Framing", needs="request")
def readable_after_writable(case: Case) -> None:
    """A readable descriptor after a writable one does no harm."""

    def damage(_case: Case, ring: SplitRing) -> None:
        address = ring.memory.allocate(64)
        ring.add_pieces([(address, 16, WRITE), (address + 16, 16, 0)])

    _damaged(case, damage)


@check("robustness.no-bytes", _TABLE, needs="request")
def no_bytes(case: Case) -> None:
    """A request of no bytes does no harm."""
    _damaged(case, lambda _, ring: ring.add_pieces([(ring.memory.allocate(16), 0, 0)]))


@check("robustness.too-little-room", "Virtio 1.3, 2.7.4.2: Message Framing", needs="request")
def too_little_room(case: Case) -> None:
    """A request of one byte, with one byte of room, does no harm."""
    _damaged(case, lambda _, ring: ring.add([b"\0"], [1]))


@check("robustness.indirect-in-indirect", _INDIRECT, needs="request INDIRECT_DESC")
def indirect_in_indirect(case: Case) -> None:
    """A table of descriptors in another is not followed."""

    def damage(_case: Case, ring: SplitRing) -> None:
        inner = ring.memory.allocate(64)
        ring.memory.write(inner, struct.pack("<QIHH", ring.memory.allocate(64), 64, WRITE, 0))
        ring.add_pieces([(inner, 16, INDIRECT)], indirect=True)

    _damaged(case, damage, Feature.INDIRECT_DESC)


@check("robustness.indirect-of-odd-size", _INDIRECT, needs="request INDIRECT_DESC")
def indirect_of_odd_size(case: Case) -> None:
    """A table whose size is not a multiple of 16 does no harm."""
    _damaged(case, lambda _, ring: ring.add_pieces([(ring.memory.allocate(64), 23, INDIRECT)]), Feature.INDIRECT_DESC)


@check("robustness.indirect-nowhere", _INDIRECT, needs="request INDIRECT_DESC")
def indirect_nowhere(case: Case) -> None:
    """A table outside of guest memory is not read."""
    _damaged(case, lambda _, ring: ring.add_pieces([(0xDEAD_0000_0000, 64, INDIRECT)]), Feature.INDIRECT_DESC)


@check("robustness.indirect-loop", _INDIRECT, needs="request INDIRECT_DESC")
def indirect_loop(case: Case) -> None:
    """A chain in a table that never ends is given up."""

    def damage(_case: Case, ring: SplitRing) -> None:
        address, table = ring.memory.allocate(64), ring.memory.allocate(32)
        rows = struct.pack("<QIHH", address, 16, NEXT, 1) + struct.pack("<QIHH", address, 16, NEXT, 0)
        ring.memory.write(table, rows)
        ring.add_pieces([(table, 32, INDIRECT)])

    _not_completed(case, damage, "it never ends", Feature.INDIRECT_DESC)


@check("robustness.after-a-broken-ring", _STATES, needs="request")
def after_a_broken_ring(case: Case) -> None:
    """After nonsense in a ring, the next front-end finds a device that works."""
    wire, _ = _damaged(case, lambda _, ring: ring.offer(ring.size + 100))
    wire.close()
    _, ring = case.running()
    case.perform(ring)


@check("robustness.memory-taken-away", "vhost-user: VHOST_USER_SET_MEM_TABLE", needs="request REPLY_ACK")
def memory_taken_away(case: Case) -> None:
    """A table without the memory of a ring that runs is refused, or stops the ring."""
    wire, ring = case.running()
    case.perform(ring)
    other = case.memory(guest=0x9000_0000, user=0x7000_0000)
    table = struct.pack("=II", 1, 0) + other.region()
    if case.outcome(wire, "SET_MEM_TABLE", table, [other.descriptor]) != "closed":
        ring.kick.signal()
        wait_until(lambda: False, QUIET / 2)
        case.alive(wire)


@check("robustness.file-truncated", "vhost-user: Memory access", needs="request", may_kill=True)
def file_truncated(case: Case) -> None:
    """The file behind guest memory is cut off while the ring runs: the back-end lives."""
    wire, ring = case.running()
    case.perform(ring)
    ring.add(case.exercise.readable, case.exercise.writable)
    os.truncate(ring.memory.descriptor, 0)
    ring.kick.signal()
    wait_until(lambda: False, QUIET)
    try:
        wire.ask("GET_FEATURES")
    except Closed:
        dead = case.died()
        if dead:
            raise Differs(f"{dead}; libvhost-user and rust-vmm are killed, too", "the end of the session") from None
