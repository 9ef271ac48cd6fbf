"""The configuration space, as messages carry it."""

from __future__ import annotations

import struct

from .harness import QUIET, Case, Differs, Skipped, check, fail
from .wire import IDS, NEED_REPLY, VERSION, Answer, Closed, Wire, config, u64

_GET = "vhost-user: VHOST_USER_GET_CONFIG"
_SET = "vhost-user: VHOST_USER_SET_CONFIG"


def _read(wire: Wire, size: int, offset: int = 0) -> bytes:
    """Bytes of the space, which have to come."""
    answer = wire.ask("GET_CONFIG", config(offset, bytes(size)))
    if not answer.payload:
        fail(f"GET_CONFIG of {size} bytes at {offset} was refused", "the bytes, which exist")
    return _checked(answer, offset, size)


def _checked(answer: Answer, offset: int, size: int) -> bytes:
    if answer.request != IDS["GET_CONFIG"] or answer.payload[:8] != struct.pack("=II", offset, size):
        fail(f"{answer}", f"GET_CONFIG with offset {offset}, size {size}")
    if len(answer.payload) != 12 + size:
        fail(f"{len(answer.payload)} bytes of payload", f"{12 + size}: a head of 12, and what was asked for")
    return answer.payload[12:]


def _size(case: Case) -> int:
    """How much of the space surely exists."""
    return _SIZES.get(case.device.name, 4)


#: Bytes that the configuration space of a type has at least, in any version.
_SIZES = {
    "blk": 24,
    "net": 8,
    "console": 4,
    "input": 8,
    "vsock": 8,
    "sound": 12,
    "fs": 40,
    "gpio": 8,
    "spi": 32,
    "can": 2,
}


@check("config.read", _GET, needs="CONFIG")
def read(case: Case) -> None:
    """GET_CONFIG answers with the offset and size that were asked for, and as many bytes."""
    _read(case.negotiated(), _size(case))


@check("config.read-early", _GET, needs="CONFIG")
def read_early(case: Case) -> None:
    """GET_CONFIG is answered before SET_FEATURES, when QEMU reads it."""
    wire = case.connect()
    wire.ask("GET_PROTOCOL_FEATURES")
    wire.send("SET_PROTOCOL_FEATURES", u64(1 << 9))
    _read(wire, _size(case))


@check("config.read-part", _GET, needs="CONFIG")
def read_part(case: Case) -> None:
    """What is read at an offset is the same as in the whole."""
    wire = case.negotiated()
    size = _size(case)
    whole = _read(wire, size)
    for offset in range(1, size, max(1, size // 4)):
        part = _read(wire, size - offset, offset)
        if part != whole[offset:]:
            fail(f"at {offset}: {part.hex(' ')}", whole[offset:].hex(" "))


@check("config.read-bytes", _GET, needs="CONFIG")
def read_bytes(case: Case) -> None:
    """Any number of bytes may be read: User-Mode Linux reads one more at a time."""
    wire = case.negotiated()
    size = _size(case)
    whole = _read(wire, size)
    for count in range(1, size):
        part = _read(wire, count)
        if part != whole[:count]:
            fail(f"the first {count} bytes: {part.hex(' ')}", whole[:count].hex(" "))


@check("config.one-answer", _GET, needs="CONFIG REPLY_ACK")
def one_answer(case: Case) -> None:
    """GET_CONFIG with NEED_REPLY has one answer."""
    wire = case.negotiated()
    size = _size(case)
    _checked(wire.ask("GET_CONFIG", config(0, bytes(size)), flags=VERSION | NEED_REPLY), 0, size)
    if not wire.is_quiet(QUIET):
        fail(f"a second answer: {wire.receive()}", "one answer")


@check("config.flags", _GET, needs="CONFIG")
def flags(case: Case) -> None:
    """The flags of GET_CONFIG do not matter: cloud-hypervisor, Firecracker and crosvm set one."""
    wire = case.negotiated()
    size = _size(case)
    answer = wire.ask("GET_CONFIG", config(0, bytes(size), flags=1))
    if not answer.payload:
        raise Differs("refused; the text gives flags to SET_CONFIG only", "the same as without")
    _checked(answer, 0, size)


@check("config.read-past-end", _GET, needs="CONFIG")
def read_past_end(case: Case) -> None:
    """Reading past the end is refused by a payload of no size, or answered in full."""
    wire = case.negotiated()
    answer = wire.ask("GET_CONFIG", config(240, bytes(16)))
    if len(answer.payload) == 12:
        raise Differs("an answer of a head that says size 0; rust-vmm does so; the text wants no payload", "no payload")
    if answer.payload:
        _checked(answer, 240, 16)


@check("config.read-far-past-end", _GET, needs="CONFIG")
def read_far_past_end(case: Case) -> None:
    """An offset of nearly 2^32 is refused, or answered in full, and nothing is read from elsewhere."""
    wire = case.negotiated()
    try:
        answer = wire.ask("GET_CONFIG", config(0xFFFF_FFF0, bytes(16)))
    except Closed:
        raise Differs("the connection ended; the text wants a payload of no size", "no payload") from None
    if len(answer.payload) > 12 and any(_checked(answer, 0xFFFF_FFF0, 16)):
        fail(f"{answer}", "no payload, or zeroes: there is nothing there")


@check("config.size-is-a-lie", _GET, needs="CONFIG")
def size_is_a_lie(case: Case) -> None:
    """A GET_CONFIG that says more bytes than it carries is not answered with that many."""
    wire = case.negotiated()
    try:
        answer = wire.ask("GET_CONFIG", config(0, bytes(4), size=200))
    except Closed:
        return
    if len(answer.payload) > 200:
        raise Differs("the 200 bytes were sent; libvhost-user looks at one of the two sizes only", "no payload")


@check("config.set-past-end", _SET, needs="CONFIG REPLY_ACK")
def set_past_end(case: Case) -> None:
    """Writing far past the end is refused."""
    wire = case.negotiated()
    why = "there is nothing at 0xfffffff0"
    case.should_refuse(wire, why, "what is not there is ignored", "SET_CONFIG", config(0xFFFF_FFF0, bytes(16)))


@check("config.read-only", "Virtio 1.3, 5.2.4: Device configuration layout", needs="CONFIG REPLY_ACK", device="blk")
def read_only(case: Case) -> None:
    """A driver cannot change the capacity of a disk."""
    wire = case.negotiated()
    before = _read(wire, 8)
    case.outcome(wire, "SET_CONFIG", config(0, bytes(8)))
    wire.close()
    wire = case.negotiated()
    after = _read(wire, 8)
    if before != after:
        case.outcome(wire, "SET_CONFIG", config(0, before))
        fail(f"the capacity was {before.hex(' ')} and is {after.hex(' ')}", "the same")


@check("config.write-back", "Virtio 1.3, 5.2.5: Device Initialization", needs="CONFIG REPLY_ACK", device="blk")
def write_back(case: Case) -> None:
    """With CONFIG_WCE, a driver can switch the cache of a disk."""
    if not case.facts.features >> 11 & 1:
        raise Skipped("CONFIG_WCE is not offered")
    wire = case.negotiated()
    # Not at an offset, which is another check's.
    before = _read(wire, 33)[32:]
    try:
        for value in (b"\0", b"\1"):
            case.tell(wire, "SET_CONFIG", config(32, value))
            came = _read(wire, 33)[32:]
            if came != value:
                fail(f"after writing {value[0]} it reads {came[0]}", "what was written")
    finally:
        case.outcome(wire, "SET_CONFIG", config(32, before))


@check("config.disk", "Virtio 1.3, 5.2.4: Device configuration layout", needs="CONFIG", device="blk")
def disk(case: Case) -> None:
    """The fields of a disk make sense: a block size that is a power of two, and queues if MQ is offered."""
    fields = case.device.decode_config(_read(case.negotiated(), 36))
    block = fields["blk_size"]
    if case.facts.features >> 6 & 1 and (block < 512 or block & (block - 1)):
        fail(f"blk_size {block}", "a power of two, at least 512")
    if case.facts.features >> 12 & 1 and not fields["num_queues"]:
        fail("num_queues 0, though MQ is offered", "at least 1")
