"""``vhost-user demo``: four devices in this process, and a Linux kernel that uses them.

A `Driver` does the same with the devices whatever it is: a kernel in a guest, or, where there is no guest, a driver in
this process. `STEPS` is what is done, and what is expected to come of it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol

from .. import guest
from ..device import Device
from ..devices import Blk, Console, Rng, Tmp102, i2c
from ..devices import blk as disk
from ..errors import VhostUserError
from ..frontend import Frontend
from ..testing import BlkDriver, ConsoleDriver, I2cDriver, RngDriver
from .command import FAILURE, CommandParser, ended_by_signals

MIB = 1 << 20
ENTROPY = 16
DISK = 16 * MIB
WRITTEN = 4 * MIB

QUESTION = "who is there? "
ANSWER = f"Python {platform.python_version()}"

#: Seconds that a kernel may take for anything.
PATIENCE = 10

#: Exit status after SIGTERM, as a shell has it.
TERMINATED = 143


class Unexpected(Exception):
    """A device did not do what it should. The message says what it did."""


class Devices:
    """The four devices, and where they are served."""

    def __init__(self, folder: Path) -> None:
        self.generated = bytearray()
        self.rng = Rng(self._generate)
        self.image = folder / "disk.img"
        self.image.touch()
        os.truncate(self.image, DISK)
        self.blk = Blk(self.image)
        self.console = Doorkeeper()
        self.sensor = Tmp102()
        self.i2c = i2c.Adapter(self.sensor)
        self.served = {
            folder / "rng.sock": self.rng,
            folder / "blk.sock": self.blk,
            folder / "console.sock": self.console,
            folder / "i2c.sock": self.i2c,
        }

    def _generate(self, count: int) -> bytes:
        data = os.urandom(count)
        self.generated += data
        return data


class Doorkeeper(Console):
    """Answers a question that is asked on the console."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = ""

    def on_output(self, data: bytes) -> None:
        self.heard += data.decode()
        if self.heard.endswith(QUESTION):
            self.write(f"{ANSWER}\n".encode())


class Driver(Protocol):
    """What uses the devices."""

    def introduce(self) -> str:
        """Who it is, and what it found."""

    def entropy(self, count: int) -> bytes:
        """`count` bytes from the entropy source."""

    def fill_disk(self, size: int) -> tuple[str, str]:
        """Write `size` random bytes to the disk and read them back. Returns the SHA-256 of both."""

    def ask(self, question: str) -> str:
        """Ask on the console, greet whoever answers there, and return the answer."""

    def temperature(self) -> float:
        """What the sensor on the I2C bus measures, in °C."""


class GuestDriver:
    """A real kernel in a guest, with its own drivers."""

    def __init__(self, devices: Devices) -> None:
        self._guest = guest.Uml([(path, device.device_id) for path, device in devices.served.items()])

    def __enter__(self) -> GuestDriver:
        self._guest.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._guest.stop()

    def introduce(self) -> str:
        return self._run('echo "Linux $(uname -r) has" $(cd /dev; ls hwrng vda hvc0 i2c-0)').text

    def entropy(self, count: int) -> bytes:
        return self._run(f"head -c {count} /dev/hwrng").stdout

    def fill_disk(self, size: int) -> tuple[str, str]:
        script = f"""
            head -c {size} /dev/urandom >data
            sha256sum <data
            dd if=data of=/dev/vda bs=1M oflag=direct conv=fsync status=none
            dd if=/dev/vda bs=1M iflag=direct,count_bytes count={size} status=none | sha256sum
        """
        written, read = (line.split()[0] for line in self._run(script).text.splitlines())
        return written, read

    def ask(self, question: str) -> str:
        script = f"""
            exec 3<>/dev/hvc0
            stty raw -echo <&3
            printf '{question}' >&3
            read -r name <&3
            echo "hello, $name" >&3
            echo "$name"
        """
        return self._run(script).text

    def temperature(self) -> float:
        script = """
            bus=/sys/bus/i2c/devices/i2c-0
            [ -e $bus/0-0048 ] || echo tmp102 0x48 >$bus/new_device
            # The driver waits for the first conversion.
            until cat /sys/class/hwmon/hwmon0/temp1_input 2>/dev/null; do sleep 0.01; done
        """
        return int(self._run(script).text) / 1000

    def _run(self, script: str) -> guest.Result:
        return self._guest.run(script, timeout=PATIENCE)


class InProcessDriver:
    """The drivers that the package has for tests."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        self._stack = ExitStack()

    def __enter__(self) -> InProcessDriver:
        self._rng = RngDriver(self._connect(self._devices.rng))
        self._blk = BlkDriver(self._connect(self._devices.blk))
        self._console = ConsoleDriver(self._connect(self._devices.console))
        self._i2c = I2cDriver(self._connect(self._devices.i2c))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def introduce(self) -> str:
        return "the driver in this process has connected to the devices"

    def entropy(self, count: int) -> bytes:
        return self._rng.read(count)

    def fill_disk(self, size: int) -> tuple[str, str]:
        written, read = hashlib.sha256(), hashlib.sha256()
        sectors = range(0, size // disk.SECTOR, MIB // disk.SECTOR)
        for sector in sectors:
            data = os.urandom(MIB)
            self._blk.write(sector, data)
            written.update(data)
        for sector in sectors:
            read.update(self._blk.read(sector, MIB))
        return written.hexdigest(), read.hexdigest()

    def ask(self, question: str) -> str:
        self._console.write(question.encode())
        name = self._console.read_line().decode().strip()
        self._console.write(f"hello, {name}\n".encode())
        return name

    def temperature(self) -> float:
        (measured,) = self._i2c.transfer(Tmp102.address, b"\0", 2)
        return int.from_bytes(measured, "big", signed=True) / 16 * 0.0625

    def _connect(self, device: Device) -> Frontend:
        assert device.address is not None
        return self._stack.enter_context(Frontend.connect(device.address)).negotiate()


def rng(driver: Driver, devices: Devices) -> str:
    data = driver.entropy(ENTROPY)
    expect(data in devices.generated and len(data) == ENTROPY, f"{data.hex()} is not what the device generated")
    return f"read {len(data)} bytes of Python's os.urandom: {data.hex(' ', 2)}"


def blk(driver: Driver, devices: Devices) -> str:
    written, read = driver.fill_disk(WRITTEN)
    here = hashlib.sha256(devices.image.read_bytes()[:WRITTEN]).hexdigest()
    expect(written == read == here, f"wrote {written}, read {read}, and the file has {here}")
    return f"wrote {WRITTEN // MIB} MiB and read them back; sha256 {here[:8]}… there, and of the file here"


def console(driver: Driver, devices: Devices) -> str:
    answer = driver.ask(QUESTION)
    expect(answer == ANSWER, f"{ANSWER!r} was typed, and {answer!r} read")
    # It comes after what the kernel had to say.
    heard = devices.console.heard.splitlines()[-1:]
    expect(heard == [f"{QUESTION}hello, {ANSWER}"], f"the console heard {heard}")
    return f'asked "{QUESTION.strip()}", read "{answer}", said "hello, {answer}"'


def temperature(driver: Driver, devices: Devices) -> str:
    for celsius in (21.5, -7.25):
        devices.sensor.celsius = celsius
        measured = driver.temperature()
        expect(measured == celsius, f"sensor.celsius = {celsius} was measured as {measured}")
    return "measured 21.5 °C; then Python assigned sensor.celsius = -7.25, and it measured -7.25 °C"


class Step(NamedTuple):
    """A device, and what is done with it: a function that returns what was seen, or raises `Unexpected`."""

    device: str
    do: Callable[[Driver, Devices], str]


STEPS = [
    Step("rng", rng),
    Step("disk", blk),
    Step("console", console),
    Step("sensor", temperature),
]


def configure(parser: CommandParser) -> None:
    parser.epilog = (
        "The kernel is $VHOST_USER_UML, or the one that 'make guest' built in the project's source. Without one, the\n"
        "devices are driven by the driver that the package has for tests.\n"
    )
    parser.add_argument("--no-guest", action="store_true", help="do not boot a guest, even if there is a kernel")
    parser.set_defaults(action=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    failures = 0
    print("Four devices in this Python process, and what their driver says:", flush=True)
    with ended_by_signals(TERMINATED), ExitStack() as stack:
        devices = Devices(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vhost-user-demo-"))))
        for path, device in devices.served.items():
            stack.enter_context(device.start(path))
        driver = stack.enter_context(_driver(devices, arguments.no_guest))
        _show("start", driver.introduce(), started)
        for step in STEPS:
            begun = time.monotonic()
            try:
                _show(step.device, step.do(driver, devices), begun)
            except (Unexpected, guest.GuestError, VhostUserError) as error:
                failures += 1
                _show(step.device, f"FAILED: {error}", begun)
    if failures:
        print(f"{failures} of {len(STEPS)} devices failed.")
        return FAILURE
    print(f"All as expected, in {time.monotonic() - started:.1f} s.")
    return 0


def _driver(devices: Devices, no_guest: bool) -> AbstractContextManager[Driver]:
    if not no_guest:
        try:
            guest.find_kernel()
            return GuestDriver(devices)
        except guest.GuestNotFound as error:
            print(f"No guest: {error}.\nThe driver in this process takes its place.", flush=True)
    return InProcessDriver(devices)


def _show(what: str, saw: str, since: float) -> None:
    print(f"{(time.monotonic() - since) * 1000:6.0f} ms  {what:8} {saw}", flush=True)


def expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Unexpected(otherwise)
