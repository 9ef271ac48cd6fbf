"""Kicks and calls as messages. vhost-user specification, "In-band notifications"."""

from __future__ import annotations

import struct
import threading
from pathlib import Path

import pytest

import vhost_user as vu
from raw import (
    BACKEND_REQ,
    INBAND,
    MQ,
    NEED_REPLY,
    REPLY,
    REPLY_ACK,
    Channel,
    FrontEnd,
    Id,
    Memory,
    Ring,
    u64,
    vring_state,
)
from specimens import NO_TYPE, Connect, Hold, Reverse, Serve
from vhost_user.devices.rng import Rng
from vhost_user.guest import Uml

VRING_CALL, VRING_ERR = 4, 5
IN_BAND = vu.ProtocolFeature.INBAND_NOTIFICATIONS | vu.ProtocolFeature.REPLY_ACK | vu.ProtocolFeature.BACKEND_REQ


class InBand(FrontEnd):
    """A raw front-end that gives no descriptors but that of the channel."""

    def set_up(self, memory: Memory) -> tuple[Ring, Channel]:
        self.negotiate(protocol=REPLY_ACK | MQ | BACKEND_REQ | INBAND)
        channel = self.open_backend_channel()
        self.share(memory)
        ring = Ring(memory)
        self.place(ring)
        return ring, channel

    def kick_in_band(self, ring: Ring) -> None:
        self.tell(Id.VRING_KICK, vring_state(ring.index))


def opted_in(device: vu.Device) -> vu.Device:
    device.in_band = True
    return device


def acknowledge(channel: Channel, request: int) -> None:
    """Receive a notification of queue 0, and answer it."""
    message = channel.receive()
    assert (message.request, message.flags, message.payload) == (request, NEED_REPLY, vring_state(0))
    channel.send(request, u64(0), flags=REPLY)


def test_in_band_notifications_are_offered_by_a_device_that_asks_for_them(serve: Serve) -> None:
    with vu.Frontend.connect(serve(Reverse())) as frontend:
        assert not frontend.negotiate().offered_protocol & vu.ProtocolFeature.INBAND_NOTIFICATIONS
    with vu.Frontend.connect(serve(opted_in(Reverse()))) as frontend:
        assert frontend.negotiate().offered_protocol & vu.ProtocolFeature.INBAND_NOTIFICATIONS
        assert not frontend.protocol & vu.ProtocolFeature.INBAND_NOTIFICATIONS


@pytest.mark.parametrize("without", [REPLY_ACK, BACKEND_REQ])
def test_in_band_notifications_need_a_channel_and_acknowledgements(
    serve: Serve, connect: Connect, without: int
) -> None:
    front = connect(serve(opted_in(Reverse())))
    front.tell(Id.SET_OWNER)
    assert front.ask(Id.SET_PROTOCOL_FEATURES, u64((REPLY_ACK | BACKEND_REQ | INBAND) & ~without)) != 0
    front.tell(Id.SET_PROTOCOL_FEATURES, u64(REPLY_ACK | BACKEND_REQ | INBAND))


def test_a_kick_message_is_refused_unless_it_was_negotiated(serve: Serve, connect: Connect, memory: Memory) -> None:
    front = connect(serve(opted_in(Reverse())))
    front.negotiate()
    front.share(memory)
    front.place(Ring(memory))
    assert front.ask(Id.VRING_KICK, vring_state(0)) != 0


def test_the_first_kick_message_starts_the_ring_and_calls_are_messages(serve: Serve, memory: Memory) -> None:
    with InBand(serve(opted_in(Reverse()))) as front:
        ring, channel = front.set_up(memory)
        chain = ring.add([b"abc"], [8])
        front.enable(ring)
        assert channel.is_silent()
        assert ring.take() == []
        front.kick_in_band(ring)
        acknowledge(channel, VRING_CALL)
        [(head, length)] = ring.wait()
        assert (head, chain.written(length)) == (chain.head, b"cba")


def test_a_kick_is_acknowledged_before_anything_is_done_about_it(serve: Serve, memory: Memory) -> None:
    # The front-end may be unable to do anything else until then: User-Mode Linux holds a lock.
    proceed = threading.Event()

    class Slow(Reverse):
        def on_queue_start(self, queue: vu.DeviceQueue) -> None:
            assert proceed.wait(30)

    with InBand(serve(opted_in(Slow()))) as front:
        ring, channel = front.set_up(memory)
        front.enable(ring)
        ring.add([b"abc"], [8])
        front.kick_in_band(ring)
        assert channel.is_silent()
        proceed.set()
        acknowledge(channel, VRING_CALL)


def test_calls_that_nobody_has_acknowledged_are_not_repeated(serve: Serve, memory: Memory) -> None:
    device = Hold()
    with InBand(serve(opted_in(device))) as front:
        ring, channel = front.set_up(memory)
        front.enable(ring)
        for _ in range(3):
            ring.add([b"x"], [1])
        front.kick_in_band(ring)
        for _ in range(3):
            device.next().complete()
        assert channel.receive().request == VRING_CALL
        assert channel.is_silent()
        channel.send(VRING_CALL, u64(0), flags=REPLY)
        # What was completed since is announced once.
        acknowledge(channel, VRING_CALL)
        assert channel.is_silent()


def test_a_ring_that_breaks_says_so_in_a_message(serve: Serve, memory: Memory) -> None:
    with InBand(serve(opted_in(Reverse()))) as front:
        ring, channel = front.set_up(memory)
        front.enable(ring)
        ring.offer(ring.size)
        front.kick_in_band(ring)
        acknowledge(channel, VRING_ERR)


def test_descriptors_are_preferred_to_messages(serve: Serve, memory: Memory) -> None:
    with InBand(serve(opted_in(Reverse()))) as front:
        ring, channel = front.set_up(memory)
        call = front.set_call(ring)
        front.set_kick(ring)
        front.enable(ring)
        front.exchange(ring, b"x", 1)
        assert call.came()
        assert channel.is_silent()


def test_a_front_end_that_acknowledges_nothing_does_not_stop_the_device(serve: Serve, memory: Memory) -> None:
    with InBand(serve(opted_in(Reverse()))) as front:
        ring, channel = front.set_up(memory)
        front.enable(ring)
        for number in range(100):
            chain = ring.add([struct.pack("=H", number)], [2])
            front.kick_in_band(ring)
            [(_, length)] = ring.wait()
            assert chain.written(length) == struct.pack("=H", number)[::-1]
        channel.close()
        ring.add([b"x"], [1])
        front.kick_in_band(ring)
        ring.wait()


def test_our_own_front_end_works_in_band(serve: Serve) -> None:
    with vu.Frontend.connect(serve(opted_in(Reverse()))) as frontend:
        queue = frontend.negotiate(protocol=IN_BAND).queue(0)
        for number in range(100):
            assert queue.submit(struct.pack("=I", number), writable=4).wait() == struct.pack("=I", number)[::-1]
        pending = [queue.submit(bytes([number]), writable=1) for number in range(50)]
        assert [request.wait() for request in pending] == [bytes([number]) for number in range(50)]


def test_our_own_front_end_is_told_of_a_ring_that_broke(serve: Serve) -> None:
    class Small(Reverse, device_id=NO_TYPE):
        requestq = vu.Queue(max_request=16)

        @requestq.handler
        def ignore(self, request: vu.Request) -> None:
            pass

    with vu.Frontend.connect(serve(opted_in(Small()))) as frontend:
        completion = frontend.negotiate(protocol=IN_BAND).queue(0).submit(bytes(17))
        with pytest.raises(vu.ProtocolError, match="queue 0: the back-end reports that the ring is broken"):
            completion.wait(60)


def test_a_guest_reads_random_numbers_in_band(tmp_path: Path) -> None:
    device = Rng()
    device.in_band = True
    with device.start(tmp_path / "rng.sock"), Uml([(tmp_path / "rng.sock", vu.DeviceId.RNG)]) as guest:
        assert len(guest.run("head -c 4096 /dev/hwrng").stdout) == 4096
        assert device.requestq.statistics.kicks > 0
