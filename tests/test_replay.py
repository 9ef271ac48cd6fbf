"""A recorded front-end, sent again."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import raw
import vhost_user as vu
from raw import Id
from specimens import Reverse, Serve
from storage_daemon import storage_daemon
from vhost_user.devices import Blk, Rng
from vhost_user.guest import Uml
from vhost_user.trace import pcapng
from vhost_user.trace.model import Record
from vhost_user.trace.proxy import Proxy, running
from vhost_user.trace.read import read
from vhost_user.trace.replay import replay
from vhost_user.trace.views import JsonLines

Talk = Callable[[Path], None]


@pytest.fixture
def record(level: None, tmp_path: Path) -> Callable[[Path, Talk], list[Record]]:
    """What a front-end says to a back-end until the end of both connections."""

    def see(back_end: Path, talk: Talk) -> list[Record]:
        records: list[Record] = []
        with running(Proxy(tmp_path / "traced", back_end, records.append)) as proxy:
            talk(tmp_path / "traced")
            raw.wait_until(lambda: not proxy.front_ends, "the end of the connection")
        return records

    return see


Recorded = Callable[[Path, Talk], list[Record]]


def boot(device_id: int, command: str) -> Talk:
    def talk(path: Path) -> None:
        with Uml([(path, device_id)]) as guest:
            guest.run(command)

    return talk


def write(records: list[Record], folder: Path) -> tuple[Path, Path]:
    """The records in a file of each kind."""
    lines, packets = folder / "trace.jsonl", folder / "trace.pcapng"
    with lines.open("w") as text:
        write_line = JsonLines(text)
        for each in records:
            write_line(each)
    with packets.open("wb") as out:
        write_packet = pcapng.Writer(out)
        for each in records:
            write_packet(each)
    return lines, packets


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vhost_user", "replay", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def differences(records: list[Record], back_end: Path, timeout: float = 5.0) -> list[str]:
    return [str(difference) for difference in replay(records, back_end, timeout=timeout).differences]


def test_a_guest_that_is_sent_again_gets_the_same_answers(serve: Serve, record: Recorded, tmp_path: Path) -> None:
    rng = serve(Rng())
    records = record(rng, boot(vu.DeviceId.RNG, "head -c 64 /dev/hwrng"))
    requests = sum(each.event == "message" and each.sender == "front-end" for each in records)
    answers = sum(each.is_answer for each in records)
    for file in write(records, tmp_path):
        ended = run(file, "--connect", rng)
        assert ended.stdout == f"{requests} messages sent, {answers} answers as recorded, no differences\n"
        assert ended.returncode == 0


def test_what_another_device_answers_is_shown(serve: Serve, record: Recorded, tmp_path: Path) -> None:
    records = record(serve(Rng()), boot(vu.DeviceId.RNG, "head -c 64 /dev/hwrng"))
    lines, _ = write(records, tmp_path)
    ended = run(lines, "--connect", serve(Blk(1 << 20, num_queues=2)))
    assert ended.returncode == 1
    assert "GET_FEATURES: the answer differs: +bit 2 +bit 6" in ended.stdout
    assert "GET_PROTOCOL_FEATURES: the answer differs: +CONFIG\n" in ended.stdout
    assert "GET_QUEUE_NUM: the answer differs: value is 2, recorded was 1\n" in ended.stdout
    assert "differences" in ended.stdout.splitlines()[-1]
    named = run(lines, "--connect", serve(Blk(1 << 20, num_queues=2)), "--device", "blk")
    assert "GET_FEATURES: the answer differs: +SEG_MAX +BLK_SIZE +FLUSH" in named.stdout


def test_bits_that_differ_have_the_names_of_the_device_type_that_shows_later(
    serve: Serve, record: Recorded, tmp_path: Path
) -> None:
    def talk(path: Path) -> None:
        with vu.Frontend.connect(path) as frontend:
            frontend.negotiate()
            frontend.read_config(60)

    records = record(serve(Blk(1 << 20, num_queues=2)), talk)
    found = differences(records, serve(Blk(1 << 20, num_queues=2, read_only=True)))
    assert "message 2: GET_FEATURES: the answer differs: -DISCARD -WRITE_ZEROES +RO" in found


def test_a_back_end_that_nobody_here_wrote_answers_as_before(level: None, record: Recorded, tmp_path: Path) -> None:
    with storage_daemon(tmp_path) as disk:
        records = record(disk, boot(vu.DeviceId.BLOCK, "dd if=/dev/vda of=/dev/null bs=512 count=8 status=none"))
        assert differences(records, disk) == []


def drive(base: int) -> Talk:
    """A front-end that starts a ring, has two requests done, and stops it."""

    def talk(path: Path) -> None:
        with raw.FrontEnd(path) as guest, raw.Memory() as memory:
            guest.negotiate()
            guest.share(memory)
            ring = raw.Ring(memory)
            ring.clear(base)
            guest.set_call(ring)
            guest.set_error(ring)
            guest.start(ring, base)
            for _ in range(2):
                guest.exchange(ring, b"abc", 3)
            guest.stop(ring)
            assert guest.get_u64(Id.GET_FEATURES)

    return talk


@pytest.mark.parametrize("base", [0, 7, 65535])
def test_rings_begin_at_their_base_and_how_far_they_got_is_not_compared(
    serve: Serve, record: Recorded, base: int, caplog: pytest.LogCaptureFixture
) -> None:
    device = serve(Reverse())
    records = record(device, drive(base))
    assert differences(records, device) == []
    assert caplog.text == "", "the ring broke"


class Chatty(vu.Device, device_id=0x7FFF):
    """Has news for the driver as soon as it is there."""

    requestq = vu.Queue()
    news = vu.config.u32()

    def on_queue_start(self, queue: vu.DeviceQueue) -> None:
        self.news += 1


def test_what_the_back_end_asks_is_answered(serve: Serve, record: Recorded) -> None:
    device = Chatty()
    path = serve(device)

    def talk(path: Path) -> None:
        with raw.FrontEnd(path) as guest, raw.Memory() as memory:
            guest.negotiate(protocol=raw.REPLY_ACK | raw.CONFIG | raw.BACKEND_REQ)
            channel = guest.open_backend_channel()
            guest.share(memory)
            guest.start(raw.Ring(memory))
            assert channel.receive().request == raw.CONFIG_CHANGE
            channel.send(raw.CONFIG_CHANGE, raw.u64(0), flags=raw.REPLY)
            assert guest.get_u64(Id.GET_FEATURES)

    records = record(path, talk)
    shown: list[Record] = []
    assert replay(records, path, show=shown.append).differences == []
    assert device.news == 2
    raw.wait_until(lambda: any(each.channel == "back-end" for each in shown), "the back-end asks")


def test_a_front_end_that_talks_nonsense_is_cut_off_again(serve: Serve, record: Recorded) -> None:
    def talk(path: Path) -> None:
        with raw.FrontEnd(path) as guest, contextlib.closing(raw.Eventfd()) as call:
            guest.negotiate()
            message = raw.HEADER.pack(Id.SET_VRING_CALL, raw.NEED_REPLY, 8) + raw.vring_descriptor(0)
            guest.send_bytes(message[:14])
            guest.wait_until_read()
            guest.send_bytes(message[14:], [call.peer])
            guest.reply_to(Id.SET_VRING_CALL)
            guest.send(77, b"?")
            assert guest.is_closed()

    device = serve(Reverse())
    records = record(device, talk)
    assert records[-1].sender == "back-end"
    assert differences(records, device) == []


# --- Back-ends that do not do as recorded -----------------------------------------------------------------------------


@pytest.fixture
def back_end(level: None, tmp_path: Path) -> Iterator[Callable[[Callable[[raw.Channel], None]], Path]]:
    """A back-end that does something with one connection."""
    with contextlib.ExitStack() as stack:

        def start(behave: Callable[[raw.Channel], None]) -> Path:
            path = tmp_path / "other"
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(path))
            stack.callback(path.unlink)
            listener.listen()

            def serve() -> None:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(ConnectionError):
                    behave(raw.Channel(connection))

            thread = threading.Thread(target=serve)
            thread.start()
            stack.callback(thread.join)
            return path

        yield start


BackEnd = Callable[[Callable[[raw.Channel], None]], Path]


def negotiate(path: Path) -> None:
    with raw.FrontEnd(path) as guest:
        guest.get_u64(Id.GET_FEATURES)
        guest.negotiate()


def until_closed(channel: raw.Channel) -> None:
    while channel.socket.recv(4096):
        pass


def test_an_answer_that_does_not_come_is_not_waited_for_longer(
    serve: Serve, record: Recorded, back_end: BackEnd
) -> None:
    records = record(serve(Reverse()), negotiate)
    found = differences(records, back_end(until_closed), timeout=0.2)
    assert found == ["message 1: GET_FEATURES: no answer within 0.2 s"]


def test_a_back_end_that_leaves_is_told(serve: Serve, record: Recorded, back_end: BackEnd) -> None:
    records = record(serve(Reverse()), negotiate)

    def leave(channel: raw.Channel) -> None:
        channel.receive()

    assert differences(records, back_end(leave)) == [
        "message 1: GET_FEATURES: the back-end closed the connection instead of answering"
    ]


def test_other_flags_and_other_requests_are_told(serve: Serve, record: Recorded, back_end: BackEnd) -> None:
    records = record(serve(Reverse()), negotiate)
    (features,) = [each.payload for each in records if each.is_answer and each.header[0] == Id.GET_FEATURES]

    def answer_wrong(channel: raw.Channel) -> None:
        channel.receive()
        channel.send(Id.GET_FEATURES, features, flags=0xD)
        channel.receive()
        channel.send(Id.SET_FEATURES, raw.u64(0), flags=raw.REPLY)
        channel.receive()
        channel.send(Id.SET_PROTOCOL_FEATURES, raw.u64(1), flags=raw.REPLY)
        channel.receive()
        channel.send(Id.SET_FEATURES, raw.u64(0), flags=raw.REPLY)
        channel.send(Id.SET_FEATURES, raw.u64(0), flags=raw.REPLY)
        until_closed(channel)

    assert differences(records, back_end(answer_wrong)) == [
        "message 1: GET_FEATURES: the answer has the flags 0xd; recorded was 0x5",
        "message 2: SET_OWNER: the answer is one to SET_FEATURES",
        "message 3: SET_PROTOCOL_FEATURES: the answer differs: value is 1, recorded was 0",
        "message 4: SET_FEATURES: an answer came where none was recorded",
    ]


# --- Files that are no traces -----------------------------------------------------------------------------------------


def test_a_file_that_is_no_trace_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for content, said in [
        (b"hello\n", "line 1: this is not of a trace"),
        (b"{}\n", "line 1: this is not of a trace"),
        (b"", "the trace has no connection"),
        (b"\x0a\x0d\x0d\x0a", "the file ends within a block"),
    ]:
        file.write_bytes(content)
        ended = run(file, "--connect", tmp_path / "nobody")
        assert ended.returncode == 1
        assert said in ended.stderr
    assert "No such file" in run(tmp_path / "none", "--connect", tmp_path / "nobody").stderr


def test_a_back_end_that_is_not_there_is_told(serve: Serve, record: Recorded, tmp_path: Path) -> None:
    lines, _ = write(record(serve(Reverse()), negotiate), tmp_path)
    ended = run(lines, "--connect", tmp_path / "nobody")
    assert ended.returncode == 1
    assert f"{tmp_path}/nobody: No such file or directory" in ended.stderr


def test_one_connection_of_several_is_chosen(serve: Serve, record: Recorded, tmp_path: Path) -> None:
    device = serve(Reverse())
    first = record(device, negotiate)
    second = [replace(each, connection=2) for each in record(device, drive(0))]
    lines, _ = write(first + second, tmp_path)
    assert run(lines, "--connect", device).stdout.startswith("4 messages sent")
    messages = sum(each.event == "message" and each.sender == "front-end" for each in second)
    assert run(lines, "--connect", device, "--connection", 2).stdout.startswith(f"{messages} messages sent")
    assert "no message of a front-end in connection 3" in run(lines, "--connect", device, "--connection", 3).stderr
    assert list(read(lines)) == first + second


def test_the_new_session_can_be_shown(serve: Serve, record: Recorded, tmp_path: Path) -> None:
    device = serve(Reverse())
    lines, _ = write(record(device, negotiate), tmp_path)
    shown = run(lines, "--connect", device, "--show").stdout
    assert "<-  SET_OWNER                 ok" in shown
