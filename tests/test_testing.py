"""The testing kit: against the devices of the package, and against devices that are wrong on purpose."""

from __future__ import annotations

import errno
import itertools
import struct
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import vhost_user as vu
from raw import wait_until
from specimens import NO_TYPE, Diary, Hold, Reverse, ReverseMany
from vhost_user import testing
from vhost_user.devices import Blk, Console, Rng, Tmp102, blk, i2c
from vhost_user.testing import BlkDriver, ConsoleDriver, I2cDriver, RawQueue, RngDriver, hostile
from vhost_user.testing.plugin import ConnectDevice

pytestmark = pytest.mark.usefixtures("level")

pytest_plugins = ["pytester"]


# --- A device and its driver ------------------------------------------------------------------------------------------


def test_a_device_is_served_and_driven() -> None:
    with testing.connect(ReverseMany()) as driver:
        assert [queue.request(b"ab", 3) for queue in driver.queues] == [b"\0ba", b"\1ba", b"\2ba", b"\3ba"]
        assert [queue.size for queue in driver.queues] == [256] * 4


def test_what_is_negotiated_can_be_chosen() -> None:
    device = Diary()
    only = vu.ProtocolFeature.REPLY_ACK
    with testing.connect(device, features=1 << 5, protocol=only) as driver:
        assert driver.protocol == only
        assert device.negotiated & ~vu.TransportFeature.PROTOCOL_FEATURES == 1 << 5


def test_memory_can_be_chosen() -> None:
    memory = vu.Memory(regions=[(0, 1 << 16), (1 << 20, 1 << 16)])
    with testing.connect(Reverse(), memory=memory) as driver:
        assert driver.memory is memory
        assert driver.queues[0].request(b"ab", 2) == b"ba"


def test_nothing_is_said_unless_it_is_asked_for() -> None:
    device = Diary()
    with testing.connect(device, negotiate=False) as driver:
        assert driver.queues == []
        driver.exchange("GET_FEATURES")
        assert device.entries == [("start",), ("connect",)]


def test_an_async_device_is_served_too() -> None:
    class Async(vu.Device, device_id=NO_TYPE):
        requestq = vu.Queue()

        @requestq.handler
        async def answer(self, request: vu.Request) -> None:
            request.write(request.read())

    with testing.connect(Async()) as driver:
        assert driver.queues[0].request(b"ab", 2) == b"ab"


def test_the_exception_of_the_test_comes_first() -> None:
    with pytest.raises(KeyError), testing.connect(Reverse()):
        raise KeyError


def test_a_device_that_cannot_be_served_says_why() -> None:
    class Nothing(vu.Device, device_id=NO_TYPE):
        pass

    with pytest.raises(vu.DeclarationError, match="declares no queue"), testing.connect(Nothing()):
        pass


UNIT_TESTS: dict[str, Callable[[], None]] = {}


def unit_test(function: Callable[[], None]) -> Callable[[], None]:
    UNIT_TESTS[function.__name__] = function
    return function


@unit_test
def one_request() -> None:
    with testing.connect(Reverse()) as driver:
        assert driver.queues[0].request(b"ab", 2) == b"ba"


@unit_test
def a_disk() -> None:
    with BlkDriver.connect(Blk(1 << 20)) as disk:
        disk.write(0, b"x" * 4096)
        assert disk.read(0, 4096) == b"x" * 4096


@unit_test
def a_console() -> None:
    with ConsoleDriver.connect(Console()) as console:
        console.write(b"hello")


@unit_test
def a_sensor() -> None:
    with I2cDriver.connect(i2c.Adapter(Tmp102())) as bus:
        bus.transfer(0x48, b"\0", 2)


@pytest.mark.parametrize("name", UNIT_TESTS)
def test_a_unit_test_takes_less_than_20_ms(name: str) -> None:
    def duration() -> float:
        began = time.perf_counter()
        UNIT_TESTS[name]()
        return time.perf_counter() - began

    # Others use the machine, too: once is enough, and no unit test that waits for a timeout is ever as fast as that.
    assert any(duration() < 0.02 for _ in range(200))


# --- What is left over ------------------------------------------------------------------------------------------------


def test_a_request_that_is_never_answered_fails_the_test() -> None:
    device = Hold()

    def unit_test() -> None:
        with testing.connect(device) as driver:
            driver.queues[0].submit(b"?")
            device.held = [device.next()]

    with pytest.raises(testing.Leftovers, match=r"queue 0 \(requestq\): 1 requests were taken and not completed"):
        unit_test()


def test_a_request_that_is_answered_late_is_fine() -> None:
    device = Hold()
    with testing.connect(device) as driver:
        completion = driver.queues[0].submit(b"?")
        timer = threading.Timer(0.1, device.next().complete)
        timer.start()
        del completion
    timer.join()


def test_a_request_that_is_dropped_fails_the_test() -> None:
    class Drop(vu.Device, device_id=NO_TYPE):
        requestq = vu.Queue()

        @requestq.handler
        def drop(self, request: vu.Request) -> None:
            request.detach()

    def unit_test() -> None:
        with testing.connect(Drop()) as driver:
            driver.queues[0].submit(b"?")

    with pytest.raises(testing.Leftovers, match="queue 0: a request was dropped without complete"):
        unit_test()


def test_a_buffer_that_outlives_its_request_fails_the_test() -> None:
    class Keep(vu.Device, device_id=NO_TYPE):
        requestq = vu.Queue()

        @requestq.handler
        def keep(self, request: vu.Request) -> None:
            self.kept = request.readable_buffers()

    device = Keep()

    def unit_test() -> None:
        with testing.connect(device) as driver:
            driver.queues[0].request(b"?")

    with pytest.raises(testing.Leftovers, match=r"test_testing\.py:\d+: queue 0: a buffer of a completed request"):
        unit_test()
    device.kept.clear()


def test_buffers_that_the_device_may_keep_are_not_left_over() -> None:
    with ConsoleDriver.connect(Console()):
        pass


def test_other_warnings_go_where_they_went() -> None:
    def unit_test() -> None:
        with testing.connect(Reverse()):
            warnings.warn("something else", stacklevel=1)

    with pytest.warns(UserWarning, match="something else"):
        unit_test()


# --- pytest -----------------------------------------------------------------------------------------------------------


def test_the_fixture_connects_until_the_end_of_the_test(connect_device: ConnectDevice) -> None:
    assert connect_device(Reverse()).queues[0].request(b"ab", 2) == b"ba"
    assert connect_device(Rng(bytes), RngDriver).read(3) == b"\0\0\0"


def test_the_plugin_is_there_and_fails_a_test_that_leaves_something(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import vhost_user as vu

        class Drop(vu.Device, device_id=99):
            requestq = vu.Queue()

            @requestq.handler
            def drop(self, request):
                request.detach()

        def test_it(connect_device):
            connect_device(Drop()).queues[0].request(b"?")
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*Leftovers: queue 0: a request was dropped without complete()*"])


# --- Drivers ----------------------------------------------------------------------------------------------------------


def test_entropy_is_read_until_there_is_enough() -> None:
    numbers = itertools.count()
    with RngDriver.connect(Rng(lambda count: bytes([next(numbers)]))) as rng:
        assert rng.read(5) == bytes(range(5))


def test_an_entropy_source_that_gives_nothing_is_wrong() -> None:
    with RngDriver.connect(Rng(lambda count: b"")) as rng, pytest.raises(vu.ProtocolError, match="gave no byte"):
        rng.read(1)


def test_a_disk_is_written_and_read(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 16))
    with BlkDriver.connect(Blk(image, serial="S1", num_queues=2)) as disk:
        assert (disk.capacity, disk.get_id()) == (128, "S1")
        disk.write(sector=1, data=b"x" * 1024, queue=1)
        disk.flush()
        assert image.read_bytes()[512:1536] == b"x" * 1024
        assert disk.read(sector=2, size=1024) == b"x" * 512 + bytes(512)
        disk.write_zeroes(sector=1, sectors=1)
        disk.discard(sector=2, sectors=1)
        assert disk.read(sector=0, size=2048) == bytes(2048)


def test_a_disk_that_fails_says_so() -> None:
    class Faulty(Blk):
        def read(self, request: vu.Request, offset: int, count: int) -> None:
            raise OSError(errno.EIO, "lost")

    with BlkDriver.connect(Faulty(1 << 16)) as disk:
        with pytest.raises(testing.RequestFailed, match="IN at sector 3: the status is 1") as failed:
            disk.read(3, 512)
        assert failed.value.status == 1
        with pytest.raises(testing.RequestFailed, match="request 77 at sector 0: the status is 2"):
            disk.execute(77)


def test_a_disk_that_answers_with_too_little_is_wrong() -> None:
    class Short(Blk):
        def execute(self, request: vu.Request) -> None:
            request.write(blk.S_OK)

    complaint = "the device wrote 1 bytes, expected 512 and a status"
    with BlkDriver.connect(Short(1 << 16)) as disk, pytest.raises(vu.ProtocolError, match=complaint):
        disk.read(0, 512)


def test_a_console_is_talked_to() -> None:
    class Echo(Console):
        def on_output(self, data: bytes) -> None:
            self.write(data.upper())

    device = Echo(cols=100)
    with ConsoleDriver.connect(device) as console:
        assert console.size == (100, 24)
        console.write(b"one\ntwo\nthree")
        assert (console.read_line(), console.read(5), console.read(4)) == (b"ONE\n", b"TWO\nT", b"HREE")
        device.resize(132, 50)
        console.frontend.wait_config_change()
        assert console.size == (132, 50)
        with pytest.raises(vu.PeerTimeout):
            console.read(1, timeout=0.05)
        for _ in range(9):
            console.write(b"still there")
            assert console.read(11) == b"STILL THERE"


def test_a_sensor_is_read_in_one_transfer() -> None:
    sensor = Tmp102()
    with I2cDriver.connect(i2c.Adapter(sensor)) as bus:
        sensor.celsius = 21.5
        assert bus.transfer(Tmp102.address, b"\0", 2) == [(int(21.5 * 16) << 4).to_bytes(2, "big")]
        assert bus.transfer(Tmp102.address, b"\2\x12\x30", b"\2", 2) == [b"\x12\x30"]
        assert bus.transfer(Tmp102.address) == []


def test_a_transfer_is_one_to_its_target() -> None:
    class Listener(i2c.Target, address=0x10):
        def __init__(self) -> None:
            self.heard: list[object] = []

        def write(self, data: bytes) -> None:
            self.heard.append(data)

        def read(self, count: int) -> bytes:
            self.heard.append(count)
            return bytes(count)

        def stop(self) -> None:
            self.heard.append("stop")

    listener = Listener()
    with I2cDriver.connect(i2c.Adapter(listener)) as bus:
        assert bus.transfer(0x10, b"ab", 3, b"c") == [bytes(3)]
        bus.transfer(0x10)
    assert listener.heard == [b"ab", 3, b"c", "stop", b"", "stop"]


def test_a_transfer_that_is_not_acknowledged_says_which_message() -> None:
    with I2cDriver.connect(i2c.Adapter(Tmp102())) as bus:
        with pytest.raises(testing.RequestFailed, match="message 1 of 1 to 0x50 was not acknowledged"):
            bus.transfer(0x50)
        with pytest.raises(testing.RequestFailed, match="message 2 of 3 to 0x48"):
            bus.transfer(0x48, b"\0", b"\x77", 1)


def test_a_driver_works_over_any_connection(tmp_path: Path) -> None:
    path = tmp_path / "blk.sock"
    with Blk(1 << 16).start(path), vu.Frontend.connect(path) as frontend:
        assert BlkDriver(frontend.negotiate()).capacity == 128


# --- What no good driver would send -----------------------------------------------------------------------------------


def test_a_raw_queue_is_a_queue() -> None:
    with testing.connect(Reverse(), start=False) as driver, RawQueue(driver, base=65535) as ring:
        room = ring.put(bytes(2))
        ring.describe(0, ring.put(b"ab"), 2, hostile.NEXT, next=5)
        ring.describe(5, room, 2, hostile.WRITE)
        for _ in range(3):
            ring.memory.write(room, b"??")
            ring.offer(0)
            assert ring.wait_used() == (0, 2)
            assert ring.memory.read(room, 2) == b"ba"
        with pytest.raises(vu.PeerTimeout, match="gave nothing back"):
            ring.wait_used(0.05)


def test_a_malformed_chain_breaks_only_its_own_queue() -> None:
    device = ReverseMany()
    with testing.connect(device, start=False) as driver, RawQueue(driver, 1) as ring:
        good = driver.queue(0)
        ring.describe(0, ring.put(b"?"), 1, hostile.NEXT, next=0)
        ring.offer(0)
        assert ring.wait_broken()
        assert device.queues_[1].status == "broken"
        assert good.request(b"ab", 3) == b"\0ba"


def test_an_available_index_that_jumps_breaks_the_queue() -> None:
    with testing.connect(Reverse(), start=False) as driver, RawQueue(driver) as ring:
        ring.set_available(99)
        assert ring.wait_broken()


def test_a_raw_queue_that_is_refused_says_by_what() -> None:
    complaint = "SET_VRING_NUM: the back-end refused it"
    with testing.connect(Reverse(), start=False) as driver, pytest.raises(vu.ProtocolError, match=complaint):
        RawQueue(driver, size=7)


def test_a_message_may_come_in_pieces() -> None:
    with testing.connect(Reverse()) as driver:
        whole = testing.message("SET_OWNER")
        for at in range(len(whole)):
            testing.send(driver, whole[at : at + 1])
        assert driver.queues[0].request(b"ab", 2) == b"ba"
        driver.exchange("GET_FEATURES")


def test_a_connection_may_be_cut_in_the_middle_of_a_message() -> None:
    device = Diary()
    with testing.connect(device) as driver:
        testing.send(driver, testing.message("SET_VRING_NUM", struct.pack("=II", 0, 8))[:15])
        driver.close()
        # Who is stopped before that does not look.
        wait_until(lambda: any(entry[0] == "disconnect" for entry in device.entries), "the device sees the end")
    (error,) = [entry[1] for entry in device.entries if entry[0] == "disconnect"]
    assert "3 of the 8 payload bytes of request 8" in str(error)


def test_a_message_may_lie_about_its_length() -> None:
    device = Diary()
    with testing.connect(device) as driver:
        testing.send(driver, testing.message("GET_CONFIG", size=1 << 20))
        with pytest.raises(vu.PeerClosed):
            driver.exchange("GET_FEATURES")
        with pytest.raises(vu.PeerClosed):
            testing.send(driver, testing.message("GET_FEATURES"))


def test_messages_may_come_in_any_order() -> None:
    with testing.connect(Reverse(), negotiate=False) as driver:
        assert driver.exchange("SET_VRING_ENABLE", struct.pack("=II", 0, 1)) is None
        assert driver.exchange("GET_VRING_BASE", struct.pack("=II", 0, 0)) == struct.pack("=II", 0, 0)
