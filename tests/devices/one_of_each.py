"""One device of each type that QEMU has a front-end for, as small as drivers allow: more examples of few lines."""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Mapping
from typing import ClassVar
from uuid import UUID

import vhost_user as vu
from vhost_user import extensions
from vhost_user.extensions import gpu


class Gpio(vu.Device, device_id=vu.DeviceId.GPIO):
    """Lines that keep their level, and interrupt. Virtio 1.3, section 5.18."""

    NAMES = b"reset\0ready\0\0lamp\0"
    _NAME_REQUEST, _GET_DIRECTION, _SET_DIRECTION, _GET_VALUE, _SET_VALUE, _IRQ_TYPE = range(1, 7)

    ngpio = vu.config.u16(4)
    padding = vu.config.raw(2)
    gpio_names_size = vu.config.u32(len(NAMES))

    requestq = vu.Queue()
    eventq = vu.Queue()
    features = 1 << 0

    def __init__(self) -> None:
        self.directions = [0] * 4
        self.levels = [0] * 4
        self.triggers = [0] * 4
        self._waiting: dict[int, vu.Request] = {}

    @requestq.handler
    def control(self, request: vu.Request) -> None:
        kind, line, value = request.unpack("<HHI")
        answer = b"\0"
        if kind == self._NAME_REQUEST:
            answer = self.NAMES
        elif kind == self._GET_DIRECTION:
            answer = bytes([self.directions[line]])
        elif kind == self._SET_DIRECTION:
            self.directions[line] = value
        elif kind == self._GET_VALUE:
            answer = bytes([self.levels[line]])
        elif kind == self._SET_VALUE:
            self.levels[line] = value
        elif kind == self._IRQ_TYPE:
            self.triggers[line] = value
            if not value and line in self._waiting:
                self._answer(line, 0)
        request.write(b"\0" + answer)

    @eventq.handler
    def arm(self, request: vu.Request) -> None:
        (line,) = request.unpack("<H")
        self._waiting[line] = request.detach()

    def interrupt(self, line: int) -> None:
        """Something has happened on a line."""
        self.loop.call_soon(lambda: self._answer(line, 1))

    def _answer(self, line: int, is_valid: int) -> None:
        request = self._waiting.pop(line)
        request.write(bytes([is_valid]))
        request.complete()


class Spi(vu.Device, device_id=vu.DeviceId.SPI):
    """A bus where each chip answers with what it gets, upside down. Virtio, section "SPI Controller Device"."""

    chip_selects = vu.config.u8(2)
    cs_change_supported = vu.config.u8(1)
    tx_nbits = vu.config.u8()
    rx_nbits = vu.config.u8()
    bits_per_word_mask = vu.config.u32(1 << 7)
    mode_func = vu.config.u32(0x0F)
    max_freq_hz = vu.config.u32(10_000_000)
    delays = vu.config.raw(16)

    requestq = vu.Queue()

    @requestq.handler
    def transfer(self, request: vu.Request) -> None:
        request.read(32)
        request.write(bytes(byte ^ 0xFF for byte in request.read())[: request.writable - 1])
        request.write_tail(b"\0")


class Rtc(vu.Device, device_id=vu.DeviceId.RTC):
    """One clock, which stands still. Virtio, section "RTC Device"."""

    _READ, _CONFIGURATION, _CAPABILITIES = 1, 0x1000, 0x1001

    requestq = vu.Queue()
    alarmq = vu.Queue()

    nanoseconds = 1_000_000_000_000_000_000

    @requestq.handler
    def ask(self, request: vu.Request) -> None:
        (kind,) = request.unpack("<H6x")
        answer = {
            self._READ: struct.pack("<8xQ", self.nanoseconds),
            self._CONFIGURATION: struct.pack("<8xH6x", 1),
            self._CAPABILITIES: struct.pack("<8xBBB5x", 0, 0, 0),
        }
        request.write(answer.get(kind, b"\2".ljust(8, b"\0")))


class Sound(vu.Device, device_id=vu.DeviceId.SOUND):
    """A loudspeaker that keeps what it plays. Virtio 1.3, section 5.14."""

    _PCM_INFO = 0x100
    _OK, _NOT_SUPPORTED = (struct.pack("<I", status) for status in (0x8000, 0x8002))
    _STREAM = struct.pack("<IIQQBBB5x", 0, 0, 1 << 5, 1 << 6 | 1 << 7, 0, 1, 2)

    jacks = vu.config.u32()
    streams = vu.config.u32(1)
    chmaps = vu.config.u32()

    controlq = vu.Queue()
    eventq = vu.Queue()
    txq = vu.Queue()
    rxq = vu.Queue()

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.played = b""

    @controlq.handler
    def control(self, request: vu.Request) -> None:
        (code,) = request.unpack("<I")
        self.asked.append(code)
        if self._PCM_INFO <= code < self._PCM_INFO + 6:
            request.write(self._OK + (self._STREAM if code == self._PCM_INFO else b""))
        else:
            request.write(self._NOT_SUPPORTED)

    @txq.handler
    def play(self, request: vu.Request) -> None:
        request.read(4)
        self.played += request.read()
        request.write(self._OK + bytes(4))


class Keyboard(vu.Device, device_id=vu.DeviceId.INPUT):
    """Keys to be pressed from Python, and lamps. Virtio 1.3, section 5.8."""

    _NAME, _EVENTS = 1, 0x11
    _EV_SYN, _EV_KEY, _EV_LED = 0, 1, 0x11

    select = vu.config.u8(writable=True)
    subsel = vu.config.u8(writable=True)
    size = vu.config.u8()
    reserved = vu.config.raw(5)
    data = vu.config.raw(128)

    eventq = vu.Queue(backlog=64)
    statusq = vu.Queue()

    #: By what the driver selects: the name, and as bit sets the keys up to 127 and the lamps.
    ANSWERS: ClassVar = {
        (_NAME, 0): b"a keyboard of few words",
        (_EVENTS, _EV_KEY): ((1 << 128) - 2).to_bytes(16, "little"),
        (_EVENTS, _EV_LED): b"\7",
    }

    def __init__(self) -> None:
        self.lamps: list[tuple[int, int, int]] = []

    @select.on_write
    @subsel.on_write
    def _chosen(self, old: int, new: int) -> None:
        answer = self.ANSWERS.get((self.select, self.subsel), b"")
        self.size, self.data = len(answer), answer

    @statusq.handler
    def light(self, request: vu.Request) -> None:
        self.lamps.append(request.unpack("<HHI"))

    def press(self, *keys: int) -> None:
        """Press the keys one after the other, and let them go in the order back."""
        for down, order in ((1, keys), (0, keys[::-1])):
            for key in order:
                self.eventq.push(struct.pack("<HHI", self._EV_KEY, key, down))
                self.eventq.push(struct.pack("<HHI", self._EV_SYN, 0, 0))


class Vsock(vu.Device, device_id=vu.DeviceId.VSOCK):
    """A host that accepts every connection, and sends back what comes. Virtio 1.3, section 5.10."""

    _REQUEST, _RESPONSE, _RST, _SHUTDOWN, _RW = range(1, 6)
    _HEADER = struct.Struct("<QQIIIHHIII")

    guest_cid = vu.config.u64(3)

    rxq = vu.Queue(backlog=64)
    txq = vu.Queue()
    eventq = vu.Queue()

    def __init__(self) -> None:
        #: The ports of the guest where nobody listens.
        self.refused: list[int] = []
        self._received = 0

    @txq.handler
    def take(self, request: vu.Request) -> None:
        from_, to, from_port, to_port, size, kind, operation, *_ = request.unpack(self._HEADER)
        if operation == self._RST:
            self.refused.append(from_port)
        data = request.read(size)
        self._received += len(data)
        answer = {self._REQUEST: self._RESPONSE, self._RW: self._RW, self._SHUTDOWN: self._RST}.get(operation)
        if answer:
            head = (to, from_, to_port, from_port, len(data), kind, answer, 0, 1 << 18, self._received)
            self.rxq.push(self._HEADER.pack(*head) + data)

    def call(self, port: int) -> None:
        """Ask for a connection to the guest."""
        self.rxq.push(self._HEADER.pack(2, self.guest_cid, 1000, port, 0, 1, self._REQUEST, 0, 1 << 18, 0))


class Scsi(vu.Device, device_id=vu.DeviceId.SCSI):
    """A host adapter with a small disk at target 0. Virtio 1.3, section 5.6; SPC-4 and SBC-3."""

    VENDOR, PRODUCT, BLOCK = b"SNAKES", b"AND LADDERS", 512

    controlq = vu.Queue()
    eventq = vu.Queue()
    requestqs = vu.Queue.many(1)
    features = 1 << 2

    def __init__(self, blocks: int = 128) -> None:
        self.content = bytearray(blocks * self.BLOCK)
        self.commands: list[int] = []

    @controlq.handler
    def manage(self, request: vu.Request) -> None:
        request.write_tail(b"\0")

    @requestqs.handler
    def command(self, request: vu.Request) -> None:
        one, target, lun, _, _, cdb = request.unpack("<BBH4xQ3s32s")
        self.commands.append(cdb[0])
        if (one, target, lun & 0xFF3F) != (1, 0, 0):
            self._respond(request, response=3)  # there is no such target
            return
        data = self._execute(cdb, request)
        if data is None:
            self._respond(request, status=2, sense=b"\x70\0\5\0\0\0\0\x0a\0\0\0\0\x20\0\0\0\0\0")  # illegal request
        else:
            self._respond(request, data=data)

    def _execute(self, cdb: bytes, request: vu.Request) -> bytes | None:
        operation = cdb[0]
        first, count = struct.unpack(">IxH", cdb[2:9])
        place = slice(first * self.BLOCK, (first + count) * self.BLOCK)
        answer: bytes | None = None
        if operation == 0x00:  # TEST UNIT READY
            answer = b""
        elif operation == 0x12 and not cdb[1] & 1:  # INQUIRY
            answer = b"\0\0\5\2\x1f\0\0\0" + self.VENDOR.ljust(8) + self.PRODUCT.ljust(16) + b"1   "
            answer = answer[: int.from_bytes(cdb[3:5])]
        elif operation == 0xA0:  # REPORT LUNS
            answer = struct.pack(">I4x8x", 8)
        elif operation == 0x25:  # READ CAPACITY(10)
            answer = struct.pack(">II", len(self.content) // self.BLOCK - 1, self.BLOCK)
        elif operation == 0x28:  # READ(10)
            answer = bytes(self.content[place])
        elif operation == 0x2A:  # WRITE(10)
            self.content[place] = request.read()
            answer = b""
        return answer

    def _respond(
        self, request: vu.Request, *, data: bytes = b"", status: int = 0, response: int = 0, sense: bytes = b""
    ) -> None:
        room = request.writable - 108
        head = struct.pack("<IIHBB96s", len(sense), max(room - len(data), 0), 0, status, response, sense)
        request.write(head + data[:room])


class Crypto(extensions.CryptoSessions, device_id=vu.DeviceId.CRYPTO):
    """What it calls a cipher is an exclusive or with the key. Virtio 1.3, section 5.9."""

    dataq = vu.Queue(1024)

    def __init__(self) -> None:
        self.sessions: dict[int, extensions.SymmetricSession | extensions.AsymmetricSession] = {}
        self.closed: list[int] = []

    def create_session(self, session: extensions.SymmetricSession | extensions.AsymmetricSession) -> int:
        number = 7 + len(self.sessions)
        self.sessions[number] = session
        return number

    def close_session(self, number: int) -> None:
        del self.sessions[number]
        self.closed.append(number)

    @dataq.handler
    def encrypt(self, request: vu.Request) -> None:
        session, iv_size, source_size = request.unpack("<8xQ8xII40x")
        request.read(iv_size)
        key = self.sessions[session].key
        data = request.read(source_size)
        request.write(bytes(byte ^ key[at % len(key)] for at, byte in enumerate(data)))
        request.write_tail(b"\0")


class Gpu(extensions.GpuSocket, device_id=vu.DeviceId.GPU):
    """A card that paints each scanout in one colour. Virtio 1.3, section 5.7; vhost-user-gpu specification."""

    _DISPLAY_INFO, _SET_SCANOUT, _FLUSH = 0x100, 0x103, 0x104
    _HEADER = struct.Struct("<IIQII")

    events_read = vu.config.u32()
    events_clear = vu.config.u32(writable=True)
    num_scanouts = vu.config.u32(1)
    num_capsets = vu.config.u32()

    controlq = vu.Queue()
    cursorq = vu.Queue()

    colour = bytes.fromhex("30201000")

    def __init__(self) -> None:
        self.commands: list[int] = []
        self.displays: list[gpu.Display] = []
        self.edid = b""
        self._introduction: threading.Thread | None = None
        self._screen: gpu.Screen | None = None

    def on_screen(self, screen: gpu.Screen) -> None:
        self._leave()
        screen.timeout = 30.0
        self._screen = screen
        self._introduction = threading.Thread(target=self._introduce, args=[screen])
        self._introduction.start()

    def _introduce(self, screen: gpu.Screen) -> None:
        screen.set_protocol_features(screen.protocol_features() & gpu.GpuFeature.EDID)
        self.displays = screen.displays()
        self.edid = screen.edid(0)

    @controlq.handler
    def control(self, request: vu.Request) -> None:
        assert self._screen is not None
        command, flags, fence, context, _ = request.unpack(self._HEADER)
        self.commands.append(command)
        kind, body = 0x1100, b""
        if command == self._DISPLAY_INFO:
            kind = 0x1101
            body = b"".join(struct.pack("<6I", d.x, d.y, d.width, d.height, d.enabled, 0) for d in self.displays)
        elif command == self._SET_SCANOUT:
            _, _, width, height, scanout, _ = request.unpack("<6I")
            self._screen.set_scanout(scanout, width, height)
        elif command == self._FLUSH:
            x, y, width, height, _ = request.unpack("<5I")
            self._screen.update(0, x, y, width, height, self.colour * width * height)
        request.write((self._HEADER.pack(kind, flags & 1, fence, context, 0) + body)[: request.writable])

    @cursorq.handler
    def move(self, request: vu.Request) -> None:
        assert self._screen is not None
        scanout, x, y = request.unpack("<24xIII")
        self._screen.move_cursor(scanout, x, y)

    def on_disconnect(self, error: Exception | None) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._introduction is not None:
            self._introduction.join()
            self._introduction = None
        if self._screen is not None:
            self._screen.close()
            self._screen = None


class Files(vu.Device, device_id=vu.DeviceId.FS):
    """A folder with one file, which can be read. Virtio 1.3, section 5.11; FUSE of Linux."""

    NAME, CONTENT = b"poem", b"the moon\nand a frog\n"
    _LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _INIT, _FORGET_MANY, _OPEN_FOLDER = 1, 2, 3, 14, 15, 26, 42, 27
    _RELEASE, _FLUSH, _RELEASE_FOLDER = 18, 25, 29

    highq = vu.Queue()
    requestqs = vu.Queue.many(1)

    @highq.handler
    def forget(self, request: vu.Request) -> None:
        pass

    @requestqs.handler
    def operate(self, request: vu.Request) -> None:
        _, operation, unique, node, *_ = request.unpack("<IIQQIIIHxx")
        error, body = 0, b""
        if operation == self._INIT:
            body = struct.pack("<IIIIHHIIHH32x", 7, 31, 1 << 16, 0, 16, 12, 1 << 16, 1, 16, 0)
        elif operation == self._GETATTR:
            body = struct.pack("<QII", 1, 0, 0) + self._attributes(node)
        elif operation == self._LOOKUP and request.read() == self.NAME + b"\0":
            body = struct.pack("<QQQQII", 2, 0, 1, 1, 0, 0) + self._attributes(2)
        elif operation in (self._OPEN, self._OPEN_FOLDER):
            body = struct.pack("<QII", 1, 0, 0)
        elif operation == self._READ:
            _, offset, size = request.unpack("<QQI")
            body = self.CONTENT[offset : offset + size]
        elif operation not in (self._FLUSH, self._RELEASE, self._RELEASE_FOLDER):
            error = -2 if operation == self._LOOKUP else -38
        if request.writable:
            request.write(struct.pack("<IiQ", 16 + len(body), error, unique) + body)

    def _attributes(self, node: int) -> bytes:
        mode, size = (0o40755, 0) if node == 1 else (0o100644, len(self.CONTENT))
        return struct.pack("<QQQQQQIIIIIIIIII", node, size, 1, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


class Network(extensions.Rarp, extensions.Mtu, device_id=vu.DeviceId.NET):
    """A cable with somebody at its other end who sends each frame back, backwards. Virtio 1.3, section 5.1."""

    ADDRESS = bytes.fromhex("525400123456")
    HEADER = bytes(10) + b"\1\0"

    receiveq = vu.Queue(backlog=64)
    transmitq = vu.Queue()
    features = 1 << 3 | 1 << 5

    def __init__(self) -> None:
        self.told: list[object] = []

    def on_rarp(self, mac: bytes) -> None:
        self.told.append(mac)

    def on_mtu(self, mtu: int) -> None:
        self.told.append(mtu)

    @transmitq.handler
    def send(self, request: vu.Request) -> None:
        self.receiveq.push(self.HEADER + request.read()[len(self.HEADER) :][::-1])


class Windows(
    extensions.SharedMemory, extensions.HostNotifiers, extensions.SharedObjects, device_id=vu.DeviceId.DMABUF
):
    """Shows its driver a file, as memory and to notify it by, and others by a name. Turns round what it is sent."""

    NAME = UUID("00112233-4455-6677-8899-aabbccddeeff")

    requestq = vu.Queue()
    shared_memory: Mapping[int, int] = {0: 1 << 20}

    def __init__(self) -> None:
        self.file = os.memfd_create("window", os.MFD_CLOEXEC)
        os.truncate(self.file, 16 * mmap.PAGESIZE)

    def shared_object(self, uuid: UUID) -> int | None:
        return self.file if uuid == self.NAME else None

    @requestq.handler
    def reverse(self, request: vu.Request) -> None:
        request.write(request.read()[::-1])

    def on_stop(self) -> None:
        os.close(self.file)
