"""What only some devices have: each is offered by the devices that implement it, and works on both ends.

vhost-user specification, "Front-end message types" and "Back-end message types"; vhost-user-gpu specification.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

import raw
import vhost_user as vu
from raw import Id, u64
from specimens import Connect, Reverse, Serve
from vhost_user import extensions
from vhost_user.extensions import gpu
from vhost_user.testing import connect as drive

MAC = bytes.fromhex("525400123456")


class Net(extensions.Rarp, extensions.Mtu, device_id=vu.DeviceId.NET):
    """A network card that writes down what it is told."""

    rxq = vu.Queue()
    txq = vu.Queue()
    features = 1 << 3

    def __init__(self) -> None:
        self.told: list[object] = []

    def on_rarp(self, mac: bytes) -> None:
        self.told.append(mac)

    def on_mtu(self, mtu: int) -> None:
        if mtu > 9000:
            raise ValueError("jumbo packets have up to 9000 bytes")
        self.told.append(mtu)


class Crypto(extensions.CryptoSessions, device_id=vu.DeviceId.CRYPTO):
    """Numbers its sessions from 0."""

    dataq = vu.Queue()

    @dataq.handler
    def encrypt(self, request: vu.Request) -> None:
        request.write(request.read()[::-1])

    def __init__(self) -> None:
        self.sessions: dict[int, extensions.SymmetricSession | extensions.AsymmetricSession] = {}

    def create_session(self, session: extensions.SymmetricSession | extensions.AsymmetricSession) -> int:
        number = len(self.sessions)
        self.sessions[number] = session
        return number

    def close_session(self, number: int) -> None:
        del self.sessions[number]


class Painter(extensions.GpuSocket, device_id=vu.DeviceId.GPU):
    """Draws a pixel on each screen that it gets."""

    controlq = vu.Queue()

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self.seen: list[object] = []

    def on_screen(self, screen: gpu.Screen) -> None:
        self.threads.append(threading.Thread(target=self.paint, args=[screen]))
        self.threads[-1].start()

    def paint(self, screen: gpu.Screen) -> None:
        with screen:
            screen.set_protocol_features(screen.protocol_features() & gpu.GpuFeature.EDID)
            self.seen += [screen.displays()[:2], screen.edid(0)]
            screen.set_scanout(0, 640, 480)
            screen.update(0, 10, 20, 1, 1, b"\x10\x20\x30\x00")

    def on_stop(self) -> None:
        for thread in self.threads:
            thread.join()


# --- What is offered --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "offered"),
    [
        (Reverse, 0),
        (Net, vu.ProtocolFeature.RARP | vu.ProtocolFeature.NET_MTU),
        (Crypto, vu.ProtocolFeature.CRYPTO_SESSION),
        (Painter, 0),
    ],
)
def test_a_device_offers_what_its_class_is_derived_from(device: type[vu.Device], offered: int) -> None:
    with drive(Reverse()) as frontend:
        common = frontend.offered_protocol
    with drive(device()) as frontend:
        assert frontend.offered_protocol == common | offered


@pytest.mark.parametrize(
    ("request_id", "payload", "with_descriptor", "reason"),
    [
        (Id.SEND_RARP, u64(0), False, "needs the protocol feature RARP, which this device did not offer"),
        (Id.NET_SET_MTU, u64(1500), False, "needs the protocol feature NET_MTU"),
        (Id.CLOSE_CRYPTO_SESSION, u64(0), False, "needs the protocol feature CRYPTO_SESSION"),
        (Id.GPU_SET_SOCKET, b"", True, "this device does not draw by itself"),
    ],
)
def test_what_is_not_offered_is_refused(
    serve: Serve,
    connect: Connect,
    caplog: pytest.LogCaptureFixture,
    request_id: Id,
    payload: bytes,
    with_descriptor: bool,
    reason: str,
) -> None:
    front = connect(serve(Reverse()))
    front.negotiate()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        status = front.ask(request_id, payload, [theirs.fileno()] if with_descriptor else [])
        assert status != 0
        assert reason in caplog.text
        theirs.close()
        assert not with_descriptor or ours.recv(1) == b""


# --- Network devices --------------------------------------------------------------------------------------------------


def test_the_address_to_announce_is_the_first_six_bytes(serve: Serve, connect: Connect) -> None:
    device = Net()
    front = connect(serve(device))
    front.negotiate(protocol=raw.REPLY_ACK | raw.RARP)
    front.tell(Id.SEND_RARP, MAC + b"\xff\xff")
    assert device.told == [MAC]


def test_a_network_card_is_told_its_address_and_its_mtu() -> None:
    device = Net()
    with drive(device) as frontend:
        frontend.send_rarp(MAC)
        frontend.set_mtu(1500)
    assert device.told == [MAC, 1500]


def test_an_mtu_that_the_device_cannot_do_is_refused() -> None:
    device = Net()
    with drive(device) as frontend:
        with pytest.raises(vu.ProtocolError, match="NET_SET_MTU: the back-end refused it"):
            frontend.set_mtu(9001)
        frontend.set_mtu(9000)
    assert device.told == [9000]


@pytest.mark.parametrize("mtu", [0, 67, 65536, (1 << 64) - 1])
def test_an_mtu_that_cannot_be_is_refused_before_the_device_sees_it(
    serve: Serve, connect: Connect, caplog: pytest.LogCaptureFixture, mtu: int
) -> None:
    device = Net()
    front = connect(serve(device))
    front.negotiate()
    assert front.ask(Id.NET_SET_MTU, u64(mtu)) != 0
    assert f"an MTU is from 68 to 65535 bytes, not {mtu}" in caplog.text
    assert device.told == []


# --- Crypto devices ---------------------------------------------------------------------------------------------------

AES = extensions.SymmetricSession(cipher=3, key=b"k" * 32, direction=2)
CHAIN = extensions.SymmetricSession(
    cipher=3,
    key=b"k" * 64,
    kind=2,
    hash=5,
    hash_length=32,
    hash_mode=2,
    authentication_key=b"a" * 512,
    additional_length=7,
    chain_order=1,
)
RSA = extensions.AsymmetricSession(algorithm=1, key_type=2, key=b"r" * 1024, rsa_padding=1, rsa_hash=3)


def test_sessions_are_created_and_closed() -> None:
    device = Crypto()
    with drive(device) as frontend:
        assert [frontend.create_crypto_session(session) for session in (AES, CHAIN, RSA)] == [0, 1, 2]
        assert device.sessions == {0: AES, 1: CHAIN, 2: RSA}
        frontend.close_crypto_session(1)
        assert list(device.sessions) == [0, 2]
        with pytest.raises(vu.ProtocolError, match="CLOSE_CRYPTO_SESSION: the back-end refused it"):
            frontend.close_crypto_session(1)


def crypto_session(operation: int, parameters: bytes, session: int = 0) -> bytes:
    return struct.pack("=Q1056sq", operation, parameters, session)


def test_a_session_is_where_the_specification_puts_it(serve: Serve, connect: Connect) -> None:
    device = Crypto()
    front = connect(serve(device))
    front.negotiate(protocol=raw.REPLY_ACK | raw.CRYPTO_SESSION)
    info = struct.pack("=IIIIIIBBBBxxxxQQ", 3, 16, 0, 0, 0, 0, 1, 1, 0, 0, 1 << 40, 1 << 41)
    asked = crypto_session(2, info + b"0123456789abcdef", session=99)
    answer = front.get(Id.CREATE_CRYPTO_SESSION, asked)
    assert answer == asked[:1064] + struct.pack("=q", 0)
    assert device.sessions[0] == extensions.SymmetricSession(cipher=3, key=b"0123456789abcdef")

    info = struct.pack("=IIIIQII", 1, 1, 4, 0, 1 << 40, 0, 2)
    answer = front.get(Id.CREATE_CRYPTO_SESSION, crypto_session(0x0404, info + b"rsa!"))
    assert answer[1064:] == struct.pack("=q", 1)
    assert device.sessions[1] == extensions.AsymmetricSession(algorithm=1, key=b"rsa!", rsa_hash=2)


def test_the_ring_of_a_crypto_device_need_not_be_enabled(serve: Serve, connect: Connect, memory: raw.Memory) -> None:
    front = connect(serve(Crypto()))
    front.negotiate(raw.PROTOCOL_FEATURES, raw.REPLY_ACK | raw.CRYPTO_SESSION)
    front.share(memory)
    ring = raw.Ring(memory)
    front.place(ring)
    front.set_kick(ring)
    assert front.exchange(ring, b"abc", 3) == b"cba"
    front.enable(ring, False)
    ring.add([b"def"], [3])
    front.kick(ring)
    with pytest.raises(AssertionError, match="not within"):
        ring.wait(timeout=raw.QUIET)


@pytest.mark.parametrize("operation", [2, 0x0404])
def test_a_key_longer_than_its_room_makes_no_session(serve: Serve, connect: Connect, operation: int) -> None:
    device = Crypto()
    front = connect(serve(device))
    front.negotiate()
    answer = front.get(Id.CREATE_CRYPTO_SESSION, crypto_session(operation, b"\xff" * 1056))
    assert answer[1064:] == struct.pack("=q", -1)
    assert device.sessions == {}
    assert front.get_u64(Id.GET_FEATURES)


def test_a_session_that_the_device_refuses_is_an_error_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Crypto, "create_session", extensions.CryptoSessions.create_session)
    with drive(Crypto()) as frontend, pytest.raises(vu.ProtocolError, match="the back-end made no session: -1"):
        frontend.create_crypto_session(AES)


def test_a_key_that_does_not_fit_is_not_sent() -> None:
    with drive(Crypto()) as frontend:
        with pytest.raises(ValueError, match="the key has 65 bytes; there is room for 64"):
            frontend.create_crypto_session(extensions.SymmetricSession(key=bytes(65)))
        with pytest.raises(ValueError, match="the authentication key has 513 bytes"):
            frontend.create_crypto_session(extensions.SymmetricSession(authentication_key=bytes(513)))
        with pytest.raises(ValueError, match="the key has 1025 bytes"):
            frontend.create_crypto_session(extensions.AsymmetricSession(key=bytes(1025)))


# --- Devices that draw ------------------------------------------------------------------------------------------------


def test_a_device_draws_on_the_screen_that_it_is_given() -> None:
    device = Painter()
    with drive(device) as frontend, frontend.open_screen() as server:
        server.displays = [gpu.Display(800, 600, x=5)]
        server.edids[0] = b"edid of a monitor"
        first, second = server.receive(), server.receive()
        third = server.receive()
        with pytest.raises(vu.PeerClosed):
            server.receive()
    assert first == gpu.Message(gpu.Request.SET_PROTOCOL_FEATURES, (1,))
    assert second == gpu.Message(gpu.Request.SCANOUT, (0, 640, 480))
    assert third == gpu.Message(gpu.Request.UPDATE, (0, 10, 20, 1, 1), b"\x10\x20\x30\x00")
    assert device.seen == [[gpu.Display(800, 600, x=5), gpu.Display(0, 0, enabled=False)], b"edid of a monitor"]


@pytest.fixture
def screen(level: None) -> Iterator[tuple[gpu.Screen, socket.socket]]:
    """A screen, and the front-end's end of its socket."""
    ours, theirs = socket.socketpair()
    ours.settimeout(raw.DEADLINE)
    with gpu.Screen(theirs, timeout=raw.DEADLINE) as screen, ours:
        yield screen, ours


def test_drawing_is_sent_as_the_specification_says(screen: tuple[gpu.Screen, socket.socket]) -> None:
    screen_, peer = screen
    read, write = os.pipe()
    screen_.move_cursor(1, 2, 3)
    screen_.hide_cursor(1)
    screen_.set_scanout(1, 640, 480)
    screen_.update(1, 2, 3, 1, 2, b"abcdefgh")
    screen_.set_dmabuf([1, 2, 3, 4, 5, 6, 7, 8, 9, -1], write)
    os.close(write)
    expected = (
        struct.pack("=6I", 4, 0, 12, 1, 2, 3)
        + struct.pack("=6I", 5, 0, 12, 1, 0, 0)
        + struct.pack("=6I", 7, 0, 12, 1, 640, 480)
        + struct.pack("=8I", 8, 0, 28, 1, 2, 3, 1, 2)
        + b"abcdefgh"
        + struct.pack("=3I9Ii", 9, 0, 40, 1, 2, 3, 4, 5, 6, 7, 8, 9, -1)
    )
    plain = len(expected) - 52
    assert peer.recv(plain, socket.MSG_WAITALL) == expected[:plain]
    data, descriptors, _, _ = socket.recv_fds(peer, 52, 8)
    assert data == expected[plain:]
    [buffer] = descriptors
    os.write(buffer, b"a buffer")
    os.close(buffer)
    assert os.read(read, 100) == b"a buffer"
    os.close(read)


def test_what_changed_in_a_dma_buffer_is_shown_when_the_answer_comes(
    screen: tuple[gpu.Screen, socket.socket],
) -> None:
    screen_, peer = screen
    peer.send(struct.pack("=III", 10, 4, 0))
    screen_.update_dmabuf(1, 2, 3, 4, 5)
    assert peer.recv(100) == struct.pack("=8I", 10, 0, 20, 1, 2, 3, 4, 5)
    screen_.timeout = 0.01
    with pytest.raises(vu.PeerTimeout):
        screen_.update_dmabuf(1, 2, 3, 4, 5)


def test_an_update_of_another_size_than_its_pixels_is_not_sent(screen: tuple[gpu.Screen, socket.socket]) -> None:
    with pytest.raises(ValueError, match="2 by 2 pixels are 16 bytes, not 15"):
        screen[0].update(0, 0, 0, 2, 2, bytes(15))
    with pytest.raises(ValueError, match="64 by 64 pixels are 16384 bytes, not 4"):
        screen[0].set_cursor(0, 0, 0, 0, 0, bytes(4))


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(struct.pack("=IIIQ", 3, 4, 8, 0), id="to another request"),
        pytest.param(struct.pack("=IIIQ", 1, 0, 8, 0), id="without the reply flag"),
        pytest.param(struct.pack("=IIII", 1, 4, 4, 0), id="too short"),
        pytest.param(struct.pack("=III", 1, 4, 0xFFFF_FFFF), id="too long"),
    ],
)
def test_an_answer_that_makes_no_sense_is_an_error(screen: tuple[gpu.Screen, socket.socket], answer: bytes) -> None:
    screen[1].send(answer)
    with pytest.raises(vu.ProtocolError):
        screen[0].protocol_features()


def test_a_front_end_that_does_not_answer_is_not_waited_for_for_ever(
    screen: tuple[gpu.Screen, socket.socket],
) -> None:
    screen[0].timeout = 0.01
    with pytest.raises(vu.PeerTimeout, match=r"the other side did not answer within 0\.01 s"):
        screen[0].protocol_features()


@pytest.mark.parametrize(
    ("message", "descriptors"),
    [
        pytest.param(struct.pack("=IIII", 99, 0, 4, 0), 0, id="unknown"),
        pytest.param(struct.pack("=IIII", 7, 0, 4, 0), 0, id="too short"),
        pytest.param(struct.pack("=8I", 8, 0, 20, 0, 0, 0, 0xFFFF, 0xFFFF), 0, id="without its pixels"),
        pytest.param(struct.pack("=6I", 7, 0, 12, 0, 0, 0), 1, id="with a descriptor"),
        pytest.param(struct.pack("=6I", 7, 4, 12, 0, 0, 0), 0, id="an answer"),
        pytest.param(struct.pack("=III", 8, 0, 0xFFFF_FFFF), 0, id="huge"),
    ],
)
def test_a_device_that_draws_nonsense_is_an_error_and_leaks_nothing(
    level: None, message: bytes, descriptors: int
) -> None:
    ours, theirs = socket.socketpair()
    read, write = os.pipe()
    with gpu.ScreenServer(ours) as server, theirs:
        socket.send_fds(theirs, [message], [write] * descriptors)
        os.close(write)
        with pytest.raises(vu.ProtocolError):
            server.receive()
        assert os.read(read, 1) == b""
    os.close(read)


# --- Memory of many pieces --------------------------------------------------------------------------------------------

SLOTS = 509
PAGE = 4096


def test_a_device_works_on_all_the_memory_slots_that_it_offers(serve: Serve, connect: Connect) -> None:
    front = connect(serve(Reverse()))
    front.negotiate(protocol=raw.REPLY_ACK | raw.CONFIGURE_MEM_SLOTS)
    assert front.get_u64(Id.GET_MAX_MEM_SLOTS) == SLOTS
    memories = [
        front.own(raw.Memory(1 << 16 if at == 0 else PAGE, guest=at << 20, user=(SLOTS - at) << 32))
        for at in range(SLOTS + 1)
    ]
    for memory in memories[:SLOTS]:
        front.tell(Id.ADD_MEM_REG, raw.single_region(memory.region), [memory.descriptor])
    last = memories[SLOTS]
    assert front.ask(Id.ADD_MEM_REG, raw.single_region(last.region), [last.descriptor]) != 0

    ring = raw.Ring(memories[0], size=2048)
    front.start(ring)
    chains = [ring.add([b"slot %d" % at], [16], memory=memories[at]) for at in range(1, SLOTS)]
    front.kick(ring)
    lengths = dict(ring.wait(SLOTS - 1))
    assert [chain.written(lengths[chain.head]) for chain in chains] == [
        (b"slot %d" % at)[::-1] for at in range(1, SLOTS)
    ]

    for memory in memories[1:SLOTS]:
        front.tell(Id.REM_MEM_REG, raw.single_region(memory.region))
    assert front.exchange(ring, b"abc", 8) == b"cba"


def test_a_driver_shares_as_many_regions_as_the_device_has_slots() -> None:
    # A queue of 1024, and no room for a request: each of those is in a region of its own.
    first = vu.Memory(regions=[(0, 7 * PAGE)])
    others = vu.Memory(regions=[(at << 20, PAGE) for at in range(1, SLOTS)])
    with drive(Reverse(), start=False) as frontend:
        frontend.share(vu.Memory(regions=[*first.regions, *others.regions]))
        queue = frontend.queue(0, 1024)
        data = bytes(range(256)) * 4
        requests = [queue.submit(data, len(data)) for _ in range(SLOTS - 1)]
        assert {request.wait() for request in requests} == {data[::-1]}
        queue.stop()
        frontend.share(first)
        assert frontend.queue(0).request(b"abc", 8) == b"cba"

        with pytest.raises(vu.StateError, match="510 regions to share; the back-end takes 509"):
            frontend.share(vu.Memory(regions=[(at << 20, PAGE) for at in range(SLOTS + 1)]))


def test_memory_of_xen_is_refused_with_a_reason(
    serve: Serve, connect: Connect, memory: raw.Memory, caplog: pytest.LogCaptureFixture
) -> None:
    front = connect(serve(Reverse()))
    front.negotiate(protocol=raw.REPLY_ACK | raw.CONFIGURE_MEM_SLOTS)
    assert front.ask(Id.SET_PROTOCOL_FEATURES, u64(raw.REPLY_ACK | 1 << 17)) != 0
    assert "XEN_MMAP was not offered: guest memory is mapped from files here" in caplog.text

    region = memory.region + struct.pack("=II", 0, 0)
    for request_id, payload in [
        (Id.SET_MEM_TABLE, raw.memory_table(region)),
        (Id.ADD_MEM_REG, raw.single_region(region)),
        (Id.REM_MEM_REG, raw.single_region(region)),
    ]:
        caplog.clear()
        descriptors = [] if request_id == Id.REM_MEM_REG else [memory.descriptor]
        assert front.ask(request_id, payload, descriptors) != 0
        assert "regions of 40 bytes belong to XEN_MMAP, which was not offered" in caplog.text
