"""A disk: a file, a block device, or memory. Virtio 1.3, section 5.2.

    Blk("disk.img", num_queues=4).serve("/tmp/blk.sock")

A disk that misbehaves overrides what it does wrong:

    class Faulty(Blk):
        def read(self, request: Request, offset: int, count: int) -> None:
            if offset == 0:
                raise OSError(errno.EIO, "the first sector is lost")
            super().read(request, offset, count)
"""

from __future__ import annotations

import ctypes
import enum
import errno
import logging
import os
import stat
import struct
import weakref
from typing import BinaryIO

from .. import config
from .._complaints import report
from .._core import Blocks, Complaints, Request
from ..device import Device
from ..errors import RequestError
from ..ids import DeviceId
from ..loop import HasFileno
from ..queues import Queue

F_SEG_MAX = 1 << 2
F_RO = 1 << 5
F_BLK_SIZE = 1 << 6
F_FLUSH = 1 << 9
F_CONFIG_WCE = 1 << 11
F_MQ = 1 << 12
F_DISCARD = 1 << 13
F_WRITE_ZEROES = 1 << 14

#: Requests and the configuration space count in sectors of this size, whatever the size of a block.
SECTOR = 512

#: In front of every request: its type, and a sector.
HEADER = struct.Struct("<I4xQ")


class Type(enum.IntEnum):
    """What a request asks for."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


#: One range of a discard or write-zeroes request: sector, sectors, flags.
SEGMENT = struct.Struct("<QII")
SEGMENT_UNMAP = 1 << 0

#: The last byte of every request.
S_OK = b"\0"
S_IOERR = b"\1"
S_UNSUPP = b"\2"

ID_BYTES = 20

#: What fits in the queue of 128 entries that is the default of QEMU, with a header and a status.
MAX_SEGMENTS = 126

#: Ranges in a discard or write-zeroes request, and sectors in one range: 2 GiB of holes, or 32 MiB of zeroes.
MAX_RANGES = 32
MAX_DISCARD_SECTORS = 1 << 22
MAX_WRITE_ZEROES_SECTORS = 1 << 16

# fallocate(2)
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

Storage = str | os.PathLike[str] | HasFileno | int

logger = logging.getLogger(__name__)


class Blk(Device, device_id=DeviceId.BLOCK):
    """A disk whose data is in `storage`: a path of a file or block device, an open file, or memory of that many bytes.

    The disk ends with the last whole block of `block_size` bytes, a power of two. `serial` is its name, of up to 20
    bytes. Whoever opened a file may close it: the disk has a descriptor of its own.

    What it does may be overridden: :meth:`read`, :meth:`write`, :meth:`flush`, :meth:`discard`, :meth:`write_zeroes`,
    and :meth:`execute`, through which every request goes. A range that they get lies on the disk, in bytes. An
    :exc:`OSError` is an answer: EOPNOTSUPP tells the driver that the operation is not supported, any other that it
    failed.

    Raises:
        ValueError: the storage cannot be a disk, or an argument is out of its range.
        OSError: the storage cannot be opened.
    """

    capacity = config.u64()
    size_max = config.u32()
    seg_max = config.u32(MAX_SEGMENTS)
    geometry = config.raw(4)
    blk_size = config.u32()
    topology = config.raw(8)
    wce = config.u8(1, writable=True)
    unused0 = config.raw(1)
    num_queues = config.u16()
    max_discard_sectors = config.u32(MAX_DISCARD_SECTORS)
    max_discard_seg = config.u32(MAX_RANGES)
    discard_sector_alignment = config.u32()
    max_write_zeroes_sectors = config.u32(MAX_WRITE_ZEROES_SECTORS)
    max_write_zeroes_seg = config.u32(MAX_RANGES)
    write_zeroes_may_unmap = config.u8(1)
    unused1 = config.raw(3)

    requestqs = Queue.many("num_queues", 128)

    #: What :meth:`_plain_blocks` returned last, and what that depends on.
    _known_blocks: tuple[tuple[int, int, bool] | None, Blocks | None] = (None, None)

    def __init__(
        self,
        storage: Storage,
        *,
        read_only: bool = False,
        num_queues: int = 1,
        serial: str = "",
        block_size: int = SECTOR,
    ) -> None:
        if num_queues < 1:
            raise ValueError(f"a disk has at least one queue, not {num_queues}")
        if block_size < SECTOR or block_size & (block_size - 1):
            raise ValueError(f"a block has a power of two of bytes from {SECTOR} on, not {block_size}")
        if len(serial.encode()) > ID_BYTES:
            raise ValueError(f"a serial number has up to {ID_BYTES} bytes; {serial!r} is longer")
        self.read_only = read_only
        self.serial = serial
        self.blk_size = block_size
        self.discard_sector_alignment = block_size // SECTOR
        self.num_queues = num_queues
        self.features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_CONFIG_WCE | F_MQ
        self.features |= F_RO if read_only else F_DISCARD | F_WRITE_ZEROES
        #: A driver can bring them about as often as it likes.
        self._refusals = Complaints()
        self._fd = _open(storage, read_only)
        weakref.finalize(self, os.close, self._fd)
        self._resizable = _is_file(self._fd)
        self.resize()

    def fileno(self) -> int:
        """The descriptor of the storage, which belongs to the disk."""
        return self._fd

    @property
    def size(self) -> int:
        """The size of the disk in bytes."""
        return self.capacity * SECTOR

    def resize(self, size: int | None = None) -> None:
        """Make a file or memory `size` bytes long, or take the size that the storage has got by itself.

        The driver is told. From any thread.

        Raises:
            ValueError: `size` is not a whole number of blocks, or the storage is a block device, which has its own.
            OSError: the file cannot be resized.
        """
        if size is not None:
            if size < 0 or size % self.blk_size:
                raise ValueError(f"a disk has a multiple of {self.blk_size} bytes, not {size}")
            if not self._resizable:
                raise ValueError("a block device has its own size; resize it, and call resize() without one")
            os.ftruncate(self._fd, size)
        # The end of a block device is found by seeking, which is how one of a file is found, too.
        self.capacity = os.lseek(self._fd, 0, os.SEEK_END) // self.blk_size * (self.blk_size // SECTOR)

    # --- What the disk does -----------------------------------------------------------------------------------------

    def read(self, request: Request, offset: int, count: int) -> None:
        """Write `count` bytes from `offset` of the disk to the request."""
        done = request.copy_from_file(self, offset, count)
        # A file that is shorter than the disk is a disk with nothing in its end.
        request.write(bytes(count - done))

    def write(self, request: Request, offset: int, count: int) -> None:
        """Read `count` bytes of the request to `offset` of the disk."""
        request.copy_to_file(self, offset, count)

    def flush(self) -> None:
        """Return when everything that was written is safe from a loss of power."""
        os.fdatasync(self._fd)

    def discard(self, offset: int, count: int) -> None:
        """Forget the content of a range, if the storage can."""
        try:
            _fallocate(self._fd, FALLOC_FL_PUNCH_HOLE, offset, count)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise

    def write_zeroes(self, offset: int, count: int, unmap: bool) -> None:
        """Make a range zero; with `unmap`, its space on the storage may be freed."""
        try:
            _fallocate(self._fd, FALLOC_FL_PUNCH_HOLE if unmap else FALLOC_FL_ZERO_RANGE, offset, count)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            _write_zeroes(self._fd, offset, count)

    # --- Requests ---------------------------------------------------------------------------------------------------

    @requestqs.blocks
    def _plain_blocks(self) -> Blocks | None:
        """Where reads and writes go without Python, unless they are somebody's special wish.

        Asked for each batch, which may be one request: what it depends on is looked at, and nothing is made unless that
        has changed.
        """
        cls, own = type(self), self.__dict__
        if cls.execute is not EXECUTE or cls.read is not READ or cls.write is not WRITE:
            return None
        if "execute" in own or "read" in own or "write" in own:
            return None
        runtime = self._runtime
        basis = (runtime.config.version, runtime.negotiated, self.read_only)
        known, blocks = self._known_blocks
        if known != basis:
            plain = [("execute", EXECUTE), ("read", READ), ("write", WRITE), ("read_only", self.read_only)]
            blocks = Blocks(self._fd, self.capacity, not self.read_only and self._has_cache, lasting=plain)
            # At once: another worker may be here, too.
            self._known_blocks = basis, blocks
        return blocks

    @requestqs.handler
    def execute(self, request: Request) -> None:
        """Do what a request asks for, and write its status.

        An override that calls this later has to detach the request, and complete it afterwards.
        """
        kind, sector = request.unpack(HEADER)
        if not request.writable:
            raise RequestError("the driver left no room for the status")
        try:
            self._perform(kind, sector, request)
            status = S_OK
        except OSError as error:
            text = "request of type %d at sector %d: %s"
            report(logger, self._refusals, text, kind, sector, error, level=logging.WARNING)
            status = S_UNSUPP if error.errno == errno.EOPNOTSUPP else S_IOERR
        request.write_tail(status)

    def on_request_error(self, request: Request, error: BaseException) -> None:
        if request.writable:
            request.write_tail(S_IOERR)

    def on_save_state(self, file: BinaryIO) -> None:
        file.write(bytes([self.wce]))

    def on_load_state(self, file: BinaryIO) -> None:
        state = file.read(2)
        if state not in (b"\0", b"\1"):
            raise ValueError(f"the state of a disk is a byte, 0 or 1, not {state!r}")
        if state[0] != self.wce:
            self.wce = state[0]

    @wce.on_write
    def _change_cache(self, old: int, new: int) -> None:
        if old and not new:
            self.flush()

    def _perform(self, kind: int, sector: int, request: Request) -> None:
        if self.read_only and kind in {Type.OUT, Type.DISCARD, Type.WRITE_ZEROES}:
            raise OSError(errno.EROFS, "the disk is read-only")
        match kind:
            case Type.IN:
                count = request.writable - len(S_OK)
                self.read(request, self._offset(sector, count), count)
                left = request.writable - len(S_OK)
                if left:
                    raise OSError(errno.EIO, f"read() wrote all but {left} of {count} bytes")
            case Type.OUT:
                count = request.readable
                self.write(request, self._offset(sector, count), count)
                self._write_through()
            case Type.FLUSH:
                self.flush()
            case Type.GET_ID:
                request.write(self.serial.encode().ljust(ID_BYTES, b"\0")[: request.writable - len(S_OK)])
            case Type.DISCARD:
                for offset, count, _ in self._ranges(request, self.max_discard_seg, self.max_discard_sectors):
                    self.discard(offset, count)
            case Type.WRITE_ZEROES:
                ranges = self._ranges(
                    request, self.max_write_zeroes_seg, self.max_write_zeroes_sectors, allowed=SEGMENT_UNMAP
                )
                for offset, count, flags in ranges:
                    self.write_zeroes(offset, count, bool(flags & SEGMENT_UNMAP))
                self._write_through()
            case _:
                raise OSError(errno.EOPNOTSUPP, "there is no such type")

    def _offset(self, sector: int, count: int) -> int:
        """The offset of `count` bytes at `sector`, if they lie on the disk."""
        if count % SECTOR:
            raise OSError(errno.EINVAL, f"{count} bytes are not a multiple of {SECTOR}")
        if sector * SECTOR + count > self.size:
            raise OSError(errno.EINVAL, f"{count} bytes there are beyond the {self.capacity} sectors of the disk")
        return sector * SECTOR

    def _ranges(self, request: Request, most: int, longest: int, allowed: int = 0) -> list[tuple[int, int, int]]:
        """Offset, bytes and flags of each range of a request, none of which is empty, after a look at all of them."""
        number, rest = divmod(request.readable, SEGMENT.size)
        if rest or not 0 < number <= most:
            raise OSError(errno.EINVAL, f"{request.readable} bytes are not 1 to {most} ranges of {SEGMENT.size}")
        ranges = []
        for sector, sectors, flags in SEGMENT.iter_unpack(request.read()):
            if flags & ~allowed:
                raise OSError(errno.EOPNOTSUPP, f"flags {flags:#x} are not supported")
            if sectors > longest:
                raise OSError(
                    errno.EINVAL, f"a range of {sectors} sectors is longer than the {longest} of the disk's limit"
                )
            if sectors:
                ranges.append((self._offset(sector, sectors * SECTOR), sectors * SECTOR, flags))
        return ranges

    @property
    def _has_cache(self) -> bool:
        """Whether the driver knows of a cache that it has to flush by itself."""
        return bool(self.wce if self.negotiated & F_CONFIG_WCE else self.negotiated & F_FLUSH)

    def _write_through(self) -> None:
        """Flush, unless the driver does that."""
        if not self._has_cache:
            self.flush()


#: What a read or a write goes through, and somebody may override or replace.
EXECUTE, READ, WRITE = Blk.execute, Blk.read, Blk.write


def _open(storage: Storage, read_only: bool) -> int:
    if isinstance(storage, int):
        fd = os.memfd_create("disk", os.MFD_CLOEXEC)
        os.ftruncate(fd, storage)
        return fd
    if isinstance(storage, str | os.PathLike):
        return os.open(storage, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    return os.dup(storage.fileno())


def _is_file(fd: int) -> bool:
    """Whether it is a file, or memory, and not a block device."""
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise ValueError("a disk is a file, a block device, or memory; the storage is none of them")
    return stat.S_ISREG(mode)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def _fallocate(fd: int, mode: int, offset: int, count: int) -> None:
    """fallocate(2), which Python has only without a mode. The size of the file stays."""
    while _libc.fallocate(fd, mode | FALLOC_FL_KEEP_SIZE, offset, count) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def _write_zeroes(fd: int, offset: int, count: int) -> None:
    zeroes = bytes(min(count, 1 << 20))
    end = offset + count
    while offset < end:
        offset += os.pwrite(fd, zeroes[: end - offset], offset)
