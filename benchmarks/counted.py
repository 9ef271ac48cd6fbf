"""So many batches of requests to a device in this process: for a program that counts instructions.

`python counted.py empty|header|headers|read BATCHES`. The chains are all in memory before the ring starts, whether or
not they are used: what differs with the number of batches is the device's part alone.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import vhost_user as vu
from raw import PROTOCOL_FEATURES, VERSION_1, FrontEnd, Memory, Ring
from vhost_user.devices.blk import HEADER, Blk

BATCH = 256
CHAINS = 80 * BATCH
SIZE = 32768
BLOCK = 4096


class Empty(vu.Device, device_id=vu.DeviceId.RNG):
    requestq = vu.Queue(size=SIZE)

    @requestq.handler
    def handle(self, request: vu.Request) -> None:
        pass


class Header(vu.Device, device_id=vu.DeviceId.RNG):
    requestq = vu.Queue(size=SIZE)

    @requestq.handler
    def handle(self, request: vu.Request) -> None:
        _kind, _sector = request.unpack(HEADER)
        request.write_tail(b"\0")


class Headers(vu.Device, device_id=vu.DeviceId.RNG):
    requestq = vu.Queue(size=SIZE)

    @requestq.batch_handler
    def handle(self, batch: vu.Batch) -> None:
        batch.write_tail([b"\0" for _kind, _sector in batch.unpack(HEADER)])


DEVICES: dict[str, Callable[[], vu.Device]] = {
    "empty": Empty,
    "header": Header,
    "headers": Headers,
    "read": lambda: Blk(1 << 20),
}


def main() -> None:
    kind, batches = sys.argv[1], int(sys.argv[2])
    device = DEVICES[kind]()
    # Looks for requests would be counted, as many as there is time for.
    device.busy_poll = 0.0
    # Under a program that counts, everything takes long, and nothing may depend on that.
    device.batch_patience = 3600.0
    with tempfile.TemporaryDirectory() as folder, device.start(Path(folder, "device.sock")) as server:
        front = FrontEnd(server.address)
        front.negotiate(PROTOCOL_FEATURES | VERSION_1)
        memory = front.own(Memory())
        front.share(memory)
        ring = Ring(memory, size=SIZE)
        buffer, status, header = memory.allocate(BLOCK), memory.allocate(1), memory.put(HEADER.pack(0, 0))
        # Every chain is the same one.
        pieces = [(header, HEADER.size, 0), (buffer, BLOCK, 2), (status, 1, 2)]
        chains = {"empty": [(buffer, 64, 2)], "read": pieces}
        head = ring.add_pieces(chains.get(kind, [pieces[0], pieces[2]]))
        ring.offer(*[head] * (CHAINS - 1))
        ring.avail_index = batches * BATCH
        front.set_call(ring)
        front.start(ring)
        deadline = time.monotonic() + 600
        while ring.used_index != batches * BATCH:
            assert time.monotonic() < deadline, "the device goes on"
            # To wait for calls instead would count how often this thread is woken up.
            time.sleep(0.2)
    # What comes now is the interpreter's, and of no interest.
    os._exit(0)


if __name__ == "__main__":
    main()
