"""A disk on which every tenth read fails, and every write takes a tenth of a second."""

import errno
import itertools
import time

import vhost_user as vu
from vhost_user.devices import Blk


class FaultyDisk(Blk):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.reads = itertools.count(1)

    def read(self, request: vu.Request, offset: int, count: int) -> None:
        if next(self.reads) % 10 == 0:
            raise OSError(errno.EIO, "the head has crashed")
        super().read(request, offset, count)

    def write(self, request: vu.Request, offset: int, count: int) -> None:
        time.sleep(0.1)
        super().write(request, offset, count)


if __name__ == "__main__":
    FaultyDisk(64 << 20).serve("/tmp/blk.sock")
