"""A driver of virtio devices that has a QEMU without a guest: the machine's ports and memory, by the qtest protocol.

There every device of QEMU can be driven as by a guest, in a moment, and also those for which Debian's kernel has no
driver. Virtio 1.3, section 4.1 (PCI); its rings are split ones with one request at a time.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from vhost_user.guest import Qemu, _execute

#: Seconds for everything that this driver waits for.
PATIENCE = 60.0

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK = 1, 2, 4, 8
VERSION_1, RING_RESET = 1 << 32, 1 << 40
#: The bits of a device type, and those of transport and rings that this driver knows.
KNOWN = (1 << 24) - 1 | VERSION_1 | RING_RESET

_MEMORY = 64
_WINDOWS, _WINDOW = 0xE000_0000, 0x100_0000


class Machine:
    """A QEMU that emulates no processor. `arguments` attach the devices, at the slots of the PCI bus that they name."""

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        self._free = itertools.count(1 << 20, 1 << 16)
        self._windows = itertools.count(_WINDOWS, _WINDOW)
        self._log, self._monitor = folder / "qemu.log", folder / "qemu.monitor"
        ours, theirs = socket.socketpair()
        ours.settimeout(PATIENCE)
        program, *_ = Qemu()._command_line(theirs.fileno(), folder)
        with theirs, open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [
                    program,
                    *("-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35", "-accel", "qtest"),
                    *("-m", f"{_MEMORY}M", "-numa", "node,memdev=memory"),
                    *("-object", f"memory-backend-memfd,id=memory,size={_MEMORY}M,share=on"),
                    *("-chardev", f"socket,id=qtest,fd={theirs.fileno()}", "-qtest", "chardev:qtest"),
                    *("-qtest-log", "/dev/null"),
                    *("-qmp", f"unix:{self._monitor},server=on,wait=off"),
                    *arguments,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
            )
        self._socket = ours
        self._lines: IO[str] = ours.makefile("rw")

    def ask(self, *words: object) -> str:
        """Have a command executed, and return its result."""
        self._lines.write(" ".join(f"{word:#x}" if isinstance(word, int) else str(word) for word in words) + "\n")
        self._lines.flush()
        while True:
            line = self._lines.readline()
            # The lines of interrupts come in between.
            if not line.startswith("IRQ"):
                break
        status, _, result = line.strip().partition(" ")
        assert status == "OK", f"{words}: {line!r}\n{self._log.read_text()}"
        return result

    def read(self, address: int, size: int) -> bytes:
        return bytes.fromhex(self.ask("read", address, size)[2:]) if size else b""

    def write(self, address: int, data: bytes) -> None:
        if data:
            self.ask("write", address, len(data), f"0x{data.hex()}")

    def read_number(self, width: str, address: int) -> int:
        return int(self.ask(f"read{width}", address), 16)

    def write_number(self, width: str, address: int, value: int) -> None:
        self.ask(f"write{width}", address, value)

    def monitor(self, command: str, **arguments: object) -> None:
        """Execute a command of the QEMU Machine Protocol."""
        _execute(self._monitor, command, arguments)

    def screenshot(self, device: str) -> bytes:
        """What the first monitor of a device shows: a picture as of the format PPM."""
        picture = self._log.with_name("picture.ppm")
        self.monitor("screendump", filename=str(picture), device=device)
        return picture.read_bytes()

    def room(self) -> int:
        """The address of 64 KiB of memory that nobody uses."""
        return next(self._free)

    def window(self) -> int:
        """Where the registers of another device may be."""
        return next(self._windows)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # It ends when it has nobody to serve; a device that it waits for would keep it for ever.
        with contextlib.suppress(OSError):
            self._lines.close()
        self._socket.close()
        self._process.terminate()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise


class Pci:
    """The virtio device at a slot of the first bus: set up to DRIVER_OK with all its queues."""

    _COMMON, _NOTIFY, _DEVICE, _SHARED_MEMORY = 1, 2, 4, 8

    def __init__(self, machine: Machine, slot: int, queues: int) -> None:
        self._machine = machine
        self._slot = slot
        windows: dict[int, int] = {}
        self._places: dict[int, int] = {}
        for kind, bar, offset, extra in self._capabilities():
            if bar not in windows:
                windows[bar] = machine.window()
                # All of QEMU's are of 64 bits.
                self._set_config(0x10 + 4 * bar, windows[bar])
                self._set_config(0x14 + 4 * bar, 0)
            self._places[kind] = windows[bar] + offset
            if kind == self._NOTIFY:
                self._multiplier = extra
        self._set_config(0x04, 0x0006)  # it answers there, and reaches memory
        self._set_status(0)
        self._set_status(ACKNOWLEDGE | DRIVER)
        self.features = self._negotiate()
        self._set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
        assert self.status & FEATURES_OK
        self.queues = [self._queue(index) for index in range(queues)]
        self._set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

    @property
    def status(self) -> int:
        return self._machine.read_number("b", self._places[self._COMMON] + 20)

    def reset(self) -> None:
        """Stop everything, as a driver does that goes."""
        self._set_status(0)
        assert self.status == 0

    @property
    def shared_memory(self) -> int:
        """The address of the only shared memory region."""
        return self._places[self._SHARED_MEMORY]

    def config(self, offset: int, size: int) -> bytes:
        """Bytes of the configuration space, one by one."""
        place = self._places[self._DEVICE] + offset
        return bytes(self._machine.read_number("b", place + number) for number in range(size))

    def configure(self, offset: int, value: int) -> None:
        """Write a byte to the configuration space."""
        self._machine.write_number("b", self._places[self._DEVICE] + offset, value)

    def _set_status(self, status: int) -> None:
        self._machine.write_number("b", self._places[self._COMMON] + 20, status)

    def _negotiate(self) -> int:
        common, offered = self._places[self._COMMON], 0
        for half in range(2):
            self._machine.write_number("l", common, half)
            offered |= self._machine.read_number("l", common + 4) << (32 * half)
        features = offered & KNOWN
        assert features & VERSION_1
        for half in range(2):
            self._machine.write_number("l", common + 8, half)
            self._machine.write_number("l", common + 12, features >> (32 * half) & 0xFFFF_FFFF)
        return features

    def _queue(self, index: int) -> Queue:
        machine, common = self._machine, self._places[self._COMMON]
        machine.write_number("w", common + 22, index)
        size = min(machine.read_number("w", common + 24), 64)
        assert size, f"there is no queue {index}"
        machine.write_number("w", common + 24, size)
        ring = machine.room()
        for register, part in ((32, 0), (40, 0x1000), (48, 0x2000)):
            machine.write_number("l", common + register, ring + part)
            machine.write_number("l", common + register + 4, 0)
        notify = self._places[self._NOTIFY] + machine.read_number("w", common + 30) * self._multiplier
        machine.write_number("w", common + 28, 1)
        return Queue(machine, index, size, ring, notify)

    def _capabilities(self) -> Iterator[tuple[int, int, int, int]]:
        """Kind, window and offset of each part of the registers, and the number that follows them."""
        at = self._config(0x34) & 0xFF
        while at:
            head = self._config(at)
            if head & 0xFF == 0x09 and head >> 24 in (self._COMMON, self._NOTIFY, self._DEVICE, self._SHARED_MEMORY):
                yield head >> 24, self._config(at + 4) & 0xFF, self._config(at + 8), self._config(at + 16)
            at = head >> 8 & 0xFF

    def _config(self, register: int) -> int:
        self._machine.ask("outl", 0xCF8, 1 << 31 | self._slot << 11 | register)
        return int(self._machine.ask("inl", 0xCFC), 16)

    def _set_config(self, register: int, value: int) -> None:
        self._machine.ask("outl", 0xCF8, 1 << 31 | self._slot << 11 | register)
        self._machine.ask("outl", 0xCFC, value)


class Queue:
    """A split ring, and buffers behind it."""

    def __init__(self, machine: Machine, index: int, size: int, ring: int, notify: int) -> None:
        self._machine, self._index, self._size, self._ring, self._notify = machine, index, size, ring, notify
        self._submitted = self._done = 0
        self._buffers = machine.room()

    def submit(self, *parts: bytes | int) -> None:
        """Make a request of buffers to be read, and numbers of bytes of buffers to be written; those last."""
        descriptors, at, self._answers = b"", self._buffers, []
        for number, part in enumerate(parts):
            size = part if isinstance(part, int) else len(part)
            self._machine.write(at, bytes(size) if isinstance(part, int) else part)
            flags = (2 if isinstance(part, int) else 0) | (number + 1 < len(parts))
            descriptors += struct.pack("<QIHH", at, size, flags, number + 1)
            if isinstance(part, int):
                self._answers.append((at, size))
            at += size + 15 & ~15
        self._machine.write(self._ring, descriptors)
        self._machine.write(self._ring + 0x1004 + 2 * (self._submitted % self._size), bytes(2))
        self._submitted += 1
        self._machine.write_number("w", self._ring + 0x1002, self._submitted & 0xFFFF)
        self.notify()

    def notify(self) -> None:
        """Tell the device of requests."""
        self._machine.write_number("w", self._notify, self._index)

    def wait(self) -> list[bytes]:
        """The buffers of the request, when it is done."""
        deadline = time.monotonic() + PATIENCE
        while self._machine.read_number("w", self._ring + 0x2002) != self._submitted & 0xFFFF:
            assert time.monotonic() < deadline, f"queue {self._index}: there is no answer"
            time.sleep(0.001)
        return [self._machine.read(*answer) for answer in self._answers]

    def request(self, *parts: bytes | int) -> list[bytes]:
        """Both."""
        self.submit(*parts)
        return self.wait()
