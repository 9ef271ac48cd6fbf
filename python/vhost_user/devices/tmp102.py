"""A temperature sensor, to which the kernel's own hwmon drivers bind."""

from __future__ import annotations

from . import i2c


class Tmp102(i2c.Target, address=0x48):
    """TI TMP102 (data sheet SBOS397). Assign `celsius`, and the driver reads it. There is no alert pin."""

    temperature = i2c.Register(0x00, width=2, read_only=True)
    configuration = i2c.Register(0x01, width=2, reset=0x60A0)
    low_limit = i2c.Register(0x02, width=2, reset=0x4B00)
    high_limit = i2c.Register(0x03, width=2, reset=0x5000)

    auto_increment = False

    EXTENDED_MODE = 0x0010
    CONSTANT_BITS = 0x6020  # the resolution, and the alert that never comes

    #: What is measured, in °C: from -55 to 128, or to 150 when the driver has chosen the extended mode.
    celsius = 25.0

    @temperature.on_read
    def _sample(self) -> int:
        """Steps of 0.0625 °C, left-aligned: 12 bits of them, or 13 in the extended mode, which bit 0 tells."""
        steps = int(self.celsius / 0.0625)
        if self.configuration & self.EXTENDED_MODE:
            return max(-4096, min(steps, 4095)) << 3 | 1
        return max(-2048, min(steps, 2047)) << 4

    @configuration.on_write
    def _configure(self, old: int, new: int) -> None:
        self.configuration = old & self.CONSTANT_BITS | new & ~self.CONSTANT_BITS
