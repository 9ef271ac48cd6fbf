"""Test a device without a virtual machine: a driver in the same process, over a real socket and real shared memory.

    def test_adder() -> None:
        with testing.connect(Adder()) as driver:
            assert driver.queues[0].request(struct.pack("<II", 2, 3), 8) == struct.pack("<Q", 5)

| module | owns |
|---|---|
| `connection` | `connect`: a device and its driver, and what has to be in order afterwards |
| `drivers` | a typed driver for each device that the package has |
| `hostile` | what no good driver would send |
| `plugin` | the pytest fixture `connect_device` |
"""

from .connection import Leftovers, connect
from .drivers import BlkDriver, ConsoleDriver, Driver, I2cDriver, RequestFailed, RngDriver
from .hostile import RawQueue, message, send

__all__ = [
    "BlkDriver",
    "ConsoleDriver",
    "Driver",
    "I2cDriver",
    "Leftovers",
    "RawQueue",
    "RequestFailed",
    "RngDriver",
    "connect",
    "message",
    "send",
]
