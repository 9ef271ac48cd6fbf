"""An entropy source, which feeds /dev/hwrng of a guest."""

import os

import vhost_user as vu


class Rng(vu.Device, device_id=vu.DeviceId.RNG):
    requestq = vu.Queue(size=64)

    @requestq.handler
    def fill(self, request: vu.Request) -> None:
        request.write(os.urandom(request.writable))


if __name__ == "__main__":
    Rng().serve("/tmp/rng.sock")
