"""An I2C adapter, and the targets on its bus. Virtio 1.3, section 5.21.

class Tmp102(i2c.Target, address=0x48):
    temperature = i2c.Register(0x00, width=2, read_only=True)

    celsius = 25.0

    @temperature.on_read
    def _sample(self) -> int:
        return int(self.celsius / 0.0625) << 4

i2c.Adapter(Tmp102()).serve("/tmp/i2c.sock")
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeVar, overload

from .._core import Request
from ..device import Device
from ..errors import DeclarationError, RequestError
from ..ids import DeviceId
from ..queues import DeviceQueue, Queue

Reader = TypeVar("Reader", bound=Callable[[Any], int])
Writer = TypeVar("Writer", bound=Callable[[Any, int, int], None])

F_ZERO_LENGTH_REQUEST = 1 << 0

#: In front of every message: the address, shifted left by one, and flags.
HEADER = struct.Struct("<HxxI")
FAIL_NEXT = 1 << 0
M_RD = 1 << 1

#: Bytes in a message: Linux counts them in 16 bits. Whoever emulates a chip goes through them one by one.
MAX_MESSAGE = 0xFFFF

OK = b"\0"
ERR = b"\1"

logger = logging.getLogger(__name__)


class Nack(Exception):
    """A target does not acknowledge: the transfer ends, and the driver is told that it failed."""


class Target:
    """A chip on the bus: by default a set of registers, which are declared in the class.

    The first byte of a write chooses a register; what follows is written to it, and a read comes from it. After the
    last byte of a register comes the first of the register at the next address, or of the same one if `auto_increment`
    is off. Choosing or writing a register that is not there is not acknowledged, nor is writing one that is read-only
    or a part of one; reading beyond the last register gives 0xff, as a bus that nobody drives does.

    A chip that works otherwise overrides :meth:`write` and :meth:`read`. Both are called on the thread that serves the
    adapter and may raise :exc:`Nack`.
    """

    #: The 7-bit address. An instance may assign another one before it is attached.
    address: int

    #: Whether the register address moves on, as in most chips.
    auto_increment: bool = True

    _registers: ClassVar[dict[int, Register]] = {}
    _readers: ClassVar[dict[Register, str]] = {}
    _writers: ClassVar[dict[Register, str]] = {}
    _chosen = 0

    def __init_subclass__(cls, *, address: int | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if address is not None:
            cls.address = _checked_address(cls.__name__, address)
        members = {name: member for base in reversed(cls.__mro__) for name, member in vars(base).items()}
        cls._registers = {}
        for register in members.values():
            if isinstance(register, Register):
                other = cls._registers.setdefault(register.address, register)
                if other is not register:
                    raise DeclarationError(
                        f"{cls.__name__}: {register.name} and {other.name} are both at {register.address:#04x}"
                    )
        cls._readers = {m.__i2c_reads__: name for name, m in members.items() if hasattr(m, "__i2c_reads__")}
        cls._writers = {m.__i2c_writes__: name for name, m in members.items() if hasattr(m, "__i2c_writes__")}

    def write(self, data: bytes) -> None:
        """The driver wrote `data`: nothing, when it only looks whether there is a chip."""
        if not data:
            return
        self._choose(data[0])
        at = 1
        while at < len(data):
            register = self._choose(self._chosen)
            if register.read_only:
                raise Nack(f"{register.name} is read-only")
            value = data[at : at + register.width]
            if len(value) < register.width:
                raise Nack(f"{register.name} has {register.width} bytes, not {len(value)}")
            register.write_from_bus(self, value)
            self._chosen += self.auto_increment
            at += register.width

    def read(self, count: int) -> bytes:
        """The driver reads `count` bytes: as many have to be returned."""
        data = bytearray()
        while len(data) < count:
            register = self._registers.get(self._chosen)
            data += register.encode(register.__get__(self, type(self))) if register else b"\xff"
            self._chosen += self.auto_increment
        return bytes(data[:count])

    def stop(self) -> None:
        """The transfer, of one message or of several, has ended."""

    def _choose(self, address: int) -> Register:
        if address not in self._registers:
            raise Nack(f"there is no register {address:#04x}")
        self._chosen = address
        return self._registers[address]


class Register:
    """A register of a :class:`Target`: read and assigned as an attribute that is an unsigned integer.

    `address` is what the driver calls it, `width` its size in bytes, `reset` its value at first. A driver can write to
    it unless it is `read_only`; Python always can. A negative value is stored as its two's complement.

    Chips send the most significant byte first; SMBus, and with it i2cget and i2cset, the other way round. Linux drivers
    that use regmap follow the chip, and those that use SMBus words swap them.
    """

    name: str

    def __init__(
        self,
        address: int,
        width: int = 1,
        *,
        reset: int = 0,
        read_only: bool = False,
        byteorder: Literal["big", "little"] = "big",
    ) -> None:
        if not 0 <= address <= 0xFF:
            raise DeclarationError(f"the address of a register is a byte, not {address:#x}")
        if width < 1:
            raise DeclarationError(f"a register cannot have {width} bytes")
        self.address = address
        self.width = width
        self.reset = reset
        self.read_only = read_only
        self.byteorder = byteorder

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        self.reset = self._checked(self.reset)

    @overload
    def __get__(self, target: None, owner: type) -> Register: ...

    @overload
    def __get__(self, target: Target, owner: type) -> int: ...

    def __get__(self, target: Target | None, owner: type) -> Register | int:
        if target is None:
            return self
        reader = target._readers.get(self)
        if reader is not None:
            return self._checked(getattr(target, reader)())
        # A target need not call an __init__ of ours: the value is in its dictionary, or not yet.
        value: int = vars(target).get(self.name, self.reset)
        return value

    def __set__(self, target: Target, value: int) -> None:
        vars(target)[self.name] = self._checked(value)

    def on_read(self, method: Reader) -> Reader:
        """The value of the register is what `method(self)` returns."""
        method.__i2c_reads__ = self  # type: ignore[attr-defined]
        return method

    def on_write(self, method: Writer) -> Writer:
        """Call `method(self, old, new)` when a driver has written to the register."""
        method.__i2c_writes__ = self  # type: ignore[attr-defined]
        return method

    def encode(self, value: int) -> bytes:
        """What is on the bus for `value`."""
        return value.to_bytes(self.width, self.byteorder)

    def write_from_bus(self, target: Target, data: bytes) -> None:
        """The driver wrote `data`, which is as long as the register."""
        old = self.__get__(target, type(target))
        new = int.from_bytes(data, self.byteorder)
        self.__set__(target, new)
        writer = target._writers.get(self)
        if writer is not None:
            getattr(target, writer)(old, new)

    def _checked(self, value: int) -> int:
        bits = 8 * self.width
        if not -(1 << (bits - 1)) <= value < 1 << bits:
            raise ValueError(f"{self.name}: {value:#x} does not fit in {bits} bits")
        return value & ((1 << bits) - 1)


class Adapter(Device, device_id=DeviceId.I2C_ADAPTER):
    """The bus. Targets may come and go while it is served, from any thread."""

    features = F_ZERO_LENGTH_REQUEST

    # Linux 7.2 waits for no message of a transfer beyond the first that failed, and frees them all: those that come
    # with it have to be done at the same time.
    batch_patience = 60.0

    requestq = Queue()

    def __init__(self, *targets: Target) -> None:
        self._targets: dict[int, Target] = {}
        self._failed = False
        self._addressed: list[Target] = []
        for target in targets:
            self.attach(target)

    def attach(self, target: Target) -> None:
        """Put `target` on the bus.

        Raises:
            ValueError: another target has its address.
        """
        address = _checked_address(type(target).__name__, target.address)
        other = self._targets.setdefault(address, target)
        if other is not target:
            raise ValueError(f"{address:#04x} is the address of {other!r} already; give {target!r} another one")

    def detach(self, target: Target) -> None:
        """Take `target` off the bus: nobody answers at its address from now on.

        Raises:
            ValueError: it is not on the bus.
        """
        if self._targets.get(target.address) is not target:
            raise ValueError(f"{target!r} is not on the bus")
        del self._targets[target.address]

    @requestq.handler
    def transfer(self, request: Request) -> None:
        """One message. FAIL_NEXT ties it to the next one: a transfer of several fails from the first failure on."""
        address, flags = request.unpack(HEADER)
        if not request.writable:
            raise RequestError("the driver left no room for the status")
        failed = True
        try:
            if not self._failed:
                self._message(address, bool(flags & M_RD), request)
                failed = False
        except Nack as reason:
            logger.debug("address %#04x: not acknowledged: %s", address >> 1, reason)
        finally:
            goes_on = bool(flags & FAIL_NEXT)
            self._failed = failed and goes_on
            if not goes_on:
                self._stop()
        request.write_tail(ERR if failed else OK)

    def on_request_error(self, request: Request, error: BaseException) -> None:
        if request.writable:
            request.write_tail(ERR)

    def on_queue_start(self, queue: DeviceQueue) -> None:
        self._failed = False
        self._addressed.clear()

    def _message(self, address: int, reads: bool, request: Request) -> None:
        # Bit 0 belongs to nothing: a driver that sets it means no 7-bit address.
        target = None if address & 1 else self._targets.get(address >> 1)
        if target is None:
            raise Nack("there is no target")
        if target not in self._addressed:
            self._addressed.append(target)
        length, count = request.readable, request.writable - len(OK)
        if max(length, count) > MAX_MESSAGE:
            raise RequestError(
                f"a message of {max(length, count)} bytes is too long: at most {MAX_MESSAGE} pass the bus"
            )
        data = request.read()
        if data if reads else count:
            raise RequestError(f"a message reads or writes, and cannot have {len(data)} bytes and room for {count}")
        if not reads:
            target.write(data)
        else:
            answer = target.read(count)
            if len(answer) != count:
                raise ValueError(f"{target!r}.read({count}) returned {len(answer)} bytes")
            request.write(answer)

    def _stop(self) -> None:
        addressed, self._addressed = self._addressed, []
        for target in addressed:
            target.stop()


def _checked_address(name: str, address: int) -> int:
    if not 0 <= address <= 0x7F:
        raise DeclarationError(f"{name}: an address has 7 bits; {address:#x} does not fit")
    return address
