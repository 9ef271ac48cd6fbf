"""The life of a ring: how it starts, what it does, and what it leaves behind."""

from __future__ import annotations

from .harness import QUIET, Case, Differs, Skipped, check, fail
from .wire import Chain, Feature, SplitRing, u64, vring_state, wait_until

_STATES = "vhost-user: Ring states"
#: What no device writes.
_PATTERN = b"\xa5"
_USED = "Virtio 1.3, 2.7.8: The Virtqueue Used Ring"


@check("ring.completes-a-request", "Virtio 1.3, 2.7.8: The Virtqueue Used Ring")
def completes_a_request(case: Case) -> None:
    """The device completes a request, and does what it asks for."""
    _, ring = case.running()
    chain = ring.add(case.exercise.readable, case.exercise.writable)
    ring.kick.signal()
    entries = ring.wait(1, case.timeout)
    if not entries and not case.exercise.is_certain:
        raise Skipped("the device completed no request of 16 bytes and 64 bytes of room; say what it is: --device")
    if not entries:
        fail(f"queue {ring.index}: the request was not completed within {case.timeout:g} s", "a used entry")
    case.judge(ring, [(chain.head, ring.data(chain))], entries)


@check("ring.used-once", _USED, needs="request")
def used_once(case: Case) -> None:
    """A request is completed once."""
    _, ring = case.running()
    case.perform(ring)
    wait_until(lambda: ring.used_index != ring.seen, QUIET)
    more = ring.take()
    if more:
        fail(f"after the only request was completed: used entries {more}", "none")


@check("ring.used-length", _USED, needs="request")
def used_length(case: Case) -> None:
    """As many bytes as the length of a used entry says were written, from the beginning of the room."""
    _, ring = case.running()
    chain = ring.add(case.exercise.readable, case.exercise.writable)
    for address, size in chain.writable:
        ring.memory.write(address, _PATTERN * size)
    ring.kick.signal()
    for _, length in ring.wait(1, case.timeout):
        data = ring.data(chain)
        # What was written may look like the pattern, but not for long.
        if length > len(data) or data[:length].endswith(_PATTERN * 8):
            fail(
                f"length {length}, of {len(data)} bytes {len(data.rstrip(_PATTERN))} were written", "no more than these"
            )
        if case.exercise.fills and length < len(data):
            raise Differs(f"length {length}, which a device may say of more; some drivers look at it", f"{len(data)}")


@check("ring.writes-nothing-else", "Virtio 1.3, 2.7.4.2: Device Requirements: Message Framing", needs="request")
def writes_nothing_else(case: Case) -> None:
    """The device changes nothing in memory but the room of requests and the used ring."""
    _, ring = case.running()
    chain = ring.add(case.exercise.readable, case.exercise.writable)
    before = _outside(ring, chain)
    ring.kick.signal()
    ring.wait(1, case.timeout)
    after = _outside(ring, chain)
    changed = [at for at, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    if changed:
        fail(f"{len(changed)} bytes were changed, from guest address {ring.memory.guest + changed[0]:#x}", "none")


def _outside(ring: SplitRing, chain: Chain) -> bytes:
    """Guest memory without what the device may change."""
    memory = bytearray(ring.memory.read(ring.memory.guest, ring.memory.size))
    for address, size in [*chain.writable, (ring.used, 6 + 8 * ring.size)]:
        at = address - ring.memory.guest
        memory[at : at + size] = bytes(size)
    return bytes(memory)


@check("ring.wraps-around", _USED, needs="request")
def wraps_around(case: Case) -> None:
    """More requests than the ring has entries are completed, one after the other."""
    _, ring = case.running(size=4)
    case.perform(ring, 10)


@check("ring.index-overflows", "Virtio 1.3, 2.7.6: The Virtqueue Available Ring", needs="request")
def index_overflows(case: Case) -> None:
    """Indices go from 65535 to 0."""
    _, ring = case.running(base=0xFFFE)
    case.perform(ring, 4)


@check("ring.many-at-once", _USED, needs="request")
def many_at_once(case: Case) -> None:
    """Requests that were made available with one kick are all completed, each with its own head."""
    _, ring = case.running(size=64)
    case.perform_together(ring)


@check("ring.smallest", "vhost-user: VHOST_USER_SET_VRING_NUM", needs="REPLY_ACK")
def smallest(case: Case) -> None:
    """A ring of two entries is accepted."""
    case.tell(case.negotiated(), "SET_VRING_NUM", vring_state(case.exercise.queue, 2))


@check("ring.of-1024", "vhost-user: VHOST_USER_SET_VRING_NUM", needs="REPLY_ACK")
def of_1024(case: Case) -> None:
    """A ring of 1024 entries is accepted, which front-ends are known to use."""
    wire = case.negotiated()
    if case.outcome(wire, "SET_VRING_NUM", vring_state(case.exercise.queue, 1024)) != "accepted":
        raise Differs("refused; back-ends of rust-vmm have a maximum of their own, too", "accepted")


@check("ring.base-is-used", "vhost-user: VHOST_USER_SET_VRING_BASE", needs="request")
def base_is_used(case: Case) -> None:
    """A ring starts at its base."""
    _, ring = case.running(base=5)
    case.perform(ring)


@check("ring.base-is-told", "vhost-user: VHOST_USER_GET_VRING_BASE", needs="request")
def base_is_told(case: Case) -> None:
    """GET_VRING_BASE answers the available index that comes next."""
    wire, ring = case.running()
    case.perform(ring, 3)
    base = case.stop(wire, ring)
    if base != 3:
        fail(f"base {base:#x} after three requests", "3")


@check("ring.base-of-a-stopped-ring", "vhost-user: VHOST_USER_GET_VRING_BASE")
def base_of_a_stopped_ring(case: Case) -> None:
    """GET_VRING_BASE is answered for a ring that never ran, with the base that was set."""
    wire = case.negotiated()
    case.tell(wire, "SET_VRING_BASE", vring_state(case.exercise.queue, 7))
    base = case.stop(wire, case.new_ring(case.memory()))
    if base != 7:
        raise Differs(f"base {base}; the text does not say what a ring that never ran answers", "7")


@check("ring.goes-on", _STATES, needs="request")
def goes_on(case: Case) -> None:
    """A ring that was stopped goes on at its base when it is started again."""
    wire, ring = case.running()
    case.perform(ring, 3)
    base = case.stop(wire, ring)
    case.start(wire, ring, base)
    case.perform(ring, 3)


@check("ring.stopped", _STATES, needs="request")
def stopped(case: Case) -> None:
    """After GET_VRING_BASE the device does not touch the ring."""
    wire, ring = case.running()
    case.perform(ring)
    case.stop(wire, ring)
    ring.add(case.exercise.readable, case.exercise.writable)
    ring.kick.signal()
    wire.ask("GET_FEATURES")
    wait_until(lambda: ring.used_index != ring.seen, QUIET)
    if ring.take():
        fail("a request was completed after GET_VRING_BASE was answered", "the ring is not touched")


@check("ring.disabled", _STATES, needs="request PROTOCOL_FEATURES")
def disabled(case: Case) -> None:
    """A ring is disabled until SET_VRING_ENABLE, which lets it do what waits there without another kick."""
    wire = case.negotiated()
    memory = case.memory()
    case.share(wire, memory)
    ring = case.new_ring(memory)
    case.start(wire, ring, enable=False)
    chain = ring.add(case.exercise.readable, case.exercise.writable)
    ring.kick.signal()
    wire.ask("GET_FEATURES")
    wait_until(lambda: ring.used_index != ring.seen, QUIET)
    if ring.take():
        raise Differs(
            "a request was completed while the ring was disabled, which must have no side effects; libvhost-user does "
            "not look at whether a ring is enabled",
            "nothing, before the ring is enabled",
        )
    case.enable(wire, ring)
    entries = ring.wait(1, min(case.timeout, 10 * QUIET))
    if not entries:
        ring.kick.signal()
        if not ring.wait(1, case.timeout):
            fail(
                "the request that waited was not completed when the ring was enabled, nor after a kick", "a used entry"
            )
        raise Differs("it waits for another kick; rust-vmm forgets that of before, too", "a used entry without a kick")
    case.judge(ring, [(chain.head, ring.data(chain))], entries)


@check("ring.disabled-and-enabled", _STATES, needs="request PROTOCOL_FEATURES")
def disabled_and_enabled(case: Case) -> None:
    """A ring that was disabled works when it is enabled again."""
    wire, ring = case.running()
    case.perform(ring)
    case.enable(wire, ring, False)
    case.enable(wire, ring)
    case.perform(ring, 2)


@check("ring.enabled-from-the-start", _STATES, needs="request")
def enabled_from_the_start(case: Case) -> None:
    """Without PROTOCOL_FEATURES in SET_FEATURES, a ring is enabled from the start."""
    wire = case.negotiated(without=Feature.PROTOCOL_FEATURES)
    memory = case.memory()
    case.share(wire, memory)
    ring = case.new_ring(memory)
    case.start(wire, ring, enable=False)
    case.perform(ring)


@check("ring.what-waits", _STATES, needs="request")
def what_waits(case: Case) -> None:
    """A ring that starts does what is available already, without a kick."""
    wire = case.negotiated()
    memory = case.memory()
    case.share(wire, memory)
    ring = case.new_ring(memory)
    chain = ring.add(case.exercise.readable, case.exercise.writable)
    case.start(wire, ring)
    entries = ring.wait(1, min(case.timeout, 10 * QUIET))
    if not entries:
        ring.kick.signal()
        if not ring.wait(1, case.timeout):
            fail("the request was not completed, not even after a kick", "a used entry")
        raise Differs("it waits for a kick, as older texts have it", "a used entry without a kick")
    case.judge(ring, [(chain.head, ring.data(chain))], entries)


@check("ring.any-order", "vhost-user: Ring states", needs="request")
def any_order(case: Case) -> None:
    """A ring may be set up in any order: address, size, kick, base and call last."""
    wire = case.negotiated()
    memory = case.memory()
    case.share(wire, memory)
    case.start_companions(wire, memory)
    ring = case.new_ring(memory)
    case.tell(wire, "SET_VRING_NUM", vring_state(ring.index, ring.size))
    case.tell(wire, "SET_VRING_ADDR", ring.address_payload())
    case.tell(wire, "SET_VRING_BASE", vring_state(ring.index, 0))
    case.tell(wire, "SET_VRING_KICK", u64(ring.index), [ring.kick.descriptor])
    case.tell(wire, "SET_VRING_CALL", u64(ring.index), [ring.call.descriptor])
    case.enable(wire, ring)
    case.perform(ring)


@check("ring.indirect", "Virtio 1.3, 2.7.5.3: Indirect Descriptors", needs="request INDIRECT_DESC")
def indirect(case: Case) -> None:
    """With INDIRECT_DESC, a request may be in a table of its own."""
    _, ring = case.running(Feature.INDIRECT_DESC)
    case.perform(ring, 2, indirect=True)


@check("ring.indirect-and-direct", "Virtio 1.3, 2.7.5.3: Indirect Descriptors", needs="request INDIRECT_DESC")
def indirect_and_direct(case: Case) -> None:
    """With INDIRECT_DESC, requests may still be direct."""
    _, ring = case.running(Feature.INDIRECT_DESC)
    case.perform(ring, 2)


@check("ring.any-pieces", "Virtio 1.3, 2.7.4: Message Framing", needs="request VERSION_1")
def any_pieces(case: Case) -> None:
    """A request may be cut into descriptors anywhere."""
    if not case.exercise.is_certain:
        raise Skipped("which requests are the same is known with --device")
    _, ring = case.running(size=64)
    data = b"".join(case.exercise.readable)
    readable = [data[at : at + 5] for at in range(0, len(data), 5)]
    room = sum(case.exercise.writable)
    writable = [min(200, room - at) for at in range(0, room, 200)]
    chain = ring.add(readable, writable)
    ring.kick.signal()
    entries = ring.wait(1, case.timeout)
    if not entries:
        fail("the request was not completed", "a used entry")
    case.judge(ring, [(chain.head, ring.data(chain))], entries)


@check("ring.addresses-while-running", "vhost-user: VHOST_USER_SET_VRING_ADDR", needs="request")
def addresses_while_running(case: Case) -> None:
    """SET_VRING_ADDR with the same addresses, while the ring runs, changes nothing: QEMU does it to migrate."""
    wire, ring = case.running()
    case.perform(ring, 2)
    case.tell(wire, "SET_VRING_ADDR", ring.address_payload())
    case.perform(ring, 2)


@check("ring.two-rings", _STATES, needs="request", device="blk")
def two_rings(case: Case) -> None:
    """A ring that is stopped leaves others alone."""
    if (case.facts.queues or 1) < 2:
        raise Skipped("the back-end has one queue")
    wire, ring = case.running()
    other = case.new_ring(ring.memory, index=1)
    case.start(wire, other)
    case.perform(other)
    case.stop(wire, ring)
    case.perform(other)


@check("ring.feature-repeated-while-running", "vhost-user: VHOST_USER_SET_FEATURES", needs="request PROTOCOL_FEATURES")
def features_while_running(case: Case) -> None:
    """SET_FEATURES with the same features, while a ring runs, changes nothing."""
    wire, ring = case.running()
    case.perform(ring)
    bits = case.device_features | case.facts.features & (Feature.VERSION_1 | Feature.PROTOCOL_FEATURES)
    case.tell(wire, "SET_FEATURES", u64(bits))
    chain = ring.add(case.exercise.readable, case.exercise.writable)
    ring.kick.signal()
    if not ring.wait(1, min(case.timeout, 10 * QUIET)):
        case.enable(wire, ring)
        ring.kick.signal()
        entries = ring.wait(1, case.timeout)
        if not entries:
            fail("no request is completed any more, not even when the ring is enabled again", "a used entry")
        case.judge(ring, [(chain.head, ring.data(chain))], entries)
        raise Differs(
            "the ring was disabled by it; rust-vmm does so, which QEMU's migration does not expect", "no change"
        )
