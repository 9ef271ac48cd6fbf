"""One harmless request for each device type, which every such device has to complete.

Nothing is written to disks, and nothing that matters is changed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from ..features import DeviceType
from ..ids import DeviceId

Judge = Callable[[bytes, int], str]


def _anything(_data: bytes, _length: int) -> str:
    return ""


def _nothing_written(_data: bytes, length: int) -> str:
    return f"{length} bytes are said to be written, but there is nothing to write to" if length else ""


@dataclass(frozen=True)
class Exercise:
    """A request: what the device may read, how much it may write, and what is wrong with what it wrote."""

    queue: int
    readable: list[bytes] = field(default_factory=list)
    writable: list[int] = field(default_factory=list)
    problem: Judge = _anything
    """What is wrong with the room and the length that was said; empty if nothing."""
    fills: bool = False
    """Whether the device writes to all of the room."""
    is_certain: bool = True
    """Whether every device of the type completes it."""


def _blk_read(data: bytes, _length: int) -> str:
    if data[-1]:
        return f"reading sector 0 ended with status {data[-1]}, not 0"
    return ""


def _rng_bytes(_data: bytes, length: int) -> str:
    return "" if length else "no random bytes were written"


def _i2c_read(data: bytes, _length: int) -> str:
    return "" if data[-1] in {0, 1} else f"the status is {data[-1]}, neither 0 nor 1"


_FRAME = bytes(12) + bytes.fromhex("020000000001 020000000002 88b5") + bytes(46)
_VSOCK_RESET = struct.pack("<QQIIIHHIII", 3, 2, 1, 1, 0, 1, 3, 0, 0, 0)
#: A header, and version 7.31 without options.
_FUSE_INIT = struct.pack("=IIQQIIII", 56, 26, 1, 0, 0, 0, 0, 0) + struct.pack("=IIII", 7, 31, 0, 0)

_EXERCISES = {
    DeviceId.NET: Exercise(1, [_FRAME], [], _nothing_written),
    DeviceId.BLOCK: Exercise(0, [struct.pack("<IIQ", 0, 0, 0)], [512, 1], _blk_read, fills=True),
    DeviceId.CONSOLE: Exercise(1, [b"vhost-user check\r\n"], [], _nothing_written),
    # More room than the answer of any version needs.
    DeviceId.FS: Exercise(1, [_FUSE_INIT], [16, 64]),
    DeviceId.MEMORY_BALLOON: Exercise(1, [bytes(4)], [], _nothing_written),
    DeviceId.SPI: Exercise(0, [bytes(32)], [1], is_certain=False),
    DeviceId.RNG: Exercise(0, [], [64], _rng_bytes),
    DeviceId.RTC: Exercise(0, [struct.pack("<H6x", 0x1000)], [16], fills=True),
    DeviceId.INPUT: Exercise(1, [bytes(8)], [], _nothing_written),
    DeviceId.VSOCK: Exercise(1, [_VSOCK_RESET], [], _nothing_written),
    DeviceId.SOUND: Exercise(0, [struct.pack("<IIII", 0x100, 0, 0, 32)], [4], fills=True),
    DeviceId.SCMI: Exercise(0, [struct.pack("<I", 0x10 << 10)], [12]),
    DeviceId.I2C_ADAPTER: Exercise(0, [struct.pack("<HHI", 0x7F << 1, 0, 2)], [1, 1], _i2c_read),
    DeviceId.GPIO: Exercise(0, [struct.pack("<HHI", 2, 0, 0)], [2], fills=True),
}

#: Something to read and some room: whatever the device makes of it, it has to give it back.
_GENERIC = Exercise(0, [bytes(16)], [64], is_certain=False)


def exercise_for(device: DeviceType) -> Exercise:
    """The request for a device type."""
    try:
        return _EXERCISES[DeviceId(device.id)]
    except (ValueError, KeyError):
        return _GENERIC
