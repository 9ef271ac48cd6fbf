"""Kicks and calls: when they are due, and what they travel on."""

from __future__ import annotations

import socket

from .harness import QUIET, Case, Differs, check, fail
from .wire import Feature, Notifier, Protocol, u64, wait_until

_CALLS = "Virtio 1.3, 2.7.7: Used Buffer Notification Suppression"
_KICKS = "Virtio 1.3, 2.7.10: Available Buffer Notification Suppression"
_SET_CALL = "vhost-user: VHOST_USER_SET_VRING_CALL"
_SET_KICK = "vhost-user: VHOST_USER_SET_VRING_KICK"
NO_DESCRIPTOR = 1 << 8


@check("notification.call", _CALLS, needs="request")
def call(case: Case) -> None:
    """The driver is notified when a request is completed."""
    _, ring = case.running()
    case.perform(ring)
    if not ring.call.came(case.timeout):
        fail("the request was completed, but nothing came on the call descriptor", "a notification")


@check("notification.each-time", _CALLS, needs="request")
def each_time(case: Case) -> None:
    """The driver is notified again for the next request."""
    _, ring = case.running()
    for count in range(1, 4):
        case.perform(ring)
        if not ring.call.came(case.timeout):
            fail(f"no notification after request {count}", "one for each, since nothing was suppressed")


@check("notification.suppressed", _CALLS, needs="request")
def suppressed(case: Case) -> None:
    """With NO_INTERRUPT in the available ring, requests are completed; the driver is not notified."""
    _, ring = case.running()
    ring.set_avail_flags(1)
    ring.call.came(QUIET)
    case.perform(ring)
    if ring.call.came(QUIET):
        raise Differs("a notification came; it is a hint only, and devices may ignore it", "none")


@check("notification.used-event", _CALLS, needs="request EVENT_IDX")
def used_event(case: Case) -> None:
    """With EVENT_IDX, the driver is notified when the used index passes used_event."""
    _, ring = case.running(Feature.EVENT_IDX)
    case.perform(ring)
    ring.call.came(QUIET)
    ring.set_used_event(2)
    case.perform(ring, 2)
    if not ring.call.came(case.timeout):
        fail("used_event is 2; the used index went from 1 to 3 without a notification", "a notification")


@check("notification.used-event-suppresses", _CALLS, needs="request EVENT_IDX")
def used_event_suppresses(case: Case) -> None:
    """With EVENT_IDX, requests before used_event are completed; the driver is not notified of them."""
    _, ring = case.running(Feature.EVENT_IDX)
    ring.set_used_event(0)
    case.perform(ring)
    ring.call.came(5 * QUIET)
    ring.set_used_event(100)
    case.perform(ring, 2)
    if ring.call.came(QUIET):
        raise Differs("a notification came before it was due, which costs time and does no harm", "none")


@check("notification.event-idx-ignores-the-flag", _CALLS, needs="request EVENT_IDX")
def event_idx_ignores_the_flag(case: Case) -> None:
    """With EVENT_IDX, a device must not look at NO_INTERRUPT."""
    _, ring = case.running(Feature.EVENT_IDX)
    ring.set_avail_flags(1)
    case.perform(ring)
    if not ring.call.came(case.timeout):
        fail("used_event is 0 and the used index went to 1 without a notification", "one, whatever the flags say")


@check("notification.avail-event", _KICKS, needs="request EVENT_IDX")
def avail_event(case: Case) -> None:
    """With EVENT_IDX, a driver that kicks only when avail_event says so loses no request."""
    _, ring = case.running(Feature.EVENT_IDX)
    for count in range(6):
        before = ring.avail_index
        chain = ring.add(case.exercise.readable, case.exercise.writable)
        # A device that has not looked yet looks later; one that has must have said when to kick.
        if ring.avail_event == before or count == 0:
            ring.kick.signal()
        entries = ring.wait(1, case.timeout)
        if not entries:
            fail(
                f"request {before} was not completed; avail_event is {ring.avail_event}, so there was no kick",
                f"{before}",
            )
        case.judge(ring, [(chain.head, ring.data(chain))], entries)
        wait_until(lambda: ring.avail_event == ring.avail_index, QUIET)


@check("notification.no-notify", _KICKS, needs="request")
def no_notify(case: Case) -> None:
    """Without EVENT_IDX, a driver that kicks only when the used ring's flags want it loses no request."""
    _, ring = case.running()
    for count in range(4):
        chain = ring.add(case.exercise.readable, case.exercise.writable)
        if not ring.used_flags & 1 or count == 0:
            ring.kick.signal()
        entries = ring.wait(1, case.timeout)
        if not entries:
            fail(
                f"request {count} was not completed; the used flags are {ring.used_flags:#x}, so there was no kick", "0"
            )
        case.judge(ring, [(chain.head, ring.data(chain))], entries)
        wait_until(lambda: not ring.used_flags & 1, QUIET)


@check("notification.needless-kicks", _SET_KICK, needs="request")
def needless_kicks(case: Case) -> None:
    """A kick without a request does nothing."""
    _, ring = case.running()
    case.perform(ring)
    for _ in range(20):
        ring.kick.signal()
    wait_until(lambda: ring.used_index != ring.seen, QUIET)
    if ring.take():
        fail("more requests were completed than there were", "one")
    case.perform(ring)


@check("notification.no-call-descriptor", _SET_CALL, needs="request")
def no_call_descriptor(case: Case) -> None:
    """Without a call descriptor (bit 8) requests are completed all the same."""
    wire, ring = case.running()
    case.tell(wire, "SET_VRING_CALL", u64(ring.index | NO_DESCRIPTOR))
    ring.call.came(QUIET)
    case.perform(ring)
    if ring.call.came(QUIET):
        fail("a notification came on the descriptor that was taken back", "none")


@check("notification.call-replaced", _SET_CALL, needs="request")
def call_replaced(case: Case) -> None:
    """A call descriptor that is replaced while the ring runs is not used any more; the new one is."""
    wire, ring = case.running()
    case.perform(ring)
    old, ring.call = ring.call, Notifier()
    try:
        case.tell(wire, "SET_VRING_CALL", u64(ring.index), [ring.call.descriptor])
        wire.ask("GET_FEATURES")
        old.came(QUIET)
        ring.call.came(QUIET)
        case.perform(ring)
        if not ring.call.came(case.timeout):
            fail("no notification on the new descriptor", "one")
        if old.came(0):
            fail("a notification on the old descriptor", "none")
    finally:
        old.close()


@check("notification.kick-replaced", _SET_KICK, needs="request")
def kick_replaced(case: Case) -> None:
    """A kick descriptor may be replaced while the ring runs, as when a driver of User-Mode Linux is bound again."""
    wire, ring = case.running()
    case.perform(ring)
    old, ring.kick = ring.kick, Notifier()
    try:
        case.tell(wire, "SET_VRING_KICK", u64(ring.index), [ring.kick.descriptor])
        case.perform(ring, 2)
    finally:
        old.close()


@check("notification.no-kick-descriptor", _SET_KICK, needs="request")
def no_kick_descriptor(case: Case) -> None:
    """Without a kick descriptor (bit 8) the device polls the ring."""
    wire = case.negotiated()
    memory = case.memory()
    case.share(wire, memory)
    case.start_companions(wire, memory)
    ring = case.new_ring(memory)
    case.place(wire, ring)
    case.tell(wire, "SET_VRING_CALL", u64(ring.index), [ring.call.descriptor])
    case.tell(wire, "SET_VRING_KICK", u64(ring.index | NO_DESCRIPTOR))
    case.enable(wire, ring)
    wire.ask("GET_FEATURES")
    wait_until(lambda: False, QUIET / 2)
    chain = ring.add(case.exercise.readable, case.exercise.writable)
    entries = ring.wait(1, min(case.timeout, 10 * QUIET))
    if not entries:
        raise Differs("the ring is not polled; libvhost-user and rust-vmm do not, either", "a used entry")
    case.judge(ring, [(chain.head, ring.data(chain))], entries)


@check("notification.on-a-socket", "vhost-user: Message types, ancillary data", needs="request")
def on_a_socket(case: Case) -> None:
    """A call descriptor may be a stream socket, as that of User-Mode Linux: a notification is eight bytes."""
    wire, ring = case.running()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(case.timeout)
        case.tell(wire, "SET_VRING_CALL", u64(ring.index), [theirs.fileno()])
        case.perform(ring)
        try:
            came = ours.recv(4096)
        except TimeoutError:
            raise Differs("nothing came; the text promises eventfds only on Linux", "eight bytes") from None
        if len(came) % 8:
            fail(f"{len(came)} bytes came", "eight for each notification")


@check("notification.none-after-stop", "vhost-user: Suspended device state", needs="request")
def none_after_stop(case: Case) -> None:
    """After GET_VRING_BASE of the only ring there are no notifications."""
    wire, ring = case.running()
    case.perform(ring)
    case.stop(wire, ring)
    ring.call.came(0)
    if ring.call.came(QUIET):
        fail("a notification came after GET_VRING_BASE was answered", "none")


@check("notification.back-end-channel", "vhost-user: VHOST_USER_SET_BACKEND_REQ_FD", needs="BACKEND_REQ REPLY_ACK")
def back_end_channel(case: Case) -> None:
    """The back-end takes a socket for its own requests, and is silent there as long as no ring runs."""
    wire = case.negotiated(Protocol.BACKEND_REQ)
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            case.tell(wire, "SET_BACKEND_REQ_FD", b"", [theirs.fileno()])
        ours.settimeout(QUIET)
        try:
            came = ours.recv(4096)
        except TimeoutError:
            return
        fail(f"{len(came)} bytes came on it" if came else "it was closed", "silence")
