"""The devices that are measured: `python devices.py NAME SOCKET [ARGUMENT]` serves one."""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Callable

import vhost_user as vu
from vhost_user.devices.blk import Blk

HEADER = struct.Struct("<I4xQ")
PACKET = bytes(64)


class Empty(vu.Device, device_id=vu.DeviceId.RNG):
    """A handler that does nothing: what is left is what a request costs."""

    requestq = vu.Queue(size=1024)

    @requestq.handler
    def handle(self, request: vu.Request) -> None:
        pass


class Polling(Empty):
    """The same, which looks for requests by itself for longer than others."""

    busy_poll = 0.001


class Sleeping(Empty):
    """The same, which sleeps whenever it has nothing to do."""

    busy_poll = 0.0


class Header(vu.Device, device_id=vu.DeviceId.BLOCK):
    """A handler that reads a header and writes a status."""

    requestq = vu.Queue(size=1024)

    @requestq.handler
    def handle(self, request: vu.Request) -> None:
        _kind, _sector = request.unpack(HEADER)
        request.write_tail(b"\0")


class Headers(vu.Device, device_id=vu.DeviceId.BLOCK):
    """The same, as many at once as there are."""

    requestq = vu.Queue(size=1024)

    @requestq.batch_handler
    def handle(self, batch: vu.Batch) -> None:
        batch.write_tail([b"\0" for _kind, _sector in batch.unpack(HEADER)])


class Null(Blk):
    """A disk whose own handler moves no data."""

    @Blk.requestqs.handler
    def answer(self, request: vu.Request) -> None:
        _kind, _sector = request.unpack(HEADER)
        request.write_tail(b"\0")


class PollingNull(Null):
    busy_poll = 0.001


class SleepingNull(Null):
    busy_poll = 0.0


class PollingBlk(Blk):
    busy_poll = 0.001


class SleepingBlk(Blk):
    busy_poll = 0.0


class Digest(vu.Device, device_id=0x1000):
    """Work that lets go of the interpreter, on two queues."""

    requestqs = vu.Queue.many(2)

    def __init__(self, workers: int) -> None:
        self.workers = workers

    @requestqs.handler
    def handle(self, request: vu.Request) -> None:
        request.write(hashlib.sha256(request.read()).digest())


class Checksum(Digest):
    """The same queues, and work that is Python all the way."""

    @Digest.requestqs.handler
    def handle(self, request: vu.Request) -> None:
        low, high = 1, 0
        for byte in request.read():
            low = (low + byte) % 65521
            high = (high + low) % 65521
        request.write(struct.pack("<HH", low, high))


class Sink(vu.Device, device_id=vu.DeviceId.NET):
    """Takes packets, as many at once as there are."""

    packets = 0
    txq = vu.Queue(size=1024)

    @txq.batch_handler
    def take(self, batch: vu.Batch) -> None:
        self.packets += len(batch)


class Source(vu.Device, device_id=vu.DeviceId.NET):
    """Fills every buffer that the driver has, so many at once."""

    rxq = vu.Queue(size=1024)

    def __init__(self, batch: int = 256) -> None:
        self.burst = [PACKET] * batch

    def on_buffers(self, queue: vu.DeviceQueue) -> None:
        while queue.push_many(self.burst):
            pass


DEVICES: dict[str, Callable[..., vu.Device]] = {
    "empty": Empty,
    "polling": Polling,
    "sleeping": Sleeping,
    "header": Header,
    "headers": Headers,
    "blk": Blk,
    "polling-blk": PollingBlk,
    "sleeping-blk": SleepingBlk,
    "null": lambda: Null(1 << 30),
    "polling-null": lambda: PollingNull(1 << 30),
    "sleeping-null": lambda: SleepingNull(1 << 30),
    "digest": lambda workers: Digest(int(workers)),
    "checksum": lambda workers: Checksum(int(workers)),
    "sink": Sink,
    "source": lambda batch: Source(int(batch)),
}

if __name__ == "__main__":
    name, path, *arguments = sys.argv[1:]
    DEVICES[name](*arguments).serve(path)
