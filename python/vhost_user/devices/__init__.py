"""Devices that are ready to be served, and written to be read and derived from.

`Rng` feeds /dev/hwrng, `Blk` is a disk, `Console` a terminal (`PtyConsole`, `SocketConsole` and `StreamConsole` say for
whom), and `i2c.Adapter` a bus for targets that are Python classes, such as the `Tmp102` temperature sensor.
"""

from . import i2c
from .blk import Blk
from .console import Console, PtyConsole, SocketConsole, StreamConsole
from .rng import Rng
from .tmp102 import Tmp102

__all__ = ["Blk", "Console", "PtyConsole", "Rng", "SocketConsole", "StreamConsole", "Tmp102", "i2c"]
