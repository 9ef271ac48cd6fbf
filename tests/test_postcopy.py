"""What a front-end may rely on that starts a device while guest memory is still on its way.

The device is in another process: while it waits for a page, nothing else goes on in its interpreter.

vhost-user specification, "Migration".
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import raw
import vhost_user as vu
from raw import (
    CONFIGURE_MEM_SLOTS,
    MQ,
    PROTOCOL_FEATURES,
    REPLY_ACK,
    VERSION_1,
    Eventfd,
    FrontEnd,
    Id,
    Memory,
    Ring,
    u64,
)
from specimens import Connect, Reverse, Serve, needs_userfault

pytestmark = needs_userfault

PAGE = 4096
PAGEFAULT = 1 << 8
ADVISE, LISTEN, END = 28, 29, 30

DEVICE = """
import sys
import vhost_user as vu

class Reverse(vu.Device, device_id=0x7FFF):
    requestq = vu.Queue()
    postcopy = True

    @requestq.handler
    def reverse(self, request):
        request.write(request.read()[::-1])

    def on_disconnect(self, error):
        print(error, flush=True)

with Reverse().start(sys.argv[1]) as server:
    print("listening", flush=True)
    server.wait()
"""


@pytest.fixture
def device(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Serves at `reverse.sock`; a line on its standard output tells why a front-end is gone."""
    command = [sys.executable, "-c", DEVICE, str(tmp_path / "reverse.sock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "listening\n"
        yield process
        process.kill()


@pytest.fixture
def front(device: subprocess.Popen[str], tmp_path: Path) -> Iterator[FrontEnd]:
    with FrontEnd(tmp_path / "reverse.sock") as front:
        yield front


@pytest.fixture
def frontend(device: subprocess.Popen[str], tmp_path: Path) -> Iterator[vu.Frontend]:
    with vu.Frontend.connect(tmp_path / "reverse.sock", timeout=30) as frontend:
        yield frontend.negotiate(protocol=vu.ProtocolFeature(PAGEFAULT | REPLY_ACK | MQ))


# --- On the wire ------------------------------------------------------------------------------------------------------


def advise(front: FrontEnd) -> int:
    """Returns the back-end's userfaultfd."""
    front.send(ADVISE)
    reply = front.receive()
    assert (reply.request, reply.payload) == (ADVISE, b"")
    [userfault] = reply.descriptors
    return userfault


def listen(front: FrontEnd) -> int:
    """As far as memory may be shared. Returns the same."""
    front.negotiate(PROTOCOL_FEATURES | VERSION_1, REPLY_ACK | MQ | PAGEFAULT)
    userfault = advise(front)
    assert front.ask(LISTEN) == 0
    return userfault


def share(front: FrontEnd, memory: Memory) -> int:
    """Returns where the back-end has mapped it."""
    front.send(Id.SET_MEM_TABLE, raw.memory_table(memory.region), [memory.descriptor])
    reply = front.reply_to(Id.SET_MEM_TABLE)
    (base,) = struct.unpack_from("=Q", reply, 24)
    assert reply == raw.memory_table(memory.describe(user=base))
    return int(base)


def provide(userfault: int, address: int, page: bytes) -> None:
    """UFFDIO_COPY, as the kernel's headers have it."""
    source = ctypes.create_string_buffer(page, PAGE)
    fcntl.ioctl(userfault, 0xC028AA03, bytearray(struct.pack("=QQQQq", address, ctypes.addressof(source), PAGE, 0, 0)))


def test_a_device_works_on_a_ring_and_buffers_whose_pages_come_when_it_touches_them(front: FrontEnd) -> None:
    userfault = listen(front)
    asked: list[int] = []
    with Memory() as before, Memory() as after:
        stop = front.own(Eventfd())
        ring = Ring(before)
        question, answer = before.allocate(PAGE, PAGE), before.allocate(PAGE, PAGE)
        before.write(question, b"abc")
        before.write(answer, b"x" * PAGE)
        ring.add_pieces([(question, 3, 0), (answer, 3, raw.WRITE)])
        base = share(front, after)

        def serve() -> None:
            while stop.peer not in select.select([userfault, stop.peer], [], [])[0]:
                event = os.read(userfault, 32)
                address = struct.unpack_from("=Q", event, 16)[0] - base + after.guest
                asked.append(address)
                provide(userfault, base + address - after.guest, before.read(address, PAGE))

        server = threading.Thread(target=serve)
        server.start()
        try:
            front.tell(Id.SET_MEM_TABLE, u64(0))
            call = front.set_call(ring)
            front.start(ring)
            front.kick(ring)
            assert call.came()
        finally:
            stop.signal()
            server.join()
        assert front.get_u64(END) == 0
        # What was looked at on this side before would not have been missing.
        assert after.read(ring.used + 2, 2) == b"\x01\x00"
        assert after.read(answer, PAGE) == b"cba" + b"x" * (PAGE - 3)
        assert sorted(asked) == [ring.descriptors, question, answer]
    os.close(userfault)


def test_steps_out_of_order_are_refused(serve: Serve, connect: Connect, memory: Memory) -> None:
    device = Reverse()
    device.postcopy = True
    path = serve(device)
    front = connect(path)
    front.negotiate(PROTOCOL_FEATURES | VERSION_1, REPLY_ACK | MQ | PAGEFAULT)
    assert front.ask(LISTEN) != 0
    userfault = advise(front)
    front.share(memory)
    assert front.ask(LISTEN) != 0
    assert front.get_u64(END) == 0
    os.close(userfault)
    front.close()

    front = connect(path)
    userfault = listen(front)
    assert front.ask(LISTEN) != 0
    assert front.ask(Id.SET_MEM_TABLE, u64(0)) != 0
    share(front, memory)
    front.tell(Id.SET_MEM_TABLE, u64(0))
    assert front.ask(Id.SET_MEM_TABLE, u64(0)) != 0
    front.send(ADVISE)
    assert front.is_closed()
    os.close(userfault)


def test_it_is_offered_by_a_device_that_asks_for_it_in_place_of_memory_slots(serve: Serve, connect: Connect) -> None:
    device = Reverse()
    offered = connect(serve(device)).get_u64(Id.GET_PROTOCOL_FEATURES)
    assert offered & (PAGEFAULT | CONFIGURE_MEM_SLOTS) == CONFIGURE_MEM_SLOTS
    device = Reverse()
    device.postcopy = True
    offered = connect(serve(device)).get_u64(Id.GET_PROTOCOL_FEATURES)
    assert offered & (PAGEFAULT | CONFIGURE_MEM_SLOTS) == PAGEFAULT


# --- The driver's half ------------------------------------------------------------------------------------------------


def test_pages_are_provided_as_the_device_touches_them(frontend: vu.Frontend) -> None:
    after = vu.Memory(1 << 20)
    with frontend.postcopy(after, page=lambda address: bytes([address >> 12 & 0xFF]) * PAGE) as late:
        [(start, size)] = after.regions
        last = start + size - PAGE
        assert late.provide(last, b"y" * PAGE)
        assert not late.provide(last, b"z" * PAGE)
        # The answer ends in a page that nobody has looked at yet.
        assert frontend.queue(0).request(b"a" * (PAGE - 1), PAGE - 1) == b"a" * (PAGE - 1)
    assert late.provided
    assert after.read(late.provided[-1] + PAGE - 1, 1) == bytes([late.provided[-1] >> 12 & 0xFF])
    assert after.read(last, PAGE) == b"y" * PAGE


def test_a_device_that_waits_for_a_page_survives_its_front_end(
    frontend: vu.Frontend, device: subprocess.Popen[str], tmp_path: Path
) -> None:
    held: list[int] = []

    def never(address: int) -> bytes:
        # As long as somebody holds a copy, the kernel waits.
        held.append(os.dup(late.fileno()))
        raise vu.StateError("the source is gone")

    late = frontend.postcopy(vu.Memory(1 << 20), page=never)
    request = frontend.queue(0).submit(b"a" * (PAGE - 1), PAGE - 1)
    assert device.stdout
    assert "went away before all of guest memory was there" in device.stdout.readline()
    # The device has gone on without that page: whatever it has answered since is not the answer.
    with pytest.raises(vu.StateError, match="a page of guest memory cannot be provided: the source is gone"):
        request.wait()
    with vu.Frontend.connect(tmp_path / "reverse.sock", timeout=30) as other:
        assert other.negotiate().queue(0).request(b"abc", 3) == b"cba"
    [fd] = held
    os.close(fd)


def test_what_postcopy_needs_is_told(serve: Serve) -> None:
    device = Reverse()
    device.postcopy = True
    with vu.Frontend.connect(serve(device)) as frontend:
        frontend.negotiate()
        assert not frontend.protocol & vu.ProtocolFeature.PAGEFAULT
        with pytest.raises(vu.StateError, match="POSTCOPY_ADVISE needs the protocol feature PAGEFAULT"):
            frontend.postcopy(vu.Memory(PAGE), page=bytes)
    with vu.Frontend.connect(serve(Reverse())) as frontend:
        frontend.negotiate()
        with pytest.raises(vu.StateError, match="CONFIGURE_MEM_SLOTS"):
            frontend.postcopy(vu.Memory(PAGE), page=bytes)


def test_what_the_documentation_shows_works(device: subprocess.Popen[str], tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "migration.md").read_text()
    shown: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, shown)
    before = vu.Memory(1 << 20)
    with vu.Frontend.connect(tmp_path / "reverse.sock", timeout=30) as frontend:
        assert shown["continue_elsewhere"](frontend, before)
    assert shown["Sleepless"].postcopy
