"""Packed rings: how they go round, where they stop, and when they notify. Virtio 1.3, 2.8."""

from __future__ import annotations

from .harness import QUIET, Case, Differs, check, fail
from .wire import NEXT, WRITE, Feature, PackedRing, wait_until

_BASE = "vhost-user: VHOST_USER_SET_VRING_BASE"
_RING = "Virtio 1.3, 2.8.1: Driver and Device Ring Wrap Counters"
_SUPPRESSION = "Virtio 1.3, 2.8.10: Event Suppression Structure Format"
_NEEDS = "request RING_PACKED"


@check("packed.completes-requests", "Virtio 1.3, 2.8.6: The Virtqueue Descriptor Ring", needs=_NEEDS)
def completes_requests(case: Case) -> None:
    """A packed ring's requests are completed, each with the buffer id that it came with."""
    _, ring = case.running_packed()
    case.perform(ring, 2)


@check("packed.wraps-around", _RING, needs=_NEEDS)
def wraps_around(case: Case) -> None:
    """The ring goes round several times, and the wrap counters with it."""
    _, ring = case.running_packed(size=8)
    case.perform(ring, 20)


@check("packed.odd-size", "Virtio 1.3, 2.8: Packed Virtqueues", needs=_NEEDS)
def odd_size(case: Case) -> None:
    """The size of a packed ring need not be a power of two; a chain may go on at its beginning."""
    _, ring = case.running_packed(size=7)
    case.perform(ring, 20)


@check("packed.many-at-once", _RING, needs=_NEEDS)
def many_at_once(case: Case) -> None:
    """Requests that were made available with one kick are all completed."""
    _, ring = case.running_packed(size=64)
    for _ in range(2):
        case.perform_together(ring)


@check("packed.indirect", "Virtio 1.3, 2.8.7: Indirect Flag: Scatter-Gather Support", needs=f"{_NEEDS} INDIRECT_DESC")
def indirect(case: Case) -> None:
    """A request in a table of its own takes one descriptor of the ring."""
    _, ring = case.running_packed(Feature.INDIRECT_DESC, size=4)
    case.perform(ring, 10, indirect=True)


@check("packed.base-is-used", _BASE, needs=_NEEDS)
def base_is_used(case: Case) -> None:
    """A ring starts at its base: the descriptor and the wrap counter of either side, in 32 bits."""
    _, ring = case.running_packed(base=0x0005_0005)
    case.perform(ring, 6)


@check("packed.base-is-told", "vhost-user: VHOST_USER_GET_VRING_BASE", needs=_NEEDS)
def base_is_told(case: Case) -> None:
    """GET_VRING_BASE answers where both sides are, with their wrap counters, in 32 bits."""
    wire, ring = case.running_packed(size=8)
    for _ in range(2):
        # The second time the counters are 0.
        case.perform(ring, 2)
        base, expected = case.stop(wire, ring), ring.base
        if base == expected & 0xFFFF:
            raise Differs(f"base {base:#x}; DPDK tells the lower half, too, which is enough here", f"{expected:#x}")
        if base != expected:
            fail(f"base {base:#x}", f"{expected:#x}: used, available, each with its wrap counter in bit 15")
        case.start(wire, ring, base)


@check("packed.goes-on", "vhost-user: Ring states", needs=_NEEDS)
def goes_on(case: Case) -> None:
    """A ring that was stopped goes on at its base, in any lap."""
    wire, ring = case.running_packed(size=8)
    for _ in range(4):
        case.perform(ring)
        case.start(wire, ring, case.stop(wire, ring))
    case.perform(ring)


@check("packed.call", _SUPPRESSION, needs=_NEEDS)
def call(case: Case) -> None:
    """The driver is notified of each request, as long as it suppresses nothing."""
    _, ring = case.running_packed()
    for count in range(1, 3):
        case.perform(ring)
        if not ring.call.came(case.timeout):
            fail(f"no notification after request {count}", "one for each")


@check("packed.calls-disabled", _SUPPRESSION, needs=_NEEDS)
def calls_disabled(case: Case) -> None:
    """With RING_EVENT_FLAGS_DISABLE requests are completed; the driver is not notified."""
    _, ring = case.running_packed()
    ring.suppress_calls(1)
    ring.call.came(QUIET)
    case.perform(ring)
    if ring.call.came(QUIET):
        raise Differs("a notification came; it is a hint only, and devices may ignore it", "none")


@check("packed.call-at-a-descriptor", _SUPPRESSION, needs=f"{_NEEDS} EVENT_IDX")
def call_at_a_descriptor(case: Case) -> None:
    """With RING_EVENT_FLAGS_DESC, the driver is notified when that descriptor is used, in that lap."""
    _, ring = case.running_packed(Feature.EVENT_IDX, size=8)
    case.perform(ring)
    ring.call.came(QUIET)
    # The next descriptor, and one in the next lap, if a request takes up to three.
    for ahead in (0, 5):
        last = ring.consumed + ahead
        ring.suppress_calls(2, ring.event(ahead))
        while ring.consumed <= last:
            case.perform(ring)
        if not ring.call.came(case.timeout):
            fail(f"descriptor {last} since the start was used without a notification", "a notification")


@check("packed.kicks", _SUPPRESSION, needs=_NEEDS)
def kicks(case: Case) -> None:
    """A driver that kicks only when the device's event suppression wants it loses no request."""
    _, ring = case.running_packed()
    _kick_when_wanted(case, ring)


@check("packed.kick-at-a-descriptor", _SUPPRESSION, needs=f"{_NEEDS} EVENT_IDX")
def kick_at_a_descriptor(case: Case) -> None:
    """With EVENT_IDX as well, where the device may name the descriptor after which it wants a kick."""
    _, ring = case.running_packed(Feature.EVENT_IDX)
    _kick_when_wanted(case, ring)


def _kick_when_wanted(case: Case, ring: PackedRing) -> None:
    for count in range(12):
        chain = ring.add(case.exercise.readable, case.exercise.writable)
        wanted = ring.wants_kick
        # A device that has not looked yet looks later.
        if wanted or count == 0:
            ring.kick.signal()
        entries = ring.wait(1, case.timeout)
        if not entries:
            fail(f"request {count} was not completed; {'a' if wanted else 'no'} kick was wanted", "a used descriptor")
        case.judge(ring, [(chain.head, ring.data(chain))], entries)
        wait_until(lambda: ring.will_want_kick, QUIET)


@check("packed.chain-without-end", "Virtio 1.3, 2.8.17: Descriptor Chaining", needs=_NEEDS)
def chain_without_end(case: Case) -> None:
    """A chain that goes round the whole ring and on is no request; the main channel is served all the same."""
    wire, ring = case.running_packed(size=8)
    address = ring.memory.allocate(16)
    for slot in reversed(range(8)):
        ring.set_descriptor(slot, address, 16, 0, ring.available | WRITE | NEXT)
    ring.kick.signal()
    ring.error.came(QUIET)
    entries = ring.take()
    if entries:
        fail(f"it was completed: {entries} (id, length)", "no used descriptor")
    case.alive(wire)
