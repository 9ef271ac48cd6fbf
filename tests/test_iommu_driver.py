"""Devices behind an IOMMU with the package's own driver: nothing in a device has to know of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

import vhost_user as vu
from raw import DEADLINE, wait_until
from specimens import Hold, Reverse, ReverseMany
from vhost_user.devices import Blk, Console, Rng, Tmp102, i2c
from vhost_user.testing import BlkDriver, ConsoleDriver, I2cDriver, RngDriver, connect

pytestmark = pytest.mark.usefixtures("level")

PAGE = 4096


def use_disk(frontend: vu.Frontend) -> None:
    driver, data = BlkDriver(frontend), os.urandom(5 * PAGE)
    driver.write(3, data)
    driver.flush()
    assert driver.read(3, len(data)) == data


def use_console(frontend: vu.Frontend) -> None:
    driver = ConsoleDriver(frontend)
    driver.write(b"hello")
    assert driver.read(5) == b"HELLO"


def use_sensor(frontend: vu.Frontend) -> None:
    [answer] = I2cDriver(frontend).transfer(0x48, b"\0", 2)
    assert answer == b"\x19\0"


def use_entropy(frontend: vu.Frontend) -> None:
    assert len(set(RngDriver(frontend).read(3 * PAGE))) == 256


class Shout(Console):
    def on_output(self, data: bytes) -> None:
        self.write(data.upper())


@pytest.mark.parametrize("features", [None, 0], ids=["all features", "none"])
@pytest.mark.parametrize(
    ("device", "use"),
    [
        (lambda: Blk(1 << 20), use_disk),
        (Shout, use_console),
        (lambda: i2c.Adapter(Tmp102()), use_sensor),
        (Rng, use_entropy),
    ],
    ids=["disk", "console", "sensor", "entropy"],
)
def test_devices_work_behind_an_iommu(
    device: Callable[[], vu.Device], use: Callable[[vu.Frontend], None], features: int | None
) -> None:
    served = device()
    wanted = None if features is None else vu.TransportFeature.VERSION_1 | served.features
    with connect(served, iommu=True, features=wanted) as frontend:
        use(frontend)
        assert frontend.iotlb_misses == sum(queue.statistics.iotlb_misses for queue in served.queues) > 1


def test_the_device_gets_io_addresses_where_guest_addresses_are_none() -> None:
    with connect(Reverse(), iommu=True) as frontend:
        [(start, size)] = frontend.memory.regions
        for address in frontend.queues[0].addresses:
            assert frontend.io_address(start) <= address < frontend.io_address(start) + size
        assert frontend.io_address(start) != start
        assert frontend.queues[0].request(b"abc", 3) == b"cba"
    with connect(Reverse()) as frontend:
        assert frontend.io_address(0x1234) == 0x1234
        assert frontend.iotlb_misses == 0
        for refused in (frontend.unmap_io, frontend.invalidate_io):
            with pytest.raises(vu.StateError, match="ACCESS_PLATFORM was not negotiated"):
                refused(0, 1)


def test_an_iommu_has_to_be_offered() -> None:
    with connect(Reverse(), negotiate=False) as frontend, pytest.raises(vu.StateError, match="not offered"):
        frontend.negotiate(iommu=True)


def test_addresses_that_are_taken_back_are_waited_for() -> None:
    device = Hold()
    with connect(device, iommu=True) as frontend:
        [(start, size)] = frontend.memory.regions
        completion = frontend.queues[0].submit(b"hello", 8)
        serving = threading.Thread(target=lambda: frontend.next_event(0.2))
        serving.start()
        request = device.next()
        serving.join()
        request.write(b"done")
        timer = threading.Timer(0.2, request.complete)
        timer.start()
        frontend.invalidate_io(frontend.io_address(start), size)
        # It was answered after the request was done, which was published when the ring was mapped again.
        assert request.completed
        timer.join()
        assert completion.wait() == b"done"


def test_a_device_may_do_no_more_than_its_mapping_allows() -> None:
    device = Reverse()
    with connect(device, iommu=True, start=False) as frontend:
        [(start, size)] = frontend.memory.regions
        queue = frontend.queue(0, 16)
        assert queue.request(b"abc", 3) == b"cba"
        frontend.map_io(frontend.io_address(start), start, size, "r")
        # Only then: a device that looks for requests asks at once.
        frontend.invalidate_io(frontend.io_address(start), size)
        with pytest.raises(vu.VhostUserError, match="broken"):
            queue.request(b"abc", 3)
        assert device.queues[0].status == "broken"


def test_what_is_not_mapped_breaks_the_queue() -> None:
    device = Reverse()
    with connect(device, iommu=True) as frontend:
        [(start, size)] = frontend.memory.regions
        frontend.unmap_io(frontend.io_address(start), size)
        # Of one part: the driver would not find room for a table of several, either.
        with pytest.raises(vu.VhostUserError, match="broken"):
            frontend.queues[0].request(b"abc")
        assert device.queues[0].status == "broken"


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_nothing_is_lost_while_everything_is_taken_back_again_and_again(packed: bool) -> None:
    device = ReverseMany()
    device.packed_rings = packed
    with connect(device, iommu=True) as frontend:
        assert bool(frontend.features & vu.TransportFeature.RING_PACKED) is packed
        [(start, size)] = frontend.memory.regions
        over = threading.Event()

        def work(queue: vu.DriverQueue) -> int:
            # What was mapped for a request may be gone again each time.
            queue.timeout = DEADLINE
            count = 0
            while not over.is_set() or count < 50:
                text = b"%d of %d" % (count, queue.index)
                assert queue.request(text, 64) == bytes([queue.index]) + text[::-1]
                count += 1
            return count

        with ThreadPoolExecutor() as threads:
            workers = [threads.submit(work, queue) for queue in frontend.queues]
            try:
                for _ in range(100):
                    frontend.invalidate_io(frontend.io_address(start), size)
            finally:
                over.set()
            assert all(worker.result() >= 50 for worker in workers)
        wait_until(lambda: not any(queue.in_flight for queue in device.queues), "everything is done")
        assert device.queues[0].statistics.iotlb_invalidations == 100


def test_gpa_addresses_are_used_on_request() -> None:
    with connect(Reverse(), protocol=vu.ProtocolFeature.GPA_ADDRESSES | vu.ProtocolFeature.REPLY_ACK) as frontend:
        assert frontend.protocol & vu.ProtocolFeature.GPA_ADDRESSES
        assert frontend.queues[0].request(b"abc", 3) == b"cba"
        frontend.share(frontend.memory, vu.Memory(regions=[(0x9000_0000, PAGE)]))
        assert frontend.queues[0].request(b"abc", 3) == b"cba"
    with connect(Reverse()) as frontend:
        assert not frontend.protocol & vu.ProtocolFeature.GPA_ADDRESSES
