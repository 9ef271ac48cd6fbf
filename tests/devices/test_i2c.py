"""Register maps in Python, and the adapter with its targets in a real guest."""

from __future__ import annotations

import struct
import time

import pytest

import raw
import vhost_user as vu
from devices.running import Boot, Program, wait_for
from specimens import Connect, Serve
from vhost_user.devices import Tmp102, i2c
from vhost_user.guest import Guest, Uml

NEW = "echo {0} {1:#x} > /sys/bus/i2c/devices/i2c-0/new_device"
CELSIUS = "cat /sys/class/hwmon/hwmon0/temp1_input"


class Chip(i2c.Target, address=0x20):
    """A bit of everything."""

    status = i2c.Register(0x00, read_only=True, reset=0x5A)
    control = i2c.Register(0x01, reset=0x0F)
    level = i2c.Register(0x02, width=2, reset=0x1234)
    swapped = i2c.Register(0x03, width=2, reset=0x1234, byteorder="little")
    counter = i2c.Register(0x10, width=3)

    reads = 0

    @counter.on_read
    def _count(self) -> int:
        self.reads += 1
        return self.reads

    @control.on_write
    def _control(self, old: int, new: int) -> None:
        self.heard = (old, new)


class Memory(i2c.Target, address=0x50):
    """A memory with two bytes of address, and a diary of what happened on the bus."""

    def __init__(self) -> None:
        self.content = bytearray(1 << 16)
        self.position = 0
        self.diary: list[str] = []

    def write(self, data: bytes) -> None:
        self.diary.append(f"write {data.hex()}")
        if data == b"\xff":
            raise i2c.Nack("not this byte")
        if data == b"\xee":
            raise ZeroDivisionError("a bug")
        if len(data) > 1:
            self.position = int.from_bytes(data[:2], "big")
            self.content[self.position : self.position + len(data) - 2] = data[2:]

    def read(self, count: int) -> bytes:
        self.diary.append(f"read {count}")
        return bytes(self.content[self.position : self.position + count])

    def stop(self) -> None:
        self.diary.append("stop")


# --- Register maps, without a bus ------------------------------------------------------------------------------------


def test_a_register_is_an_attribute() -> None:
    chip, other = Chip(), Chip()
    chip.level = 0xBEEF
    assert (chip.level, other.level, Chip.level.address) == (0xBEEF, 0x1234, 0x02)


def test_a_register_is_chosen_and_read() -> None:
    chip = Chip()
    chip.write(b"\x02")
    assert chip.read(2) == b"\x12\x34"


def test_a_register_of_the_other_byte_order_is_read_the_other_way_round() -> None:
    chip = Chip()
    chip.write(b"\x03")
    assert chip.read(2) == b"\x34\x12"


def test_a_register_is_written() -> None:
    chip = Chip()
    chip.write(b"\x02\xab\xcd")
    assert chip.level == 0xABCD


def test_writing_tells_the_old_and_the_new_value() -> None:
    chip = Chip()
    chip.write(b"\x01\xf0")
    assert chip.heard == (0x0F, 0xF0)


def test_reading_and_writing_go_on_with_the_next_register() -> None:
    chip = Chip()
    chip.write(b"\x01\xf0\xab\xcd")
    assert (chip.control, chip.level) == (0xF0, 0xABCD)
    chip.write(b"\x00")
    assert chip.read(4) == b"\x5a\xf0\xab\xcd"
    assert chip.read(2) == b"\x34\x12"


def test_without_increment_the_register_stays() -> None:
    sensor = Tmp102()
    sensor.write(b"\x02")
    assert sensor.read(4) == b"\x4b\x00\x4b\x00"


def test_a_computed_register_is_computed_at_every_read() -> None:
    chip = Chip()
    chip.write(b"\x10")
    assert chip.read(3) == b"\0\0\1"
    assert chip.counter == 2


def test_nothing_is_beyond_the_last_register() -> None:
    chip = Chip()
    chip.write(b"\x10")
    assert chip.read(5) == b"\0\0\1\xff\xff"


def test_an_empty_write_changes_nothing() -> None:
    chip = Chip()
    chip.write(b"\x02")
    chip.write(b"")
    assert chip.read(2) == b"\x12\x34"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x04", "there is no register 0x04"),
        (b"\x00\x01", "status is read-only"),
        (b"\x02\x01", "level has 2 bytes, not 1"),
        (b"\x03\x01\x02\x03", "there is no register 0x04"),
    ],
)
def test_a_wrong_write_is_not_acknowledged(data: bytes, why: str) -> None:
    with pytest.raises(i2c.Nack, match=why):
        Chip().write(data)


def test_a_value_that_does_not_fit_is_refused() -> None:
    chip = Chip()
    with pytest.raises(ValueError, match="control: 0x100 does not fit in 8 bits"):
        chip.control = 0x100
    with pytest.raises(ValueError, match="control: -0x81 does not fit in 8 bits"):
        chip.control = -0x81
    chip.control = -1
    assert chip.control == 0xFF


def test_a_subclass_may_compute_a_register_of_its_base() -> None:
    class Louder(Chip):
        @Chip.level.on_read
        def _level(self) -> int:
            return 0xFFFF

    assert (Louder().level, Chip().level) == (0xFFFF, 0x1234)


def test_a_class_with_two_registers_at_an_address_is_refused() -> None:
    with pytest.raises(vu.DeclarationError, match="second and first are both at 0x07"):

        class _Twice(i2c.Target):
            first = i2c.Register(0x07)
            second = i2c.Register(0x07)


@pytest.mark.parametrize("address", [-1, 0x80])
def test_an_address_has_7_bits(address: int) -> None:
    with pytest.raises(vu.DeclarationError, match="an address has 7 bits"):
        type("Wrong", (i2c.Target,), {}, address=address)
    target = Chip()
    target.address = address
    with pytest.raises(vu.DeclarationError, match="an address has 7 bits"):
        i2c.Adapter(target)


def test_two_targets_cannot_have_the_same_address() -> None:
    with pytest.raises(ValueError, match="0x20 is the address of"):
        i2c.Adapter(Chip(), Chip())


@pytest.mark.parametrize(
    ("celsius", "normal", "extended"),
    [
        (25, 0x1900, 0x0C81),
        (-25, 0xE700, 0xF381),
        (0.25, 0x0040, 0x0021),
        (127.9375, 0x7FF0, 0x3FF9),
        (150, 0x7FF0, 0x4B01),
        (-55, 0xC900, 0xE481),
    ],
)
def test_tmp102_measures_as_its_data_sheet_says(celsius: float, normal: int, extended: int) -> None:
    sensor = Tmp102()
    sensor.celsius = celsius
    assert sensor.temperature == normal
    sensor.configuration |= Tmp102.EXTENDED_MODE
    assert sensor.temperature == extended


def test_tmp102_keeps_the_bits_that_are_constant() -> None:
    sensor = Tmp102()
    sensor.write(b"\x01\x00\x00")
    assert sensor.configuration == 0x6020
    sensor.write(b"\x01\xff\xff")
    assert sensor.configuration == 0xFFFF


# --- Message by message -----------------------------------------------------------------------------------------------


class Bus:
    """A driver that sends what it is told to a chip and a memory."""

    def __init__(self, front: raw.FrontEnd, memory: raw.Memory) -> None:
        self.front = front
        self.ring = raw.Ring(memory)
        front.negotiate()
        front.share(memory)
        front.start(self.ring)

    def ask(self, address: int, flags: int, data: bytes = b"", room: int = 0) -> bytes:
        return self.front.exchange(self.ring, struct.pack("<HHI", address, 0, flags) + data, room + 1)

    def restart(self) -> None:
        self.front.stop(self.ring)
        self.ring.clear()
        self.front.start(self.ring)


@pytest.fixture
def bus(serve: Serve, connect: Connect, memory: raw.Memory) -> Bus:
    return Bus(connect(serve(i2c.Adapter(Chip(), Memory()))), memory)


def test_a_message_either_reads_or_writes(bus: Bus) -> None:
    assert bus.ask(0x40, i2c.M_RD, b"data", 1)[-1:] == i2c.ERR
    assert bus.ask(0x40, 0, b"\x00", 1)[-1:] == i2c.ERR
    assert bus.ask(0x40, 0, b"\x00") == i2c.OK
    assert bus.ask(0x40, i2c.M_RD, room=1) == b"\x5a" + i2c.OK


def test_an_address_that_is_not_7_bits_is_nobodys(bus: Bus) -> None:
    assert [bus.ask(address, 0) for address in (0x40, 0x41, 0x140, 0x8040)] == [i2c.OK, i2c.ERR, i2c.ERR, i2c.ERR]


def test_a_transfer_that_was_left_open_does_not_fail_the_next_drivers(bus: Bus) -> None:
    assert bus.ask(0x22, i2c.FAIL_NEXT) == i2c.ERR
    assert bus.ask(0x40, i2c.FAIL_NEXT) == i2c.ERR
    bus.restart()
    assert bus.ask(0x40, 0) == i2c.OK


# --- In a guest ------------------------------------------------------------------------------------------------------


def test_hwmon_follows_an_assignment(boot: Boot) -> None:
    sensor = Tmp102()
    guest = boot(i2c.Adapter(sensor))
    guest.run(NEW.format("tmp102", sensor.address) + "; sleep 0.1")
    assert guest.run("cat /sys/class/hwmon/hwmon0/name").text == "tmp102"
    for celsius, seen in ((25.0, "25000"), (-10.5, "-10500"), (140.25, "140250"), (0.0625, "62")):
        sensor.celsius = celsius
        assert guest.run(CELSIUS).text == seen


def test_hwmon_sets_the_limits(boot: Boot) -> None:
    sensor = Tmp102()
    guest = boot(i2c.Adapter(sensor))
    guest.run(NEW.format("tmp102", sensor.address))
    assert sensor.configuration & Tmp102.EXTENDED_MODE
    assert guest.run("cd /sys/class/hwmon/hwmon0; echo 60000 > temp1_max; cat temp1_max").text == "60000"
    assert sensor.high_limit == 60 * 128
    # The driver restores on its way out what it found.
    guest.run("echo 0-0048 > /sys/bus/i2c/drivers/tmp102/unbind")
    assert sensor.configuration == Tmp102.configuration.reset


def test_the_lm75_driver_takes_the_same_sensor(boot: Boot) -> None:
    """It leaves the sensor in its normal mode."""
    sensor = Tmp102()
    sensor.celsius = -3.5
    guest = boot(i2c.Adapter(sensor))
    guest.run(NEW.format("tmp112", sensor.address))
    assert guest.run("readlink /sys/class/hwmon/hwmon0/device/driver").text.endswith("/lm75")
    assert guest.run(CELSIUS).text == "-3500"


def test_many_targets_share_the_bus(boot: Boot) -> None:
    sensors = [Tmp102() for _ in range(0x48, 0x4C)]
    for number, sensor in enumerate(sensors):
        sensor.address = 0x48 + number
        sensor.celsius = 10.0 * number
    guest = boot(i2c.Adapter(*sensors))
    for sensor in sensors:
        guest.run(NEW.format("tmp102", sensor.address))
    seen = guest.run("sleep 0.1; cat /sys/bus/i2c/devices/0-004[89ab]/hwmon/*/temp1_input").text
    assert seen.split() == ["0", "10000", "20000", "30000"]


def test_i2cdetect_finds_the_targets(boot: Boot) -> None:
    adapter = i2c.Adapter(Chip(), Tmp102())
    guest = boot(adapter)
    # By writes of no bytes, and by reads of one.
    for method in ("-q", "-r"):
        assert detected(guest, method) == [0x20, 0x48]
    adapter.detach(adapter._targets[0x20])
    adapter.attach(Memory())
    assert detected(guest, "-q") == [0x48, 0x50]


def detected(guest: Guest, method: str) -> list[int]:
    table = guest.run(f"i2cdetect -y {method} 0").text.splitlines()[1:]
    cells = [cell for row in table for cell in row.partition(":")[2].split()]
    return [int(cell, 16) for cell in cells if cell != "--"]


def test_smbus_tools_see_words_the_other_way_round(boot: Boot) -> None:
    chip = Chip()
    guest = boot(i2c.Adapter(chip))
    assert guest.run("i2cget -y 0 0x20 0x00").text == "0x5a"
    assert guest.run("i2cget -y 0 0x20 0x02 w").text == "0x3412"
    assert guest.run("i2cget -y 0 0x20 0x03 w").text == "0x1234"
    guest.run("i2cset -y 0 0x20 0x02 0xcdab w")
    assert chip.level == 0xABCD


def test_a_combined_transfer_is_one_transfer(boot: Boot) -> None:
    memory = Memory()
    guest = boot(i2c.Adapter(memory))
    guest.run("i2ctransfer -y 0 w6@0x50 0x12 0x34 1 2 3 4")
    assert guest.run("i2ctransfer -y 0 w2@0x50 0x12 0x35 r3").text == "0x02 0x03 0x04"
    assert memory.diary == ["write 123401020304", "stop", "write 1235", "read 3", "stop"]


def test_a_transfer_may_have_several_targets(boot: Boot) -> None:
    memory, chip = Memory(), Chip()
    guest = boot(i2c.Adapter(memory, chip))
    lines = guest.run("i2ctransfer -y 0 w3@0x50 0 0 7 w1@0x20 2 r2@0x20 r1@0x50").text.splitlines()
    assert lines == ["0x12 0x34", "0x07"]
    assert memory.diary == ["write 000007", "read 1", "stop"]


def test_a_long_message_arrives_whole(boot: Boot) -> None:
    memory = Memory()
    memory.content[:8192] = bytes(number * 7 % 256 for number in range(8192))
    guest = boot(i2c.Adapter(memory))
    words = guest.run("i2ctransfer -y 0 w2@0x50 0 0 r8192").text.split()
    assert [int(word, 16) for word in words] == list(memory.content[:8192])


def test_a_zero_length_message_is_a_message(boot: Boot) -> None:
    memory = Memory()
    guest = boot(i2c.Adapter(memory))
    guest.run("i2ctransfer -y 0 w0@0x50 r0@0x50")
    assert memory.diary == ["write ", "read 0", "stop"]


@pytest.mark.parametrize("refused", ["w1@0x51 0", "w1@0x50 0xff", "w1@0x50 0xee"], ids=["nobody", "nack", "bug"])
def test_after_a_failure_the_rest_of_the_transfer_fails(boot: Boot, refused: str) -> None:
    memory = Memory()
    guest = boot(i2c.Adapter(memory))
    failed = guest.run(f"i2ctransfer -y 0 w3@0x50 0 0 1 {refused} w3@0x50 0 0 2 r1@0x50", check=False)
    assert "only 1/4 messages were sent" in failed.stderr.decode()
    assert memory.content[0] == 1
    assert "write 000002" not in memory.diary
    assert memory.diary[-1] == "stop"
    # The next transfer is another one.
    assert guest.run("i2ctransfer -y 0 w2@0x50 0 0 r1").text == "0x01"


def test_a_register_that_is_not_there_fails(boot: Boot) -> None:
    guest = boot(i2c.Adapter(Chip()))
    assert guest.run("i2cget -y 0 0x20 0x77", check=False).status != 0
    assert guest.run("i2cset -y 0 0x20 0x00 1", check=False).status != 0
    assert guest.run("i2cget -y 0 0x20 0x00").text == "0x5a"


def test_a_transfer_that_fails_slowly_is_completed_as_a_whole(boot: Boot) -> None:
    class Slow(i2c.Adapter):
        def transfer(self, request: vu.Request) -> None:
            time.sleep(0.01)
            super().transfer(request)

    guest = boot(Slow(Chip()))
    for _ in range(20):
        assert guest.run("i2ctransfer -y 0 w1@0x20 0x77 r1", check=False).stdout == b""
    assert guest.run("i2cget -y 0 0x20 0x00").text == "0x5a"


def test_an_answer_of_the_wrong_length_fails(boot: Boot, caplog: pytest.LogCaptureFixture) -> None:
    class Short(i2c.Target, address=0x30):
        def read(self, count: int) -> bytes:
            return b""

    guest = boot(i2c.Adapter(Short()))
    assert guest.run("i2ctransfer -y 0 r2@0x30", check=False).stdout == b""
    assert ".read(2) returned 0 bytes" in caplog.text


def test_the_driver_can_be_unbound_and_bound_again(boot: Boot) -> None:
    guest = boot(i2c.Adapter(Chip()))
    for _ in range(3):
        guest.run("echo virtio0 > /sys/bus/virtio/drivers/i2c_virtio/unbind; ! test -e /dev/i2c-0")
        guest.run("echo virtio0 > /sys/bus/virtio/drivers/i2c_virtio/bind")
        assert guest.run("i2cget -y 0 0x20 0x00").text == "0x5a"


def test_the_example_runs(program: Program) -> None:
    path, process = program("tmp102.py")
    with Uml([(path, vu.DeviceId.I2C_ADAPTER)]) as guest:
        guest.run(NEW.format("tmp102", 0x48) + "; sleep 0.1")
        assert guest.run(CELSIUS).text == "25000"
        assert process.stdin
        process.stdin.write("37.5\n")
        process.stdin.flush()
        wait_for(lambda: guest.run(CELSIUS).text == "37500")
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait(60) == 0
