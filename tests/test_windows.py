"""What a device shows its driver beside the rings: shared memory, pages to be notified by, objects that have names.

vhost-user specification, "Back-end message types"; Virtio 1.3, section 2.10.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from uuid import UUID

import pytest

import raw
import vhost_user as vu
from raw import NEED_REPLY, REPLY, Id, u64
from raw_backend import BackEnd
from specimens import NO_TYPE, Connect, Serve
from vhost_user import extensions
from vhost_user.testing import connect as drive

PAGE = mmap.PAGESIZE
OURS = UUID("00112233-4455-6677-8899-aabbccddeeff")
THEIRS = UUID("12345678-1234-5678-1234-567812345678")

HOST_NOTIFIER = 3
ADD, REMOVE, LOOKUP = 6, 7, 8
MAP, UNMAP = 9, 10


class Windows(extensions.SharedMemory, extensions.HostNotifiers, extensions.SharedObjects, device_id=NO_TYPE):
    """Has two regions, and one object."""

    requestq = vu.Queue()
    shared_memory: Mapping[int, int] = {0: 4 * PAGE, 7: PAGE}

    def __init__(self) -> None:
        self.file = os.memfd_create("window", os.MFD_CLOEXEC)
        os.truncate(self.file, 4 * PAGE)

    def on_stop(self) -> None:
        os.close(self.file)

    def shared_object(self, uuid: UUID) -> int | None:
        if uuid == THEIRS:
            raise LookupError("not this one")
        return self.file if uuid == OURS else None


def asked(answer: extensions.Answer, frontend: vu.Frontend) -> int | None:
    """What the front-end answers, which serves the channel while it waits for something."""
    while not answer.done():
        frontend.next_event(0.01)
    return answer.result()


# --- Between our two ends ---------------------------------------------------------------------------------------------


def test_a_file_is_mapped_where_the_device_says_and_seen_by_the_driver() -> None:
    device = Windows()
    with drive(device) as frontend:
        assert frontend.shared_memory == {0: 4 * PAGE, 7: PAGE}
        os.pwrite(device.file, b"from the device", PAGE)
        asked(device.map_shared_memory(0, 2 * PAGE, device.file, 2 * PAGE, file_offset=PAGE), frontend)
        assert frontend.mappings(0) == [(2 * PAGE, 2 * PAGE, True)]
        assert frontend.read_shared_memory(0, 2 * PAGE, 15) == b"from the device"
        frontend.write_shared_memory(0, 4 * PAGE - 4, b"back")
        assert os.pread(device.file, 4, 3 * PAGE - 4) == b"back"

        asked(device.unmap_shared_memory(0, 2 * PAGE, 2 * PAGE), frontend)
        assert frontend.mappings(0) == []
        with pytest.raises(vu.StateError, match="1 bytes at 0x2000 of the shared memory region 0: nothing is mapped"):
            frontend.read_shared_memory(0, 2 * PAGE, 1)


def test_what_is_mapped_for_reading_is_not_written_to() -> None:
    device = Windows()
    with drive(device) as frontend:
        file = os.open(f"/proc/self/fd/{device.file}", os.O_RDONLY)
        asked(device.map_shared_memory(7, 0, file, PAGE, writable=False), frontend)
        os.close(file)
        assert frontend.read_shared_memory(7, 0, 4) == bytes(4)
        with pytest.raises(vu.StateError, match="nothing is mapped there for writing"):
            frontend.write_shared_memory(7, 0, b"!")


def test_only_one_mapping_is_read_at_a_time_and_nothing_beyond_it() -> None:
    device = Windows()
    with drive(device) as frontend:
        asked(device.map_shared_memory(0, 0, device.file, PAGE), frontend)
        assert frontend.read_shared_memory(0, 0, PAGE) == bytes(PAGE)
        for offset, size in [(1, PAGE), (PAGE, 1), (0, PAGE + 1), ((1 << 64) - 1, 2)]:
            with pytest.raises(vu.StateError):
                frontend.read_shared_memory(0, offset, size)
        with pytest.raises(vu.StateError):
            frontend.read_shared_memory(1, 0, 1)


def test_a_reset_takes_away_what_was_mapped() -> None:
    device = Windows()
    with drive(device) as frontend:
        asked(device.map_shared_memory(0, 0, device.file, PAGE), frontend)
        asked(device.set_host_notifier(device.requestq, device.file), frontend)
        frontend.reset()
        assert frontend.mappings(0) == []
        assert frontend.host_notifiers == []
        assert frontend.shared_memory == {0: 4 * PAGE, 7: PAGE}


def test_a_driver_notifies_by_the_page_that_the_device_gives() -> None:
    device = Windows()
    with drive(device) as frontend:
        with pytest.raises(vu.StateError, match="queue 0 has no host notifier"):
            frontend.notify_host(0)
        os.pwrite(device.file, b"\xff\xff", PAGE)
        asked(device.set_host_notifier(device.requestq, device.file, PAGE), frontend)
        assert frontend.host_notifiers == [0]
        frontend.notify_host(0)
        assert os.pread(device.file, 2, PAGE) == struct.pack("<H", 0)
        asked(device.remove_host_notifier(device.requestq), frontend)
        assert frontend.host_notifiers == []


def test_objects_are_announced_found_and_forgotten() -> None:
    device = Windows()
    with drive(device) as frontend:
        asked(device.add_shared_object(OURS), frontend)
        assert frontend.shared_objects == {OURS}
        file = frontend.get_shared_object(OURS)
        assert file is not None
        assert os.path.samestat(os.fstat(file), os.fstat(device.file))
        os.close(file)
        assert frontend.get_shared_object(UUID(int=0)) is None
        assert frontend.get_shared_object(THEIRS) is None
        asked(device.remove_shared_object(OURS), frontend)
        assert frontend.shared_objects == set()


def test_a_device_looks_up_an_object_of_somebody_else() -> None:
    device = Windows()
    with drive(device) as frontend:
        read, write = os.pipe()
        frontend.provide_shared_object(THEIRS, write)
        os.close(write)
        found = asked(device.look_up_shared_object(THEIRS), frontend)
        assert found is not None
        os.write(found, b"found")
        os.close(found)
        assert os.read(read, 100) == b"found"
        os.close(read)
        with pytest.raises(vu.ProtocolError, match="BACKEND_SHARED_OBJECT_LOOKUP: the front-end refused it"):
            asked(device.look_up_shared_object(OURS), frontend)


def test_the_device_itself_does_not_wait_for_an_answer_that_it_has_to_receive() -> None:
    class Impatient(Windows):
        failure: Exception | None = None

        def on_queue_start(self, queue: vu.DeviceQueue) -> None:
            try:
                self.add_shared_object(OURS).result()
            except vu.StateError as error:
                self.failure = error

    device = Impatient()
    with drive(device) as frontend:
        frontend.next_event()
        assert frontend.shared_objects == {OURS}
    assert "cannot wait for an answer" in str(device.failure)


def test_another_thread_waits_for_the_answer() -> None:
    device = Windows()
    with drive(device) as frontend:
        thread = threading.Thread(target=lambda: device.add_shared_object(OURS).result(raw.DEADLINE))
        thread.start()
        event = frontend.next_event()
        thread.join()
    assert event == vu.Event("shared_object", str(OURS))


def test_who_waits_is_told_when_the_front_end_is_gone() -> None:
    device = Windows()
    with drive(device) as frontend:
        answer = device.add_shared_object(OURS)
        frontend.close()
        with pytest.raises(vu.PeerClosed, match="BACKEND_SHARED_OBJECT_ADD"):
            answer.result(raw.DEADLINE)


def test_what_was_not_negotiated_is_not_asked_for() -> None:
    device = Windows()
    with drive(device, protocol=vu.ProtocolFeature.REPLY_ACK) as frontend:
        with pytest.raises(vu.StateError, match="needs the protocol feature SHMEM, which was not negotiated"):
            device.unmap_shared_memory(0, 0, PAGE)
        with pytest.raises(vu.StateError):
            frontend.get_shared_object(OURS)


@pytest.mark.parametrize("regions", [{256: PAGE}, {-1: PAGE}, {0: 0}, {0: PAGE + 1}])
def test_a_region_that_cannot_be_is_an_error_of_its_declaration(regions: dict[int, int]) -> None:
    device = Windows()
    device.shared_memory = regions
    ours, theirs = socket.socketpair()
    with ours, pytest.raises(vu.DeclarationError, match=r"Windows\.shared_memory has a region"):
        device.serve(fd=theirs.detach())
    os.close(device.file)


# --- A device and a front-end by the letter ---------------------------------------------------------------------------


def test_the_device_asks_as_the_specification_says(serve: Serve, connect: Connect, memory: raw.Memory) -> None:
    device = Windows()
    front = connect(serve(device))
    wanted = raw.SHMEM | raw.HOST_NOTIFIER | raw.SHARED_OBJECT | raw.BACKEND_SEND_FD | raw.BACKEND_REQ
    front.negotiate(protocol=raw.REPLY_ACK | wanted)
    channel = front.open_backend_channel()
    front.share(memory)
    front.start(raw.Ring(memory))

    answers = [
        device.map_shared_memory(7, 0, device.file, PAGE, file_offset=2 * PAGE, writable=False),
        device.unmap_shared_memory(7, 0, PAGE),
        device.set_host_notifier(device.requestq, device.file, PAGE),
        device.remove_host_notifier(device.requestq),
        device.add_shared_object(OURS),
        device.look_up_shared_object(THEIRS),
    ]
    expected = [
        (MAP, struct.pack("=B7xQQQQ", 7, 2 * PAGE, 0, PAGE, 0), 1),
        (UNMAP, struct.pack("=B7xQQQQ", 7, 0, 0, PAGE, 0), 0),
        (HOST_NOTIFIER, struct.pack("=QQQ", 0, PAGE, PAGE), 1),
        (HOST_NOTIFIER, struct.pack("=QQQ", 1 << 8, 0, 0), 0),
        (ADD, bytes.fromhex("00112233445566778899aabbccddeeff"), 0),
        (LOOKUP, bytes.fromhex("12345678123456781234567812345678"), 0),
    ]
    for request, payload, files in expected:
        message = channel.receive()
        assert (message.request, message.payload, len(message.descriptors)) == (request, payload, files)
        assert message.flags == (raw.REQUEST if request == LOOKUP else NEED_REPLY)
        for file in message.descriptors:
            assert os.path.samestat(os.fstat(file), os.fstat(device.file))
            os.close(file)
        channel.send(request, u64(0), [device.file] if request == LOOKUP else [], flags=REPLY)
    assert [answer.result(raw.DEADLINE) for answer in answers[:-1]] == [None] * 5
    found = answers[-1].result(raw.DEADLINE)
    assert found is not None
    os.close(found)

    config = front.get(Id.GET_SHMEM_CONFIG)
    assert config[:16] == struct.pack("=IIQ", 2, 0, 4 * PAGE)
    assert config[16:] == struct.pack("=255Q", *[PAGE if at == 7 else 0 for at in range(1, 256)])

    front.send(Id.GET_SHARED_OBJECT, OURS.bytes)
    reply = front.receive()
    assert (reply.request, reply.flags, reply.payload) == (Id.GET_SHARED_OBJECT, REPLY, b"")
    [file] = reply.descriptors
    os.close(file)
    assert front.get(Id.GET_SHARED_OBJECT, UUID(int=0).bytes) == b""
    # QEMU forgets to say which.
    assert front.get(Id.GET_SHARED_OBJECT) == b""


# --- A back-end that asks for what cannot be --------------------------------------------------------------------------


@pytest.fixture
def back_end(level: None) -> Iterator[tuple[vu.Frontend, raw.Channel]]:
    """A negotiated front-end, and the channel of a back-end that has one region of 4 pages."""
    ours, theirs = socket.socketpair()
    protocol = raw.REPLY_ACK | raw.BACKEND_REQ | raw.BACKEND_SEND_FD
    protocol |= raw.SHMEM | raw.HOST_NOTIFIER | raw.SHARED_OBJECT
    with vu.Frontend(ours, timeout=raw.DEADLINE) as frontend, BackEnd(theirs, protocol=protocol) as raw_back_end:
        sizes = struct.pack("=IIQ", 1, 0, 4 * PAGE) + bytes(255 * 8)
        raw_back_end.answers[Id.GET_SHMEM_CONFIG] = lambda message: raw_back_end.reply(message, sizes)
        frontend.negotiate()
        assert raw_back_end.channel is not None
        yield frontend, raw_back_end.channel


@pytest.fixture
def file(level: None) -> Iterator[int]:
    """Four pages."""
    number = os.memfd_create("window", os.MFD_CLOEXEC)
    os.truncate(number, 4 * PAGE)
    yield number
    os.close(number)


def ask(back_end: tuple[vu.Frontend, raw.Channel], request: int, payload: bytes, *files: int) -> int:
    """What the front-end answers to a request of the back-end."""
    frontend, channel = back_end
    channel.send(request, payload, files, flags=NEED_REPLY)
    assert frontend.next_event() is not None
    reply = channel.receive()
    assert (reply.request, reply.flags, reply.descriptors) == (request, REPLY, [])
    (status,) = struct.unpack("=Q", reply.payload)
    return int(status)


def window(offset: int, size: int, *, region: int = 0, file_offset: int = 0, flags: int = 1) -> bytes:
    return struct.pack("=B7xQQQQ", region, file_offset, offset, size, flags)


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(window(0, PAGE, region=1), id="a region that is not there"),
        pytest.param(window(0, 0), id="nothing"),
        pytest.param(window(0, PAGE + 1), id="a part of a page"),
        pytest.param(window(1, PAGE), id="between pages"),
        pytest.param(window(0, PAGE, file_offset=1), id="between pages of the file"),
        pytest.param(window(0, 5 * PAGE), id="more than the region"),
        pytest.param(window(4 * PAGE, PAGE), id="after the region"),
        pytest.param(window((1 << 64) - PAGE, 2 * PAGE), id="around the end of the address space"),
        pytest.param(window(0, PAGE, file_offset=4 * PAGE), id="after the end of the file"),
        pytest.param(window(0, PAGE, file_offset=(1 << 64) - PAGE), id="where no file is"),
        pytest.param(window(0, PAGE, flags=2), id="an unknown flag"),
        pytest.param(window(2 * PAGE, PAGE), id="what is mapped"),
        pytest.param(window(PAGE, 2 * PAGE), id="the begin of what is mapped"),
        pytest.param(window(0, 4 * PAGE), id="more than what is mapped"),
    ],
)
def test_a_mapping_that_cannot_be_is_refused(
    back_end: tuple[vu.Frontend, raw.Channel], file: int, payload: bytes
) -> None:
    assert ask(back_end, MAP, window(2 * PAGE, 2 * PAGE), file) == 0
    assert ask(back_end, MAP, payload, file) != 0
    assert back_end[0].mappings(0) == [(2 * PAGE, 2 * PAGE, True)]


@pytest.mark.parametrize("payload", [window(0, PAGE), window(PAGE, PAGE), window(0, 3 * PAGE), window(0, 0, region=9)])
def test_only_a_whole_mapping_is_unmapped(back_end: tuple[vu.Frontend, raw.Channel], file: int, payload: bytes) -> None:
    assert ask(back_end, MAP, window(0, 2 * PAGE), file) == 0
    assert ask(back_end, UNMAP, payload) != 0
    assert back_end[0].mappings(0) == [(0, 2 * PAGE, True)]
    assert ask(back_end, UNMAP, window(0, 2 * PAGE)) == 0
    assert back_end[0].mappings(0) == []


def test_a_file_that_may_not_be_written_to_is_not_mapped_for_writing(
    back_end: tuple[vu.Frontend, raw.Channel], file: int
) -> None:
    readable = os.open(f"/proc/self/fd/{file}", os.O_RDONLY)
    assert ask(back_end, MAP, window(0, PAGE), readable) != 0
    assert ask(back_end, MAP, window(0, PAGE, flags=0), readable) == 0
    os.close(readable)


@pytest.mark.parametrize("files", [0, 2])
def test_a_mapping_has_one_descriptor(back_end: tuple[vu.Frontend, raw.Channel], file: int, files: int) -> None:
    assert ask(back_end, MAP, window(0, PAGE), *[file] * files) != 0
    assert back_end[0].mappings(0) == []


@pytest.mark.parametrize(
    "area",
    [
        struct.pack("=QQQ", 0, 2 * PAGE, 0),
        struct.pack("=QQQ", 0, 0, 0),
        struct.pack("=QQQ", 0, PAGE, 1),
        struct.pack("=QQQ", 0, PAGE, 4 * PAGE),
        struct.pack("=QQQ", 1 << 9, PAGE, 0),
    ],
)
def test_a_host_notifier_is_one_page(back_end: tuple[vu.Frontend, raw.Channel], file: int, area: bytes) -> None:
    assert ask(back_end, HOST_NOTIFIER, area, file) != 0
    assert back_end[0].host_notifiers == []


def test_an_object_is_added_once_and_removed_by_its_owner(back_end: tuple[vu.Frontend, raw.Channel], file: int) -> None:
    frontend, _ = back_end
    frontend.provide_shared_object(THEIRS, file)
    for request, uuid, granted in [
        (ADD, OURS, True),
        (ADD, OURS, False),
        (ADD, THEIRS, False),
        (REMOVE, THEIRS, False),
        (LOOKUP, OURS, False),
        (REMOVE, OURS, True),
        (REMOVE, OURS, False),
        (LOOKUP, OURS, False),
    ]:
        assert (ask(back_end, request, uuid.bytes) == 0) is granted
    assert ask(back_end, ADD, OURS.bytes) == 0
    with pytest.raises(vu.StateError, match="is the back-end's"):
        frontend.provide_shared_object(OURS, file)


def test_a_back_end_cannot_add_objects_without_end(back_end: tuple[vu.Frontend, raw.Channel]) -> None:
    statuses = [ask(back_end, ADD, UUID(int=number).bytes) for number in range(1025)]
    assert statuses[:-1] == [0] * 1024
    assert statuses[-1] != 0


def test_what_the_front_end_did_not_negotiate_is_refused(level: None, file: int) -> None:
    ours, theirs = socket.socketpair()
    with (
        vu.Frontend(ours, timeout=raw.DEADLINE) as frontend,
        BackEnd(theirs, protocol=raw.REPLY_ACK | raw.BACKEND_REQ) as raw_back_end,
    ):
        frontend.negotiate()
        assert raw_back_end.channel is not None
        pair = (frontend, raw_back_end.channel)
        assert ask(pair, MAP, window(0, PAGE), file) != 0
        assert ask(pair, ADD, OURS.bytes) != 0
        assert ask(pair, LOOKUP, OURS.bytes) != 0
        assert frontend.shared_objects == set()


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(struct.pack("=IIQ", 2, 0, PAGE) + bytes(2040), id="another number of regions"),
        pytest.param(struct.pack("=IIQ", 1, 0, PAGE + 1) + bytes(2040), id="a part of a page"),
        pytest.param(bytes(8), id="too short"),
    ],
)
def test_regions_that_make_no_sense_end_the_session(level: None, answer: bytes) -> None:
    ours, theirs = socket.socketpair()
    with vu.Frontend(ours, timeout=raw.DEADLINE) as frontend, BackEnd(theirs, protocol=raw.SHMEM) as raw_back_end:
        raw_back_end.answers[Id.GET_SHMEM_CONFIG] = lambda message: raw_back_end.reply(message, answer)
        with pytest.raises(vu.ProtocolError, match="GET_SHMEM_CONFIG"):
            frontend.negotiate()


@pytest.mark.parametrize(("payload", "files"), [(THEIRS.bytes, 1), (OURS.bytes, 2), (b"", 2), (b"short", 1)])
def test_an_object_that_makes_no_sense_ends_the_session_and_leaks_nothing(
    back_end: tuple[vu.Frontend, raw.Channel], payload: bytes, files: int
) -> None:
    ours, theirs = socket.socketpair()
    read, write = os.pipe()
    with vu.Frontend(ours, timeout=raw.DEADLINE) as frontend, BackEnd(theirs, protocol=raw.SHARED_OBJECT) as end:
        end.answers[Id.GET_SHARED_OBJECT] = lambda message: end.send(
            message.request, payload, [write] * files, flags=REPLY
        )
        frontend.negotiate()
        with pytest.raises(vu.ProtocolError, match="GET_SHARED_OBJECT"):
            frontend.get_shared_object(OURS)
    os.close(write)
    assert os.read(read, 1) == b""
    os.close(read)
