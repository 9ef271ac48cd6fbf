"""Both formats of rings, in any order and in the driver's: devices and front-ends over real sockets and memory."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

import vhost_user as vu
from specimens import Hold, Reverse, ReverseMany, Serve

SHORT = 0.2
PACKED, IN_ORDER = vu.TransportFeature.RING_PACKED, vu.TransportFeature.IN_ORDER


class Rings(NamedTuple):
    packed: bool
    in_order: bool

    @property
    def sizes(self) -> list[int]:
        return [1, 2, 3, 7, 100, 256, 1000] if self.packed else [1, 2, 64, 256, 1024]


@pytest.fixture(
    params=[Rings(packed, in_order) for packed in (False, True) for in_order in (False, True)],
    ids=["split", "split-in_order", "packed", "packed-in_order"],
)
def rings(request: pytest.FixtureRequest) -> Rings:
    chosen: Rings = request.param
    return chosen


Connected = Callable[[vu.Device], vu.Frontend]


@pytest.fixture
def connect(serve: Serve, rings: Rings) -> Iterator[Connected]:
    """A front-end of a device, negotiated with the rings in question."""
    with contextlib.ExitStack() as front_ends:

        def start(device: vu.Device) -> vu.Frontend:
            device.packed_rings, device.in_order = rings
            frontend = front_ends.enter_context(vu.Frontend.connect(serve(device))).negotiate()
            assert (bool(frontend.features & PACKED), bool(frontend.features & IN_ORDER)) == rings
            return frontend

        yield start


def test_nothing_but_split_rings_in_any_order_is_offered_unasked(serve: Serve) -> None:
    with vu.Frontend.connect(serve(Reverse())) as frontend:
        assert not frontend.negotiate().offered_features & (PACKED | IN_ORDER)


def test_requests_go_around_rings_of_every_size(connect: Connected, rings: Rings) -> None:
    frontend = connect(Reverse())
    for size in rings.sizes:
        queue = frontend.queue(0, size)
        for number in range(2 * size + 3 if size < 256 else 20):
            word = b"%d!" % number
            assert queue.request([word[:1], word[1:]], [1, 9]) == word[::-1]
        queue.stop()


def test_chains_of_several_descriptors_lie_across_the_end(connect: Connected, rings: Rings) -> None:
    queue = connect(Reverse()).queue(0, 7 if rings.packed else 8, indirect=False)
    for number in range(40):
        readable = [b"%d" % number] * (1 + number % 3)
        assert queue.request(readable, [1, 20]) == b"".join(readable)[::-1]


def test_a_size_that_the_format_has_not_is_refused(connect: Connected, rings: Rings) -> None:
    frontend = connect(Reverse())
    if rings.packed:
        assert frontend.queue(0, 48).request(b"ab", 2) == b"ba"
        return
    with pytest.raises(vu.StateError, match="queue 0 cannot have 48 entries; a split ring needs a power of two"):
        frontend.queue(0, 48)


def test_a_queue_goes_on_where_it_stopped_wherever_that_is(connect: Connected, rings: Rings) -> None:
    queue = connect(Reverse()).queue(0, 5 if rings.packed else 4)
    bases = set()
    for number in range(25):
        word = b"%d" % number
        assert queue.request(word, 2) == word[::-1]
        bases.add(queue.stop())
        waiting = queue.submit(word, 2)
        queue.start()
        assert waiting.wait() == queue.request(word, 2) == word[::-1]
    if rings.packed:
        # One is where both wrap counters are 0, which is what others call a fresh ring.
        assert bases == {base | base << 16 for slot in range(5) for base in (slot, slot | 0x8000)}


def test_a_queue_begins_at_a_base_of_32_bits(connect: Connected, rings: Rings) -> None:
    queue = connect(Reverse()).queue(0, 8, base=0x0007_0007 if rings.packed else 0xFFFF)
    assert [queue.request(b"ab", 2) for _ in range(3)] == [b"ba"] * 3
    assert queue.stop() == (0x8002_8002 if rings.packed else 2)


def test_a_reset_and_a_new_connection_begin_anew(connect: Connected) -> None:
    frontend = connect(ReverseMany())
    for _ in range(2):
        for queue in frontend.start_queues(4, 4):
            assert [queue.request(b"ab", 3)[1:] for _ in range(5)] == [b"ba"] * 5
        frontend.reset()
    frontend.reconnect()
    assert frontend.queue(3, 4).request(b"ab", 3) == b"\3ba"


def test_requests_are_given_back_in_the_order_that_was_agreed_on(connect: Connected, rings: Rings) -> None:
    device = Hold()
    queue = connect(device).queue(0, 6 if rings.packed else 8)
    for _ in range(4):
        sent = [queue.submit(bytes([number]), 1) for number in range(5)]
        held = [device.next() for _ in sent]
        early = [4, 2, 1, 3]
        for number in early:
            held[number].write(bytes([number]))
            held[number].complete()
        if rings.in_order:
            with pytest.raises(vu.PeerTimeout):
                sent[4].wait(SHORT)
            assert not any(completion.done for completion in sent)
        else:
            assert [sent[number].wait() for number in early] == [bytes([number]) for number in early]
        held[0].write(b"\0")
        held[0].complete()
        assert [completion.wait() for completion in sent] == [bytes([number]) for number in range(5)]


def test_a_busy_queue_loses_nothing(connect: Connected, rings: Rings) -> None:
    luck = random.Random(1)
    queue = connect(Reverse()).queue(0, 37 if rings.packed else 32)
    under_way: list[tuple[bytes, vu.Completion]] = []
    for number in range(2000):
        word = b"%d" % number * luck.randint(1, 4)
        half = luck.randint(1, len(word))
        under_way.append((word, queue.submit([word[:half], word[half:]], [len(word)])))
        if len(under_way) == 30:
            luck.shuffle(under_way)
            for sent, completion in under_way[10:]:
                assert completion.wait() == sent[::-1]
            del under_way[10:]
    for sent, completion in under_way:
        assert completion.wait() == sent[::-1]
    assert queue.outstanding == 0
