"""The configuration space of a device, declared field by field.

    class Rotor(vu.Device, device_id=200):
        speed = vu.config.u32(writable=True)
        serial = vu.config.raw(8, default=b"A-000001")

        @speed.on_write
        def _faster(self, old: int, new: int) -> None: ...

Fields follow each other in the order of their declaration, without gaps, in little-endian byte order; `offset` places
one elsewhere. Assigning to a field changes what the driver reads and notifies it. Virtio 1.3, section 2.5.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from .errors import DeclarationError

if TYPE_CHECKING:
    from .device import Device

T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., object])

#: The most bytes that a configuration space may have: what one message can carry.
MAX_SIZE = 4084


class Field(Generic[T]):
    """One field of a configuration space: read and assigned like an attribute of the device."""

    name: str
    offset: int

    def __init__(
        self,
        size: int,
        default: T,
        encode: Callable[[T], bytes],
        decode: Callable[[bytes], T],
        writable: bool,
        offset: int | None,
    ) -> None:
        self.size = size
        self.default = default
        self.writable = writable
        self.wanted_offset = offset
        self._encode = encode
        self._decode = decode

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, device: None, owner: type) -> Field[T]: ...

    @overload
    def __get__(self, device: Device, owner: type) -> T: ...

    def __get__(self, device: Device | None, owner: type) -> Field[T] | T:
        if device is None:
            return self
        return self.decode(device._runtime.config.read(self.offset, self.size))

    def __set__(self, device: Device, value: T) -> None:
        device._runtime.config.write(self.offset, self.encode(value))

    def encode(self, value: T) -> bytes:
        """The field's bytes for `value`.

        Raises:
            ValueError: the value does not fit in the field.
        """
        try:
            return self._encode(value)
        except (struct.error, OverflowError, TypeError) as error:
            raise ValueError(f"{self.name}: {value!r} does not fit in {self.size} bytes ({error})") from None

    def decode(self, data: bytes) -> T:
        """The value for the field's bytes."""
        return self._decode(data)

    def on_write(self, method: Method) -> Method:
        """Call `method(self, old, new)` when a driver has written to the field. One method may do for several."""
        earlier = getattr(method, "__vhost_user_fields__", ())
        method.__vhost_user_fields__ = (*earlier, self)  # type: ignore[attr-defined]
        return method

    def __repr__(self) -> str:
        return f"<config field {getattr(self, 'name', '?')}: {self.size} bytes>"


def u8(default: int = 0, *, writable: bool = False, offset: int | None = None) -> Field[int]:
    """An unsigned 8-bit field."""
    return _integer("<B", default, writable, offset)


def u16(default: int = 0, *, writable: bool = False, offset: int | None = None) -> Field[int]:
    """An unsigned 16-bit field."""
    return _integer("<H", default, writable, offset)


def u32(default: int = 0, *, writable: bool = False, offset: int | None = None) -> Field[int]:
    """An unsigned 32-bit field."""
    return _integer("<I", default, writable, offset)


def u64(default: int = 0, *, writable: bool = False, offset: int | None = None) -> Field[int]:
    """An unsigned 64-bit field."""
    return _integer("<Q", default, writable, offset)


def raw(size: int, default: bytes = b"", *, writable: bool = False, offset: int | None = None) -> Field[bytes]:
    """A field of `size` bytes. Shorter values are padded with zeroes; longer ones are refused."""

    def encode(value: bytes) -> bytes:
        if len(value) > size:
            raise OverflowError(f"{len(value)} bytes")
        return bytes(value).ljust(size, b"\0")

    return Field(size, default, encode, bytes, writable, offset)


def _integer(layout: str, default: int, writable: bool, offset: int | None) -> Field[int]:
    form = struct.Struct(layout)
    return Field(form.size, default, form.pack, lambda data: int(form.unpack(data)[0]), writable, offset)


class Layout:
    """Where the fields of a device class are."""

    def __init__(self, owner: str, fields: list[Field[Any]]) -> None:
        self.fields = fields
        self.size = 0
        taken: dict[int, Field[Any]] = {}
        for field in fields:
            start = self.size if field.wanted_offset is None else field.wanted_offset
            for at in range(start, start + field.size):
                if at in taken:
                    other = taken[at].name
                    raise DeclarationError(f"{owner}.{field.name}: byte {at} of the space belongs to {other} already")
                taken[at] = field
            field.offset = start
            self.size = max(self.size, start + field.size)
        if self.size > MAX_SIZE:
            raise DeclarationError(f"{owner}: a configuration space has at most {MAX_SIZE} bytes, not {self.size}")

    def initial(self) -> bytearray:
        """The space as it is before anything was assigned."""
        space = bytearray(self.size)
        for field in self.fields:
            space[field.offset : field.offset + field.size] = field.encode(field.default)
        return space

    def touched(self, offset: int, size: int) -> list[Field[Any]]:
        """The fields that have bytes in `offset..offset + size`."""
        return [field for field in self.fields if field.offset < offset + size and offset < field.offset + field.size]
