"""The disk: request by request over a socket, and in real guests."""

from __future__ import annotations

import contextlib
import encodings
import errno
import hashlib
import itertools
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import vhost_user as vu
from devices.running import Boot, Example, Program
from raw import CONFIG, EVENT_IDX, MQ, PROTOCOL_FEATURES, REPLY_ACK, VERSION_1, FrontEnd, Memory, Ring
from specimens import Connect, Serve
from vhost_user.devices import Blk, blk
from vhost_user.guest import Qemu, Uml

MIB = 1 << 20

Ask = Callable[..., tuple[bytes, bytes]]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk of 4 MiB on which no two sectors are alike."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(hashlib.sha256(struct.pack("<I", number)).digest() * 16 for number in range(8192)))
    return path


def used(path: Path) -> int:
    """Bytes that a file takes on its file system."""
    return path.stat().st_blocks * 512


# --- The class -------------------------------------------------------------------------------------------------------


def test_the_configuration_space_is_as_the_specification_says() -> None:
    offsets = {
        "capacity": 0,
        "size_max": 8,
        "seg_max": 12,
        "geometry": 16,
        "blk_size": 20,
        "topology": 24,
        "wce": 32,
        "num_queues": 34,
        "max_discard_sectors": 36,
        "max_discard_seg": 40,
        "discard_sector_alignment": 44,
        "max_write_zeroes_sectors": 48,
        "max_write_zeroes_seg": 52,
        "write_zeroes_may_unmap": 56,
        "unused1": 57,
    }
    assert {name: getattr(Blk, name).offset for name in offsets} == offsets
    assert Blk._layout.size == 60


def test_a_disk_has_the_size_of_its_storage(image: Path, tmp_path: Path) -> None:
    assert Blk(image).capacity == 8192
    with image.open("rb") as file:
        disk = Blk(file, read_only=True)
    assert (disk.size, os.pread(disk.fileno(), 3, 0)) == (4 * MIB, image.read_bytes()[:3])
    assert Blk(7 << 40).size == 7 << 40
    (tmp_path / "odd").write_bytes(bytes(10000))
    assert Blk(tmp_path / "odd").size == 19 * 512
    assert Blk(tmp_path / "odd", block_size=4096).size == 8192


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_queues": 0}, "a disk has at least one queue, not 0"),
        ({"block_size": 513}, "a block has a power of two of bytes from 512 on, not 513"),
        ({"block_size": 256}, "a block has a power of two of bytes from 512 on, not 256"),
        (
            {"serial": "a serial number that is long"},
            "a serial number has up to 20 bytes; 'a serial number that is long'",
        ),
        ({"storage": "/dev/null"}, "a disk is a file, a block device, or memory; the storage is none of them"),
    ],
)
def test_an_impossible_disk_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Blk(**{"storage": MIB, **arguments})  # type: ignore[arg-type]


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.img"):
        Blk(tmp_path / "no.img")


def test_a_size_that_is_no_number_of_blocks_is_refused(image: Path) -> None:
    with pytest.raises(ValueError, match="a disk has a multiple of 4096 bytes, not 512"):
        Blk(image, block_size=4096).resize(512)
    assert image.stat().st_size == 4 * MIB


# --- Request by request ----------------------------------------------------------------------------------------------


@pytest.fixture
def ask(serve: Serve, connect: Connect, memory: Memory) -> Callable[..., Ask]:
    """Serve a disk, and return what makes requests to it: type, sector and data, and room for an answer."""

    def start(disk: Blk, accepted: int = -1) -> Ask:
        front: FrontEnd = connect(serve(disk))
        front.negotiate(PROTOCOL_FEATURES | VERSION_1 | EVENT_IDX | disk.features & accepted, REPLY_ACK | MQ | CONFIG)
        front.share(memory)
        ring = Ring(memory, size=64)
        front.start(ring)

        def ask(kind: int, sector: int = 0, data: bytes = b"", room: int = 0) -> tuple[bytes, bytes]:
            chain = ring.add([struct.pack("<IIQ", kind, 0, sector) + data], [room + 1])
            # What nobody writes to is to be seen.
            memory.write(chain.writable[0][0], b"\xaa" * (room + 1))
            front.kick(ring)
            [(_, length)] = ring.wait()
            answer = chain.written(length)
            return answer[:-1], answer[-1:]

        return ask

    return start


def segments(*ranges: tuple[int, int, int]) -> bytes:
    return b"".join(struct.pack("<QII", *one) for one in ranges)


@pytest.mark.parametrize("sectors", [2, 64])
@pytest.mark.parametrize("storage", ["cached", "not cached", "memory"])
def test_data_is_read_and_written_by_sector(ask: Callable[..., Ask], image: Path, storage: str, sectors: int) -> None:
    content, size = image.read_bytes(), sectors * 512
    with contextlib.ExitStack() as stack:
        if storage == "not cached":
            file = stack.enter_context(image.open("rb"))
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        elif storage == "memory":
            memory = stack.enter_context(os.fdopen(os.memfd_create("disk"), "wb", buffering=0))
            memory.write(content)
            image = Path(f"/proc/self/fd/{memory.fileno()}")
        request = ask(Blk(image))
        assert request(blk.Type.IN, 3, room=size) == (content[3 * 512 :][:size], blk.S_OK)
        assert request(blk.Type.OUT, 4, b"x" * size) == (b"", blk.S_OK)
        assert image.read_bytes() == content[: 4 * 512] + b"x" * size + content[4 * 512 + size :]
        assert request(blk.Type.IN, 8191, room=512) == (content[-512:], blk.S_OK)


@pytest.mark.parametrize(
    ("kind", "sector", "data", "room"),
    [
        pytest.param(0, 8192, b"", 512, id="read-behind"),
        pytest.param(0, 8191, b"", 1024, id="read-across-the-end"),
        pytest.param(0, (1 << 64) - 1, b"", 512, id="read-overflow"),
        pytest.param(0, 1 << 55, b"", 512, id="read-overflow-in-bytes"),
        pytest.param(0, 0, b"", 511, id="read-a-part"),
        pytest.param(1, 8192, bytes(512), 0, id="write-behind"),
        pytest.param(1, 8191, bytes(1024), 0, id="write-across-the-end"),
        pytest.param(1, (1 << 64) - 1, bytes(512), 0, id="write-overflow"),
        pytest.param(1, 0, bytes(513), 0, id="write-a-part"),
        pytest.param(11, 0, b"", 0, id="discard-nothing"),
        pytest.param(11, 0, bytes(15), 0, id="discard-a-part-of-a-range"),
        pytest.param(11, 0, segments((0, 8, 0)) * 33, 0, id="discard-too-many"),
        pytest.param(11, 0, segments((0, 8, 0), (8190, 3, 0)), 0, id="discard-across-the-end"),
        pytest.param(11, 0, segments((0, 8, 0), (1 << 63, 8, 0)), 0, id="discard-overflow"),
        pytest.param(11, 0, segments((0, blk.MAX_DISCARD_SECTORS + 1, 0)), 0, id="discard-too-much"),
        pytest.param(13, 0, segments((0, 8, 0), (8190, 3, 1)), 0, id="zero-across-the-end"),
        pytest.param(13, 0, segments((0, blk.MAX_WRITE_ZEROES_SECTORS + 1, 0)), 0, id="zero-too-much"),
        pytest.param(13, 0, bytes(17), 0, id="zero-a-part-of-a-range"),
    ],
)
def test_what_is_not_on_the_disk_is_an_error(
    ask: Callable[..., Ask], image: Path, kind: int, sector: int, data: bytes, room: int
) -> None:
    content, taken = image.read_bytes(), used(image)
    request = ask(Blk(image))
    assert request(kind, sector, data, room)[1] == blk.S_IOERR
    assert (image.read_bytes(), used(image)) == (content, taken)
    assert request(blk.Type.IN, 0, room=512) == (content[:512], blk.S_OK)


def test_a_flood_of_requests_that_fail_does_not_fill_the_log(
    ask: Callable[..., Ask], caplog: pytest.LogCaptureFixture
) -> None:
    request = ask(Blk(1 << 20))
    before = time.monotonic()
    for _ in range(200):
        assert request(blk.Type.IN, 1 << 40, room=512)[1] == blk.S_IOERR
    seconds = time.monotonic() - before
    assert 20 <= caplog.text.count("request of type 0 at sector 1099511627776") <= 21 + seconds


@pytest.mark.parametrize(("kind", "most"), [(11, blk.MAX_DISCARD_SECTORS), (13, blk.MAX_WRITE_ZEROES_SECTORS)])
def test_a_range_that_is_too_long_is_an_error(ask: Callable[..., Ask], kind: int, most: int) -> None:
    request = ask(Blk(8 << 30))
    assert request(kind, 0, segments((7, most, 0), (8, most + 1, 0)))[1] == blk.S_IOERR
    assert request(kind, 0, segments((7, most, 1 if kind == blk.Type.WRITE_ZEROES else 0)))[1] == blk.S_OK


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        pytest.param(2, bytes(512), id="scsi"),
        pytest.param(14, segments((0, 8, 0)), id="secure-erase"),
        pytest.param(16, b"", id="zone-report"),
        pytest.param(0xFFFFFFFF, b"", id="unknown"),
        pytest.param(11, segments((0, 8, 0), (8, 8, 1)), id="discard-and-unmap"),
        pytest.param(11, segments((0, 8, 0), (8, 8, 1 << 31)), id="discard-unknown-flag"),
        pytest.param(13, segments((0, 8, 1), (8, 8, 2)), id="zero-unknown-flag"),
    ],
)
def test_what_there_is_not_is_unsupported(ask: Callable[..., Ask], image: Path, kind: int, data: bytes) -> None:
    content, taken = image.read_bytes(), used(image)
    assert ask(Blk(image))(kind, 0, data, 512)[1] == blk.S_UNSUPP
    assert (image.read_bytes(), used(image)) == (content, taken)


def test_a_discarded_range_takes_no_space(ask: Callable[..., Ask], image: Path) -> None:
    before = used(image)
    assert ask(Blk(image))(blk.Type.DISCARD, 0, segments((0, 2048, 0), (4096, 2048, 0), (8192, 0, 0))) == (
        b"",
        blk.S_OK,
    )
    assert used(image) <= before - 2 * MIB
    assert image.stat().st_size == 4 * MIB


@pytest.mark.parametrize("unmap", [False, True])
def test_zeroes_free_space_if_they_may(ask: Callable[..., Ask], image: Path, unmap: bool) -> None:
    before, content = used(image), image.read_bytes()
    assert ask(Blk(image))(blk.Type.WRITE_ZEROES, 0, segments((2, 2048, unmap))) == (b"", blk.S_OK)
    assert image.read_bytes() == content[:1024] + bytes(MIB) + content[1024 + MIB :]
    assert (used(image) < before) == unmap


@pytest.mark.parametrize("unmap", [False, True])
def test_memory_is_zeroed_as_a_file_is(ask: Callable[..., Ask], unmap: bool) -> None:
    """Without unmap by writing: memory has no other way."""
    disk = Blk(4 * MIB)
    os.pwrite(disk.fileno(), b"x" * 4 * MIB, 0)
    assert ask(disk)(blk.Type.WRITE_ZEROES, 0, segments((1, 4097, unmap))) == (b"", blk.S_OK)
    assert os.pread(disk.fileno(), 4 * MIB, 0) == b"x" * 512 + bytes(4097 * 512) + b"x" * (4 * MIB - 4098 * 512)
    assert (os.fstat(disk.fileno()).st_blocks * 512 == 4 * MIB) == (not unmap)


def test_a_disk_without_holes_ignores_a_discard_and_writes_zeroes(
    ask: Callable[..., Ask], image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_holes(fd: int, mode: int, offset: int, count: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no holes")

    monkeypatch.setattr(blk, "_fallocate", no_holes)
    request, content = ask(Blk(image)), image.read_bytes()
    assert request(blk.Type.DISCARD, 0, segments((0, 8, 0))) == (b"", blk.S_OK)
    assert image.read_bytes() == content
    assert request(blk.Type.WRITE_ZEROES, 0, segments((1, 4099, 1))) == (b"", blk.S_OK)
    assert image.read_bytes() == content[:512] + bytes(4099 * 512) + content[4100 * 512 :]


def test_a_read_only_disk_refuses_changes(ask: Callable[..., Ask], image: Path) -> None:
    with image.open("r+b") as file:
        request, content = ask(Blk(file, read_only=True)), image.read_bytes()
    assert request(blk.Type.OUT, 0, bytes(512))[1] == blk.S_IOERR
    assert request(blk.Type.DISCARD, 0, segments((0, 8, 0)))[1] == blk.S_IOERR
    assert request(blk.Type.WRITE_ZEROES, 0, segments((0, 8, 0)))[1] == blk.S_IOERR
    assert request(blk.Type.FLUSH) == (b"", blk.S_OK)
    assert request(blk.Type.IN, 0, room=512) == (content[:512], blk.S_OK)
    assert image.read_bytes() == content


def test_a_flush_reaches_the_storage(ask: Callable[..., Ask], image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    disk = Blk(image)
    assert ask(disk)(blk.Type.FLUSH) == (b"", blk.S_OK)
    assert flushed == [disk.fileno()]


@pytest.mark.parametrize("serial", ["", "S-1", "exactly-20-bytes-lon"])
def test_the_id_is_the_serial_number(ask: Callable[..., Ask], serial: str) -> None:
    assert ask(Blk(MIB, serial=serial))(blk.Type.GET_ID, room=20) == (serial.encode().ljust(20, b"\0"), blk.S_OK)


def test_the_end_of_a_file_that_became_shorter_reads_as_zeroes(ask: Callable[..., Ask], image: Path) -> None:
    request, content = ask(Blk(image)), image.read_bytes()
    os.truncate(image, 700)
    assert request(blk.Type.IN, 1, room=1024) == (content[512:700] + bytes(836), blk.S_OK)
    assert request(blk.Type.IN, 100, room=512) == (bytes(512), blk.S_OK)


class Cached(Blk):
    flushes = 0

    def flush(self) -> None:
        super().flush()
        self.flushes += 1


@pytest.mark.parametrize(
    ("accepted", "wce", "flushes"),
    [
        pytest.param(blk.F_FLUSH, 1, 0, id="the driver flushes"),
        pytest.param(0, 1, 2, id="the driver cannot flush"),
        pytest.param(blk.F_FLUSH | blk.F_CONFIG_WCE, 1, 0, id="the driver chose a cache"),
        pytest.param(blk.F_FLUSH | blk.F_CONFIG_WCE, 0, 2, id="the driver chose none"),
    ],
)
def test_a_write_is_safe_unless_the_driver_knows_of_the_cache(
    ask: Callable[..., Ask], accepted: int, wce: int, flushes: int
) -> None:
    disk = Cached(MIB)
    disk.wce = wce
    request = ask(disk, accepted)
    request(blk.Type.OUT, 0, bytes(512))
    request(blk.Type.WRITE_ZEROES, 0, segments((0, 8, 0)))
    assert disk.flushes == flushes
    request(blk.Type.FLUSH)
    assert disk.flushes == flushes + 1


def test_a_disk_that_changes_between_two_requests_is_what_it_is_then(
    ask: Callable[..., Ask], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, "no more")

    disk = Cached(MIB)
    request = ask(disk)

    def outcomes() -> tuple[bytes, bytes, bytes, int]:
        """Of reads of the first and of the third MiB, of a write, and how often that was flushed."""
        before, ends = disk.flushes, (0, 2 * MIB // 512)
        first, third = (request(blk.Type.IN, sector, room=512)[1] for sector in ends)
        return first, third, request(blk.Type.OUT, 0, bytes(512))[1], disk.flushes - before

    assert outcomes() == (blk.S_OK, blk.S_IOERR, blk.S_OK, 0)
    disk.resize(4 * MIB)
    assert outcomes() == (blk.S_OK, blk.S_OK, blk.S_OK, 0)
    disk.wce = 0
    assert outcomes() == (blk.S_OK, blk.S_OK, blk.S_OK, 1)
    disk.read_only = True
    assert outcomes() == (blk.S_OK, blk.S_OK, blk.S_IOERR, 0)
    monkeypatch.setattr(disk, "read", fail)
    assert outcomes() == (blk.S_IOERR, blk.S_IOERR, blk.S_IOERR, 0)
    monkeypatch.undo()
    assert outcomes() == (blk.S_OK, blk.S_OK, blk.S_IOERR, 0)
    monkeypatch.setattr(Blk, "read", fail)
    assert outcomes() == (blk.S_IOERR, blk.S_IOERR, blk.S_IOERR, 0)


def test_a_subclass_that_forgets_data_gives_none_of_the_drivers_memory_for_it(ask: Callable[..., Ask]) -> None:
    class Forgetful(Blk):
        def read(self, request: vu.Request, offset: int, count: int) -> None:
            request.write(bytes(count - 1))

    assert ask(Forgetful(MIB))(blk.Type.IN, 0, room=512)[1] == blk.S_IOERR


@pytest.mark.parametrize(
    ("kind", "arguments", "status"),
    [
        (OSError, (errno.EOPNOTSUPP, "no"), blk.S_UNSUPP),
        (OSError, (errno.ENOSPC, "full"), blk.S_IOERR),
        (ZeroDivisionError, (), blk.S_IOERR),
    ],
)
def test_an_exception_is_a_status(
    ask: Callable[..., Ask], kind: type[Exception], arguments: tuple[object, ...], status: bytes
) -> None:
    class Broken(Blk):
        def flush(self) -> None:
            raise kind(*arguments)

    request = ask(Broken(MIB))
    assert request(blk.Type.FLUSH)[1] == status
    assert request(blk.Type.IN, 0, room=512) == (bytes(512), blk.S_OK)


# --- In a guest ------------------------------------------------------------------------------------------------------

FILE_SYSTEM = """
mkfs.ext4 -q /dev/vda
mkdir -p /run/disk
mount /dev/vda /run/disk
cp -r {0} /run/disk/copy
(cd /run/disk/copy; find . -type f | sort | xargs sha256sum) > /run/before
umount /run/disk
e2fsck -fn /dev/vda
mount -o ro /dev/vda /run/disk
(cd /run/disk/copy; find . -type f | sort | xargs sha256sum) > /run/after
cmp /run/before /run/after
umount /run/disk
wc -l < /run/after
"""

#: Many threads, each of which writes its own blocks past the cache, in another order, and reads them back.
DIRECT = """
import hashlib, mmap, os, random, threading
disk = os.open("/dev/vda", os.O_RDWR | os.O_DIRECT)
THREADS, BLOCKS, SIZE = 8, 64, 16384
failed = []
def work(thread):
    block = mmap.mmap(-1, SIZE)
    places = [(number * THREADS + thread) * SIZE for number in range(BLOCKS)]
    random.Random(thread).shuffle(places)
    content = lambda place: hashlib.sha256(place.to_bytes(8, "big")).digest() * (SIZE // 32)
    for place in places:
        block[:] = content(place)
        assert os.pwritev(disk, [block], place) == SIZE
    for place in reversed(places):
        assert os.preadv(disk, [block], place) == SIZE
        if block[:] != content(place):
            failed.append(place)
threads = [threading.Thread(target=work, args=[number]) for number in range(THREADS)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(failed)
"""


@pytest.mark.parametrize("num_queues", [1, 8])
def test_a_file_system_is_made_written_and_verified(boot: Boot, tmp_path: Path, num_queues: int) -> None:
    image = tmp_path / "ext4.img"
    with image.open("wb") as file:
        file.truncate(512 * MIB)
    guest = boot(Blk(image, num_queues=num_queues))
    assert int(guest.run(FILE_SYSTEM.format(Path(encodings.__file__).parent), timeout=60).text.splitlines()[-1]) > 100
    # The host agrees that it is one.
    assert subprocess.run(["e2fsck", "-fn", image], capture_output=True, check=False).returncode == 0


def test_direct_access_is_verified(boot: Boot, tmp_path: Path) -> None:
    disk = Blk(64 * MIB, num_queues=8)
    guest = boot(disk)
    assert guest.run(f"{sys.executable} -c '{DIRECT}'").text == "[]"
    block = hashlib.sha256((16384).to_bytes(8, "big")).digest()
    assert os.pread(disk.fileno(), 32, 16384) == block


def test_large_requests_are_split_as_the_disk_asks(boot: Boot) -> None:
    class Watched(Blk):
        longest = 0

        def read(self, request: vu.Request, offset: int, count: int) -> None:
            self.longest = max(self.longest, count)
            super().read(request, offset, count)

    disk = Watched(16 * MIB)
    guest = boot(disk)
    assert guest.run("cat /sys/block/vda/queue/max_segments").text == str(blk.MAX_SEGMENTS)
    guest.run("dd if=/dev/vda of=/dev/null bs=8M iflag=direct")
    assert disk.longest > 128 << 10


def test_blkdiscard_makes_holes(boot: Boot, image: Path) -> None:
    content, before = image.read_bytes(), used(image)
    guest = boot(Blk(image))
    guest.run("blkdiscard -o 1M -l 2M /dev/vda")
    assert used(image) <= before - 2 * MIB
    assert image.read_bytes() == content[:MIB] + bytes(2 * MIB) + content[3 * MIB :]


def test_blkdiscard_writes_zeroes(boot: Boot, image: Path) -> None:
    content, before = image.read_bytes(), used(image)
    guest = boot(Blk(image))
    guest.run("blkdiscard --zeroout -o 1M -l 1M /dev/vda; fallocate --punch-hole -o 2M -l 1M /dev/vda")
    assert image.read_bytes() == content[:MIB] + bytes(2 * MIB) + content[3 * MIB :]
    # The first keeps its space, the second gives it back.
    assert before - 2 * MIB < used(image) <= before - MIB


def test_a_read_only_disk_refuses_writes(boot: Boot, image: Path) -> None:
    content = image.read_bytes()
    guest = boot(Blk(image, read_only=True))
    assert guest.run("cat /sys/block/vda/ro").text == "1"
    refused = guest.run("dd if=/dev/zero of=/dev/vda count=1", check=False)
    assert b"Operation not permitted" in refused.stderr
    assert guest.run("sha256sum < /dev/vda").text.split()[0] == hashlib.sha256(content).hexdigest()
    assert image.read_bytes() == content


def test_the_guest_sees_what_the_disk_is_like(boot: Boot) -> None:
    guest = boot(Blk(16 * MIB, serial="S-0123456789", block_size=4096))
    assert guest.run("cat /sys/block/vda/serial").text == "S-0123456789"
    queue = guest.run("cd /sys/block/vda/queue; cat logical_block_size discard_granularity write_cache").text
    assert queue.split("\n") == ["4096", "4096", "write back"]


def test_the_guest_chooses_the_cache(boot: Boot) -> None:
    disk = Cached(MIB)
    guest = boot(disk)
    guest.run("dd if=/dev/zero of=/dev/vda bs=4k count=4 oflag=direct")
    assert disk.flushes == 0
    guest.run("echo 'write through' > /sys/block/vda/cache_type")
    assert disk.wce == 0
    assert guest.run("cat /sys/block/vda/queue/write_cache").text == "write through"
    safe = disk.flushes
    assert safe == 1
    guest.run("dd if=/dev/zero of=/dev/vda bs=4k count=4 oflag=direct")
    assert disk.flushes == safe + 4


SIZE_BECOMES = (
    "for _ in $(seq 500); do test $(cat /sys/block/vda/size) = {0} && break; sleep 0.01; done; cat /sys/block/vda/size"
)


def test_a_running_guest_sees_a_new_size(boot: Boot, image: Path) -> None:
    disk = Blk(image)
    guest = boot(disk)
    disk.resize(8 * MIB)
    assert guest.run(SIZE_BECOMES.format(16384)).text == "16384"
    guest.run("dd if=/dev/vda of=/dev/vda bs=1M count=4 seek=4 oflag=direct")
    assert image.read_bytes()[4 * MIB :] == image.read_bytes()[: 4 * MIB]
    os.truncate(image, 2 * MIB)
    disk.resize()
    assert guest.run(SIZE_BECOMES.format(4096)).text == "4096"


def test_a_disk_is_resized_while_it_works(boot: Boot) -> None:
    disk = Blk(16 * MIB)
    guest = boot(disk)
    stop = threading.Event()

    def resize() -> None:
        while not stop.wait(0.01):
            disk.resize(disk.size + MIB)

    resizer = threading.Thread(target=resize)
    resizer.start()
    try:
        assert guest.run(f"{sys.executable} -c '{DIRECT}'").text == "[]"
    finally:
        stop.set()
        resizer.join()
    disk.resize(1024 * MIB)
    assert guest.run(SIZE_BECOMES.format(2 * MIB)).text == str(2 * MIB)


def test_a_faulty_disk_fails_and_goes_on(boot: Boot, example: Example) -> None:
    disk = example("faulty_disk.py")["FaultyDisk"](MIB)
    os.pwrite(disk.fileno(), b"x" * MIB, 0)
    guest = boot(disk)
    read = "dd if=/dev/vda of=/dev/null bs=4k count=1 skip=$number iflag=direct"
    tell = "{ grep -q 'Input/output error' error && echo $number; }"
    seen = guest.run(f"for number in $(seq 0 29); do {read} 2> error || {tell}; done").text
    failed = [int(number) for number in seen.split()]
    assert len(failed) == 3
    assert [later - earlier for earlier, later in itertools.pairwise(failed)] == [10, 10]


def test_the_driver_can_be_unbound_and_bound_again(boot: Boot, image: Path) -> None:
    digest = hashlib.sha256(image.read_bytes()).hexdigest()
    guest = boot(Blk(image, num_queues=4))
    for _ in range(3):
        guest.run("echo virtio0 > /sys/bus/virtio/drivers/virtio_blk/unbind; ! test -e /dev/vda")
        guest.run("echo virtio0 > /sys/bus/virtio/drivers/virtio_blk/bind")
        assert guest.run("sha256sum < /dev/vda").text.split()[0] == digest


def test_two_devices_serve_one_guest(boot: Boot, image: Path) -> None:
    guest = boot(Blk(image, serial="first"), Blk(MIB, serial="second"))
    assert guest.run("cat /sys/block/vda/serial; echo; cat /sys/block/vdb/serial").text.split() == ["first", "second"]
    guest.run("dd if=/dev/vda of=/dev/vdb bs=64k count=16 oflag=direct")
    assert guest.run("sha256sum < /dev/vdb").text.split()[0] == hashlib.sha256(image.read_bytes()[:MIB]).hexdigest()


def test_two_guests_have_a_disk_each(boot: Boot) -> None:
    disks = Blk(16 * MIB), Blk(16 * MIB)
    guests = [boot(disk) for disk in disks]
    copies = [
        threading.Thread(target=guest.run, args=[f"yes {number} | dd of=/dev/vda bs=1M count=16 iflag=fullblock"])
        for number, guest in enumerate(guests)
    ]
    for copy in copies:
        copy.start()
    for copy in copies:
        copy.join()
    for number, (guest, disk) in enumerate(zip(guests, disks, strict=True)):
        guest.stop()
        assert os.pread(disk.fileno(), 16 * MIB, 0) == f"{number}\n".encode() * (8 * MIB)


#: Each processor writes a file, and the next one compares it with what it should be.
EIGHT = """
mount -t ext4 /dev/vda /mnt
on() { processor=$1; shift; taskset $(printf %x $((1 << processor))) "$@"; }
for number in 0 1 2 3 4 5 6 7; do
    yes $number | on $number dd of=/mnt/$number bs=64k count=4 iflag=fullblock oflag=direct conv=fsync &
done
wait
for number in 0 1 2 3 4 5 6 7; do
    on $(((number + 1) % 8)) dd if=/mnt/$number of=copy bs=64k iflag=direct
    yes $number | head -c 262144 | cmp - copy || exit 1
done
umount /mnt
"""


def test_eight_processors_use_eight_queues(serve: Serve, tmp_path: Path) -> None:
    """In QEMU: User-Mode Linux has one processor, and Linux makes no more queues than those."""
    image = tmp_path / "ext4.img"
    subprocess.run(["mkfs.ext4", "-q", image, "64M"], check=True)
    disk = Blk(image, num_queues=8)
    with Qemu([(serve(disk), vu.DeviceId.BLOCK, "num-queues=8")], cpus=8) as guest:
        guest.run(EIGHT, timeout=240)
        assert all(queue.statistics.requests >= 8 for queue in disk.requestqs)
    assert subprocess.run(["e2fsck", "-fn", image], capture_output=True, check=False).returncode == 0


def test_the_example_runs(program: Program) -> None:
    path, _ = program("blk.py")
    with Uml([(path, vu.DeviceId.BLOCK)]) as guest:
        assert guest.run("cat /sys/block/vda/size /sys/block/vda/serial").text.split() == [
            str(64 * MIB // 512),
            "memory",
        ]
