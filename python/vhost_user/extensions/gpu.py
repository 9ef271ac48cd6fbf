"""Devices that draw: what they send to the socket of GPU_SET_SOCKET, and who shows it.

vhost-user-gpu specification.
"""

from __future__ import annotations

import contextlib
import enum
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import ClassVar, Self

from ..device import Device
from ..errors import PeerClosed, PeerTimeout, ProtocolError
from ..queues import Buffer

#: Seconds that the other side may take to read, and to answer.
TIMEOUT = 5.0

#: The largest update: 16384 by 16384 pixels of 4 bytes would be a gigabyte. This is 8192 by 8192.
MAX_PAYLOAD = 8192 * 8192 * 4 + 4096

CURSOR_SIZE = 64
SCANOUTS = 16

_HEADER = struct.Struct("=III")
_REPLY = 0x4
_RESPONSE = struct.Struct("<IIQI4x")
_DISPLAY = struct.Struct("<IIIIII")
_RESP_OK_DISPLAY_INFO = 0x1101
_RESP_OK_EDID = 0x1104
_EDID_SIZE = 1024


class Request(enum.IntEnum):
    """Messages of the back-end."""

    GET_PROTOCOL_FEATURES = 1
    SET_PROTOCOL_FEATURES = 2
    GET_DISPLAY_INFO = 3
    CURSOR_POS = 4
    CURSOR_POS_HIDE = 5
    CURSOR_UPDATE = 6
    SCANOUT = 7
    UPDATE = 8
    DMABUF_SCANOUT = 9
    DMABUF_UPDATE = 10
    GET_EDID = 11
    DMABUF_SCANOUT2 = 12


class GpuFeature(enum.IntFlag):
    """What GET_PROTOCOL_FEATURES and SET_PROTOCOL_FEATURES of this socket exchange."""

    EDID = 1 << 0
    DMABUF2 = 1 << 1


@dataclass(frozen=True)
class Display:
    """A monitor, in pixels."""

    width: int
    height: int
    x: int = 0
    y: int = 0
    enabled: bool = True


@dataclass(frozen=True)
class Message:
    """Something to be shown: its request, its numbers, and its pixels (4 bytes each, XRGB or, of cursors, ARGB)."""

    request: Request
    numbers: tuple[int, ...]
    pixels: bytes = b""
    descriptor: int | None = field(default=None, compare=False)
    """A DMA buffer, which belongs to whoever receives the message."""

    #: The numbers of each request, as in :class:`Screen`.
    LAYOUTS: ClassVar = {
        Request.SET_PROTOCOL_FEATURES: struct.Struct("=Q"),
        Request.CURSOR_POS: struct.Struct("=III"),
        Request.CURSOR_POS_HIDE: struct.Struct("=III"),
        Request.CURSOR_UPDATE: struct.Struct("=IIIII"),
        Request.SCANOUT: struct.Struct("=III"),
        Request.UPDATE: struct.Struct("=IIIII"),
        Request.DMABUF_SCANOUT: struct.Struct("=9Ii"),
        Request.DMABUF_UPDATE: struct.Struct("=IIIII"),
        Request.GET_EDID: struct.Struct("=I"),
        Request.DMABUF_SCANOUT2: struct.Struct("=9IiQ"),
    }
    NO_NUMBERS: ClassVar = struct.Struct("=")


class _Stream:
    """One end of the socket. Methods may be called from one thread at a time.

    All may raise:
        PeerTimeout: the other side did not read, or answer, in time.
        PeerClosed: it closed the socket.
        ProtocolError: what came makes no sense.
    """

    def __init__(self, connection: socket.socket, *, timeout: float = TIMEOUT) -> None:
        connection.setblocking(False)
        self._socket = connection
        self.timeout = timeout

    def _send(self, request: int, flags: int, payload: bytes, descriptor: int | None = None) -> None:
        data = memoryview(_HEADER.pack(request, flags, len(payload)) + payload)
        deadline = time.monotonic() + self.timeout
        descriptors = [] if descriptor is None else [descriptor]
        while data:
            try:
                sent = socket.send_fds(self._socket, [data], descriptors) if descriptors else self._socket.send(data)
                data, descriptors = data[sent:], []
            except BlockingIOError:
                self._wait(write=True, deadline=deadline)
            except ConnectionError:
                raise PeerClosed(f"{Request(request).name}: the other side closed the socket") from None

    def _receive(self, deadline: float) -> tuple[int, int, bytes, list[int]]:
        descriptors: list[int] = []
        try:
            head = self._read(_HEADER.size, deadline, descriptors)
            request, flags, size = _HEADER.unpack(head)
            if size > MAX_PAYLOAD:
                raise ProtocolError(f"request {request} announces {size} bytes; at most {MAX_PAYLOAD} are accepted")
            return request, flags, self._read(size, deadline, descriptors), descriptors
        except BaseException:
            _close(descriptors)
            raise

    def _read(self, size: int, deadline: float, descriptors: list[int]) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                part, came, _, _ = socket.recv_fds(self._socket, min(size - len(data), 1 << 20), 8)
            except BlockingIOError:
                self._wait(write=False, deadline=deadline)
                continue
            except ConnectionError:
                part, came = b"", []
            descriptors += came
            if not part:
                raise PeerClosed("the other side closed the socket")
            data += part
        return bytes(data)

    def _wait(self, *, write: bool, deadline: float) -> None:
        wanted = ([], [self._socket]) if write else ([self._socket], [])
        if not any(select.select(*wanted, [], max(0.0, deadline - time.monotonic()))):
            raise PeerTimeout(f"the other side did not {'read' if write else 'answer'} within {self.timeout} s")

    def fileno(self) -> int:
        """The descriptor of the socket."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Screen(_Stream):
    """Where a device draws: its end of the socket. Those methods that return something wait for the answer."""

    def protocol_features(self) -> GpuFeature:
        """What the front-end can do."""
        return GpuFeature(struct.unpack("=Q", self._ask(Request.GET_PROTOCOL_FEATURES, 8))[0])

    def set_protocol_features(self, features: GpuFeature) -> None:
        """What of it will be used."""
        self._tell(Request.SET_PROTOCOL_FEATURES, int(features))

    def displays(self) -> list[Display]:
        """The monitors that there are, by the number of their scanout."""
        answer = self._ask(Request.GET_DISPLAY_INFO, _RESPONSE.size + SCANOUTS * _DISPLAY.size)
        found = []
        for x, y, width, height, enabled, _ in _DISPLAY.iter_unpack(answer[_RESPONSE.size :]):
            found.append(Display(width, height, x, y, bool(enabled)))
        return found

    def edid(self, scanout: int) -> bytes:
        """What a monitor says of itself. Needs :attr:`GpuFeature.EDID`."""
        answer = self._ask(Request.GET_EDID, _RESPONSE.size + 8 + _EDID_SIZE, scanout)
        (size,) = struct.unpack_from("<I", answer, _RESPONSE.size)
        if size > _EDID_SIZE:
            raise ProtocolError(f"GET_EDID: {size} bytes, expected up to {_EDID_SIZE}")
        return answer[_RESPONSE.size + 8 :][:size]

    def move_cursor(self, scanout: int, x: int, y: int) -> None:
        """Put the cursor somewhere, and show it."""
        self._tell(Request.CURSOR_POS, scanout, x, y)

    def hide_cursor(self, scanout: int, x: int = 0, y: int = 0) -> None:
        """Show no cursor."""
        self._tell(Request.CURSOR_POS_HIDE, scanout, x, y)

    def set_cursor(self, scanout: int, x: int, y: int, hot_x: int, hot_y: int, pixels: Buffer) -> None:
        """Give the cursor another image, of 64 by 64 pixels.

        Raises:
            ValueError: there are more pixels, or fewer.
        """
        self._tell(Request.CURSOR_UPDATE, scanout, x, y, hot_x, hot_y, pixels=_image(pixels, CURSOR_SIZE, CURSOR_SIZE))

    def set_scanout(self, scanout: int, width: int, height: int) -> None:
        """Begin an image of this size; of no size, disable the scanout."""
        self._tell(Request.SCANOUT, scanout, width, height)

    def update(self, scanout: int, x: int, y: int, width: int, height: int, pixels: Buffer) -> None:
        """Draw a rectangle.

        Raises:
            ValueError: there are more pixels than it has, or fewer.
        """
        self._tell(Request.UPDATE, scanout, x, y, width, height, pixels=_image(pixels, width, height))

    def set_dmabuf(self, numbers: Sequence[int], descriptor: int | None) -> None:
        """Show a DMA buffer: scanout, x, y, width, height, width, height and stride of the buffer, flags, and fourcc.

        With the modifier as an eleventh number it is DMABUF_SCANOUT2, which needs :attr:`GpuFeature.DMABUF2`. Without a
        descriptor nothing is shown.
        """
        request = Request.DMABUF_SCANOUT if len(numbers) == 10 else Request.DMABUF_SCANOUT2
        self._tell(request, *numbers, descriptor=descriptor)

    def update_dmabuf(self, scanout: int, x: int, y: int, width: int, height: int) -> None:
        """Show what changed in the DMA buffer, and wait until it is shown."""
        self._ask(Request.DMABUF_UPDATE, 0, scanout, x, y, width, height)

    def _tell(self, request: Request, *numbers: int, pixels: bytes = b"", descriptor: int | None = None) -> None:
        self._send(request, 0, _layout(request).pack(*numbers) + pixels, descriptor)

    def _ask(self, request: Request, size: int, *numbers: int) -> bytes:
        self._tell(request, *numbers)
        came, flags, payload, descriptors = self._receive(time.monotonic() + self.timeout)
        _close(descriptors)
        if (came, flags & _REPLY, len(payload), descriptors) != (request, _REPLY, size, []):
            raise ProtocolError(
                f"{request.name}: expected an answer of {size} bytes, got request {came} with flags {flags:#x} and "
                f"{len(payload)} bytes"
            )
        return payload


class ScreenServer(_Stream):
    """The front-end's end of the socket: questions are answered from its attributes, and the rest is returned."""

    def __init__(self, connection: socket.socket, *, timeout: float = TIMEOUT) -> None:
        super().__init__(connection, timeout=timeout)
        self.features = GpuFeature.EDID | GpuFeature.DMABUF2
        """What is offered."""
        self.displays = [Display(1024, 768)]
        """Up to 16."""
        self.edids: dict[int, bytes] = {}
        """By scanout, up to 1024 bytes."""

    def receive(self, timeout: float | None = None) -> Message:
        """The next thing to be shown, answering questions until it comes.

        Raises:
            PeerTimeout: nothing came for `timeout` seconds (None: as many as everything may take).
        """
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        while True:
            message = self._understand(*self._receive(deadline))
            answer = self._answer(message)
            if answer is not None:
                self._send(message.request, _REPLY, answer)
            if answer is None or message.request is Request.DMABUF_UPDATE:
                return message

    def _understand(self, request: int, flags: int, payload: bytes, descriptors: list[int]) -> Message:
        try:
            known = Request(request)
            layout = _layout(known)
            numbers, pixels = layout.unpack(payload[: layout.size]), payload[layout.size :]
            expected = {
                Request.CURSOR_UPDATE: CURSOR_SIZE * CURSOR_SIZE * 4,
                Request.UPDATE: numbers[3] * numbers[4] * 4 if known is Request.UPDATE else 0,
            }
            shows_buffer = known in (Request.DMABUF_SCANOUT, Request.DMABUF_SCANOUT2)
            if flags or len(pixels) != expected.get(known, 0) or len(descriptors) > shows_buffer:
                raise ValueError
        except (ValueError, struct.error):
            _close(descriptors)
            raise ProtocolError(
                f"request {request} of the device makes no sense, with flags {flags:#x}, {len(payload)} bytes and "
                f"{len(descriptors)} descriptors"
            ) from None
        return Message(known, numbers, pixels, descriptors[0] if descriptors else None)

    def _answer(self, message: Message) -> bytes | None:
        match message.request:
            case Request.GET_PROTOCOL_FEATURES:
                return struct.pack("=Q", self.features)
            case Request.GET_DISPLAY_INFO:
                displays = [*self.displays, *[Display(0, 0, enabled=False)] * SCANOUTS][:SCANOUTS]
                return _RESPONSE.pack(_RESP_OK_DISPLAY_INFO, 0, 0, 0) + b"".join(
                    _DISPLAY.pack(each.x, each.y, each.width, each.height, each.enabled, 0) for each in displays
                )
            case Request.GET_EDID:
                edid = self.edids.get(message.numbers[0], b"")[:_EDID_SIZE]
                head = _RESPONSE.pack(_RESP_OK_EDID, 0, 0, 0) + struct.pack("<II", len(edid), 0)
                return head + edid.ljust(_EDID_SIZE, b"\0")
            case Request.DMABUF_UPDATE:
                return b""
        return None


class GpuSocket(Device, gpu_socket=True):
    """A device that draws on its own, on a socket that the front-end gives it. vhost-user-gpu specification."""

    def on_screen(self, screen: Screen) -> None:
        """Draw there from now on; close it when the device stops, or gets another one.

        The front-end waits for the end of this call: ask the screen something only afterwards, in another thread.
        """
        screen.close()

    def _set_gpu_socket(self, descriptor: int) -> None:
        self.on_screen(Screen(socket.socket(fileno=descriptor)))


def _layout(request: Request) -> struct.Struct:
    layout: struct.Struct = Message.LAYOUTS.get(request, Message.NO_NUMBERS)
    return layout


def _image(pixels: Buffer, width: int, height: int) -> bytes:
    data = bytes(pixels)
    if len(data) != width * height * 4:
        raise ValueError(f"{width} by {height} pixels are {width * height * 4} bytes, not {len(data)}")
    return data


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
