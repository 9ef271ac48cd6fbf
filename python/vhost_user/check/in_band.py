"""Kicks and calls that are messages, as User-Mode Linux has them in virtual time. "In-band notifications"."""

from __future__ import annotations

import socket

from .._core import messages
from .harness import Case, check, fail
from .wire import NEED_REPLY, REPLY, VERSION, Closed, Protocol, Ring, Silent, Wire, u64, vring_state

_IN_BAND = "vhost-user: In-band notifications"
_KICK = "vhost-user: VHOST_USER_VRING_KICK"
_NEEDS = "request INBAND_NOTIFICATIONS BACKEND_REQ REPLY_ACK"
_CALL = next(info.id for info in messages() if info.name == "BACKEND_VRING_CALL")


def _negotiated(case: Case) -> tuple[Wire, Wire, Ring]:
    """The main channel, the back-end's, and a ring that is in place, without any descriptor."""
    wire = case.negotiated(Protocol.BACKEND_REQ, Protocol.INBAND_NOTIFICATIONS)
    ours, theirs = socket.socketpair()
    channel = case.own(Wire(ours, case.timeout))
    with theirs:
        case.tell(wire, "SET_BACKEND_REQ_FD", b"", [theirs.fileno()])
    memory = case.memory()
    case.share(wire, memory)
    case.start_companions(wire, memory)
    ring = case.new_ring(memory)
    case.place(wire, ring)
    case.enable(wire, ring)
    return wire, channel, ring


@check("in-band.notifies", _IN_BAND, needs=_NEEDS)
def notifies(case: Case) -> None:
    """The first VRING_KICK starts the ring, and every completion is told by VRING_CALL."""
    wire, channel, ring = _negotiated(case)
    for _ in range(3):
        chain = ring.add(case.exercise.readable, case.exercise.writable)
        # It must not wait for our answer to its call: we do not look there before it answered.
        status = wire.acknowledged("VRING_KICK", vring_state(ring.index))
        if status:
            fail(f"VRING_KICK is acknowledged with {status:#x}", "0")
        try:
            call = channel.receive()
        except (Closed, Silent):
            fail("no call came on the channel of the back-end", "VRING_CALL")
        if call.request != _CALL or call.payload != vring_state(ring.index) or call.flags & ~NEED_REPLY != VERSION:
            fail(f"the back-end sent {call}", f"VRING_CALL ({_CALL}) of ring {ring.index}")
        if call.flags & NEED_REPLY:
            channel.send(_CALL, u64(0), flags=VERSION | REPLY)
        entries = ring.take()
        if not entries:
            fail("the call came before the used entry", "after it")
        case.judge(ring, [(chain.head, ring.data(chain))], entries)


@check("in-band.descriptors-are-used", _IN_BAND, needs=_NEEDS)
def descriptors_are_used(case: Case) -> None:
    """Where a ring has descriptors they are used: QEMU takes the feature, and knows no messages."""
    wire, _, ring = _negotiated(case)
    case.tell(wire, "SET_VRING_CALL", u64(ring.index), [ring.call.descriptor])
    case.tell(wire, "SET_VRING_KICK", u64(ring.index), [ring.kick.descriptor])
    case.perform(ring)
    if not ring.call.came(case.timeout):
        fail("nothing came on the call descriptor", "a notification")


@check("in-band.no-such-ring", _KICK, needs=_NEEDS)
def no_such_ring(case: Case) -> None:
    """VRING_KICK of a ring that does not exist is refused."""
    wire, _, _ = _negotiated(case)
    case.must_refuse(wire, "there is no ring 200", "VRING_KICK", vring_state(200))
