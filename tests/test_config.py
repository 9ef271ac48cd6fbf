"""The configuration space: how it is declared, what a driver reads and writes, and how it is told of changes.

Virtio 1.3, section 2.5; vhost-user specification, "VHOST_USER_GET_CONFIG".
"""

from __future__ import annotations

import struct
import threading

import pytest

import vhost_user as vu
from raw import BACKEND_REQ, CONFIG, CONFIG_CHANGE, REPLY_ACK, REQUEST, FrontEnd, Id, Memory, Ring, config
from specimens import NO_TYPE, Connect, Serve


class Dial(vu.Device, device_id=NO_TYPE):
    requestq = vu.Queue()
    scale = vu.config.u32(0x01020304)
    position = vu.config.u32(7, writable=True)
    label = vu.config.raw(4, b"ab", writable=True)

    @requestq.handler
    def nothing(self, request: vu.Request) -> None:
        pass


@pytest.fixture
def dial() -> Dial:
    return Dial()


@pytest.fixture
def knob(serve: Serve, connect: Connect, dial: Dial) -> FrontEnd:
    """Connected to a dial."""
    front = connect(serve(dial))
    front.negotiate(protocol=REPLY_ACK | CONFIG | BACKEND_REQ)
    return front


def test_configuration_is_read_in_little_endian_from_any_offset(knob: FrontEnd) -> None:
    assert knob.get_config(0, 12) == b"\x04\x03\x02\x01\x07\x00\x00\x00ab\x00\x00"
    assert knob.get_config(3, 3) == b"\x01\x07\x00"


@pytest.mark.parametrize(("offset", "size"), [(0, 256), (10, 8), (12, 4), (4000, 84), (0, 4084), (0, 0)])
def test_what_is_beyond_the_end_of_the_configuration_reads_as_zeroes(knob: FrontEnd, offset: int, size: int) -> None:
    space = b"\x04\x03\x02\x01\x07\x00\x00\x00ab\x00\x00".ljust(8192, b"\0")
    assert knob.get_config(offset, size) == space[offset : offset + size]


def test_flags_of_a_configuration_read_are_echoed_and_ignored(knob: FrontEnd) -> None:
    assert knob.get(Id.GET_CONFIG, config(4, bytes(4), flags=1)) == config(4, b"\x07\x00\x00\x00", flags=1)


@pytest.mark.parametrize("flags", [0, 1])
def test_a_driver_writes_parts_of_a_field(knob: FrontEnd, dial: Dial, flags: int) -> None:
    knob.tell(Id.SET_CONFIG, config(5, b"\x01\x02", flags=flags))
    assert dial.position == 0x020107
    assert knob.get_config(4, 4) == b"\x07\x01\x02\x00"


def test_a_write_over_several_fields_leaves_read_only_ones_alone(knob: FrontEnd, dial: Dial) -> None:
    # QEMU writes the whole space back.
    knob.tell(Id.SET_CONFIG, config(0, b"\xff\xff\xff\xff\x05\x00\x00\x00new!"))
    assert (dial.scale, dial.position, dial.label) == (0x01020304, 5, b"new!")
    assert knob.get_config(0, 12) == b"\x04\x03\x02\x01\x05\x00\x00\x00new!"


def test_a_write_beyond_the_end_of_the_configuration_is_refused_and_changes_nothing(knob: FrontEnd, dial: Dial) -> None:
    assert knob.set_config(8, b"12345") != 0
    assert knob.set_config(12, b"1") != 0
    assert knob.set_config(0xFFFF_FFFF, b"1") != 0
    assert dial.label == b"ab\0\0"


def test_a_change_is_announced_on_the_back_end_channel(knob: FrontEnd, dial: Dial, memory: Memory) -> None:
    knob.share(memory)
    channel = knob.open_backend_channel()
    knob.start(Ring(memory))
    dial.scale = 9
    message = channel.receive()
    assert (message.request, message.flags, message.payload) == (CONFIG_CHANGE, REQUEST, b"")
    assert knob.get_config(0, 4) == b"\x09\x00\x00\x00"
    with dial.config_update():
        dial.scale = 10
        dial.position = 11
    channel.receive()
    assert channel.is_silent()


def test_a_driver_s_own_write_is_not_announced_to_it(knob: FrontEnd, memory: Memory) -> None:
    knob.share(memory)
    channel = knob.open_backend_channel()
    knob.start(Ring(memory))
    assert knob.set_config(4, b"\x01") == 0
    assert channel.is_silent()


def test_a_change_is_announced_only_when_a_ring_runs(knob: FrontEnd, dial: Dial, memory: Memory) -> None:
    knob.share(memory)
    channel = knob.open_backend_channel()
    dial.scale = 9
    dial.scale = 10
    assert channel.is_silent()
    ring = Ring(memory)
    knob.start(ring)
    assert channel.receive().request == CONFIG_CHANGE
    assert channel.is_silent()
    knob.stop(ring)
    dial.scale = 11
    assert channel.is_silent()


def test_a_channel_that_nobody_reads_does_not_stop_the_device(knob: FrontEnd, dial: Dial, memory: Memory) -> None:
    knob.share(memory)
    channel = knob.open_backend_channel()
    ring = Ring(memory)
    knob.start(ring)
    for number in range(20_000):
        dial.scale = number
    assert knob.get_config(0, 4) == struct.pack("<I", 19_999)
    channel.close()
    dial.scale = 1
    knob.exchange(ring, b"x", 8)


# --- Declarations -----------------------------------------------------------------------------------------------------


def test_fields_follow_each_other_without_gaps_unless_they_are_placed(serve: Serve, connect: Connect) -> None:
    class Spread(Dial, device_id=NO_TYPE):
        mode = vu.config.u8(0xAA)
        wide = vu.config.u64(0x0102030405060708)
        placed = vu.config.u16(0xBBCC, offset=24)
        after = vu.config.u8(0xDD)

    expected = b"\x04\x03\x02\x01\x07\x00\x00\x00ab\x00\x00\xaa\x08\x07\x06\x05\x04\x03\x02\x01\x00\x00\x00\xcc\xbb\xdd"
    assert connect(serve(Spread())).get_config(0, 27) == expected


def test_fields_that_overlap_are_refused() -> None:
    with pytest.raises(vu.DeclarationError, match=r"Wrong\.second: byte 3 of the space belongs to first already"):

        class Wrong(vu.Device, device_id=NO_TYPE):
            first = vu.config.u32()
            second = vu.config.u16(offset=3)


def test_a_space_that_no_message_can_carry_is_refused() -> None:
    class Full(vu.Device, device_id=NO_TYPE):
        bulk = vu.config.raw(4084)

    with pytest.raises(vu.DeclarationError, match="Wrong: a configuration space has at most 4084 bytes, not 4085"):

        class Wrong(vu.Device, device_id=NO_TYPE):
            bulk = vu.config.raw(4085)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("scale", -1, "scale: -1 does not fit in 4 bytes"),
        ("scale", 1 << 32, "scale: 4294967296 does not fit in 4 bytes"),
        ("scale", "1", "scale: '1' does not fit in 4 bytes"),
        ("label", b"12345", r"label: b'12345' does not fit in 4 bytes \(5 bytes\)"),
        ("label", "text", "label: 'text' does not fit in 4 bytes"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_and_changes_nothing(field: str, value: object, match: str) -> None:
    dial = Dial()
    with pytest.raises(ValueError, match=match):
        setattr(dial, field, value)
    assert (dial.scale, dial.label) == (0x01020304, b"ab\0\0")


def test_instances_have_a_space_of_their_own_before_they_are_served(serve: Serve, connect: Connect) -> None:
    one, other = Dial(), Dial()
    one.scale, other.scale = 1, 2
    assert (one.scale, other.scale) == (1, 2)
    assert connect(serve(one)).get_config(0, 4) == b"\x01\0\0\0"
    assert connect(serve(other)).get_config(0, 4) == b"\x02\0\0\0"


def test_the_hook_of_a_field_gets_the_old_and_the_new_value(serve: Serve, connect: Connect) -> None:
    writes: list[tuple[object, ...]] = []

    class Watched(Dial, device_id=NO_TYPE):
        @Dial.position.on_write
        def moved(self, old: int, new: int) -> None:
            writes.append(("position", old, new, self.position))

        @Dial.label.on_write
        def renamed(self, old: bytes, new: bytes) -> None:
            writes.append(("label", old, new))

    front = connect(serve(Watched()))
    front.tell(Id.SET_CONFIG, config(6, b"\x01"))
    front.tell(Id.SET_CONFIG, config(4, b"\x02\0\0\0xyz"))
    assert writes == [
        ("position", 7, 0x010007, 0x010007),
        ("position", 0x010007, 2, 2),
        ("label", b"ab\0\0", b"xyz\0"),
    ]


def test_one_hook_may_be_told_of_several_fields(serve: Serve, connect: Connect) -> None:
    writes: list[object] = []

    class Watched(Dial, device_id=NO_TYPE):
        @Dial.position.on_write
        @Dial.label.on_write
        def changed(self, old: object, new: object) -> None:
            writes.append(new)

    front = connect(serve(Watched()))
    front.tell(Id.SET_CONFIG, config(4, b"\x02\0\0\0xyz"))
    assert writes == [2, b"xyz\0"]


def test_a_driver_is_told_of_what_a_hook_assigns(serve: Serve, connect: Connect, memory: Memory) -> None:
    class Clamped(Dial, device_id=NO_TYPE):
        @Dial.position.on_write
        def moved(self, old: int, new: int) -> None:
            if new > 100:
                self.position = 100

    front = connect(serve(Clamped()))
    front.negotiate(protocol=REPLY_ACK | CONFIG | BACKEND_REQ)
    front.share(memory)
    channel = front.open_backend_channel()
    front.start(Ring(memory))
    assert front.set_config(4, b"\x63\0\0\0") == 0
    assert channel.is_silent()
    assert front.set_config(4, b"\xff\xff\0\0") == 0
    assert channel.receive().request == CONFIG_CHANGE
    assert front.get_config(4, 4) == b"\x64\0\0\0"


def test_a_write_that_a_hook_refuses_changes_nothing(serve: Serve, connect: Connect) -> None:
    class Strict(Dial, device_id=NO_TYPE):
        @Dial.position.on_write
        def moved(self, old: int, new: int) -> None:
            if new > 100:
                raise ValueError(f"{new} is too far")

    device = Strict()
    front = connect(serve(device))
    assert front.set_config(4, b"\x65\0\0\0") != 0
    assert front.get_config(4, 4) == b"\x07\0\0\0"
    assert device.position == 7


def test_values_are_kept_from_one_front_end_to_the_next(serve: Serve, dial: Dial) -> None:
    path = serve(dial)
    with FrontEnd(path) as front:
        front.set_config(4, b"\x2a\0\0\0")
    with FrontEnd(path) as front:
        assert front.get_config(4, 4) == b"\x2a\0\0\0"
    assert dial.position == 42


def test_assignments_from_many_threads_leave_the_space_whole(knob: FrontEnd, dial: Dial) -> None:
    def assign(value: int) -> None:
        for _ in range(200):
            dial.scale = value * 0x01010101

    threads = [threading.Thread(target=assign, args=[value]) for value in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert len(set(knob.get_config(0, 4))) in (1, 4)
    for thread in threads:
        thread.join()
    assert knob.get_config(0, 4) == struct.pack("<I", dial.scale)
