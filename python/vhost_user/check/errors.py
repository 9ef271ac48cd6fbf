"""Messages that make no sense."""

from __future__ import annotations

import struct
from collections.abc import Callable

from .harness import QUIET, Case, Differs, check, fail
from .wire import HEADER, IDS, Closed, Silent, u64, vring_state, wait_until

_STATE = "vhost-user: A vring state description"
_NUM = "vhost-user: VHOST_USER_SET_VRING_NUM"
_ADDR = "vhost-user: Vring addresses"
_KICK = "vhost-user: A vring descriptor index for split virtqueues"

#: No message can name this queue in eight bits, and no back-end has it.
NOWHERE = 0x10000


@check("errors.unknown-request", "vhost-user: VHOST_USER_PROTOCOL_F_REPLY_ACK", needs="REPLY_ACK")
def unknown_request(case: Case) -> None:
    """A request that does not exist is not acknowledged as done."""
    if case.outcome(case.negotiated(), 9999) == "accepted":
        fail("request 9999 was acknowledged with 0, success", "another acknowledgement, or the end of the connection")


@check("errors.request-0", "vhost-user: VHOST_USER_PROTOCOL_F_REPLY_ACK", needs="REPLY_ACK")
def request_0(case: Case) -> None:
    """Request 0, which does not exist, is not acknowledged as done."""
    if case.outcome(case.negotiated(), 0) == "accepted":
        raise Differs(
            "acknowledged with 0, success; libvhost-user calls it NONE", "a refusal, or the end of the connection"
        )


def _register_index_checks() -> None:
    payloads: dict[str, Callable[[], bytes]] = {
        "SET_VRING_NUM": lambda: vring_state(NOWHERE, 16),
        "SET_VRING_BASE": lambda: vring_state(NOWHERE, 0),
        "SET_VRING_ADDR": lambda: struct.pack("=IIQQQQ", NOWHERE, 0, 0, 0, 0, 0),
        "SET_VRING_ENABLE": lambda: vring_state(NOWHERE, 1),
    }
    for request, payload in payloads.items():

        def refused(case: Case, request: str = request, payload: Callable[[], bytes] = payload) -> None:
            case.must_refuse(case.negotiated(), f"there is no queue {NOWHERE}", request, payload())

        refused.__doc__ = f"{request} of a queue that does not exist is refused."
        check(f"errors.index-of-{request[4:].lower().replace('_', '-')}", _STATE, needs="REPLY_ACK")(refused)


_register_index_checks()


@check("errors.index-of-get-vring-base", "vhost-user: VHOST_USER_GET_VRING_BASE", needs="REPLY_ACK")
def index_of_get_vring_base(case: Case) -> None:
    """GET_VRING_BASE of a queue that does not exist is not answered as if it did."""
    wire = case.negotiated()
    try:
        answer = wire.ask("GET_VRING_BASE", vring_state(NOWHERE))
    except Closed:
        return
    except Silent:
        fail("neither an answer nor the end of the connection", "either")
    if answer.payload[:4] == struct.pack("=I", NOWHERE):
        raise Differs(f"{answer}; what refuses it is not said", "the end of the connection, or no payload")


@check("errors.ring-of-no-entries", _NUM, needs="REPLY_ACK")
def ring_of_no_entries(case: Case) -> None:
    """A ring of no entries is refused."""
    who = "libvhost-user does so"
    case.should_refuse(
        case.negotiated(), "no ring has 0 entries", who, "SET_VRING_NUM", vring_state(case.exercise.queue, 0)
    )


@check("errors.ring-of-seven", "Virtio 1.3, 2.7: Split Virtqueues", needs="REPLY_ACK")
def ring_of_seven(case: Case) -> None:
    """A split ring whose size is not a power of two is refused."""
    who = "libvhost-user and rust-vmm do so"
    case.should_refuse(
        case.negotiated(), "7 is not a power of two", who, "SET_VRING_NUM", vring_state(case.exercise.queue, 7)
    )


@check("errors.ring-of-65536", "Virtio 1.3, 2.7: Split Virtqueues", needs="REPLY_ACK")
def ring_of_65536(case: Case) -> None:
    """A ring of more than 32768 entries is refused."""
    who = "libvhost-user does so"
    payload = vring_state(case.exercise.queue, 65536)
    case.should_refuse(case.negotiated(), "a ring has at most 32768 entries", who, "SET_VRING_NUM", payload)


@check("errors.addresses-nowhere", _ADDR, needs="REPLY_ACK")
def addresses_nowhere(case: Case) -> None:
    """A ring outside of guest memory is refused."""
    wire = case.negotiated()
    memory = case.memory()
    case.share(wire, memory)
    ring = case.new_ring(memory)
    case.tell(wire, "SET_VRING_NUM", vring_state(ring.index, ring.size))
    why = "its addresses are in no region"
    who = "DPDK translates them when the ring starts"
    case.should_refuse(
        wire, why, who, "SET_VRING_ADDR", ring.address_payload(descriptors=0x10, used=0x1000, avail=0x2000)
    )


@check("errors.ring-nowhere-is-started", _ADDR, needs="REPLY_ACK")
def ring_nowhere_is_started(case: Case) -> None:
    """A ring outside of guest memory that is started all the same does no harm."""
    wire = case.negotiated()
    memory = case.memory()
    case.share(wire, memory)
    ring = case.new_ring(memory)
    steps = [
        ("SET_VRING_NUM", vring_state(ring.index, ring.size), []),
        ("SET_VRING_ADDR", ring.address_payload(descriptors=0x10, used=0x1000, avail=0x2000), []),
        ("SET_VRING_KICK", u64(ring.index), [ring.kick.descriptor]),
        ("SET_VRING_ENABLE", vring_state(ring.index, 1), []),
    ]
    for request, payload, descriptors in steps:
        if case.outcome(wire, request, payload, descriptors) == "closed":
            return
    ring.kick.signal()
    wait_until(lambda: False, QUIET / 2)
    case.alive(wire)


@check("errors.addresses-not-aligned", "Virtio 1.3, 2.7: Split Virtqueues", needs="REPLY_ACK")
def addresses_not_aligned(case: Case) -> None:
    """A ring whose parts are not aligned is refused."""
    wire = case.negotiated()
    memory = case.memory()
    case.share(wire, memory)
    ring = case.new_ring(memory)
    case.tell(wire, "SET_VRING_NUM", vring_state(ring.index, ring.size))
    payload = ring.address_payload(descriptors=memory.to_user(ring.descriptors) + 1)
    who = "libvhost-user does so"
    case.should_refuse(wire, "the descriptor table is at an odd address", who, "SET_VRING_ADDR", payload)


@check("errors.kick-without-descriptor", _KICK, needs="REPLY_ACK")
def kick_without_descriptor(case: Case) -> None:
    """SET_VRING_KICK that promises a descriptor and has none is refused."""
    case.must_refuse(case.negotiated(), "no descriptor came", "SET_VRING_KICK", u64(case.exercise.queue))


@check("errors.call-without-descriptor", _KICK, needs="REPLY_ACK")
def call_without_descriptor(case: Case) -> None:
    """SET_VRING_CALL that promises a descriptor and has none is refused."""
    case.must_refuse(case.negotiated(), "no descriptor came", "SET_VRING_CALL", u64(case.exercise.queue))


@check("errors.surplus-descriptor", "vhost-user: Message types, ancillary data", needs="REPLY_ACK")
def surplus_descriptor(case: Case) -> None:
    """A descriptor on a message that has none is closed, at the latest when the connection ends."""
    wire = case.negotiated()
    payload = vring_state(case.exercise.queue, 16)
    if not case.is_closed(wire, lambda surplus: case.outcome(wire, "SET_VRING_NUM", payload, surplus)):
        raise Differs(
            "it is still open after the connection has ended; libvhost-user forgets it, too, until none is left",
            "closed",
        )


@check("errors.payload-too-short", _STATE, needs="REPLY_ACK")
def payload_too_short(case: Case) -> None:
    """A message whose payload is too short is refused."""
    payload = struct.pack("=I", case.exercise.queue)
    who = "libvhost-user uses what was there before"
    case.should_refuse(case.negotiated(), "4 of 8 bytes were sent", who, "SET_VRING_NUM", payload)


@check("errors.payload-too-long", _STATE, needs="REPLY_ACK")
def payload_too_long(case: Case) -> None:
    """A message whose payload is too long is refused."""
    payload = vring_state(case.exercise.queue, 16) + bytes(8)
    who = "libvhost-user ignores the rest"
    case.should_refuse(case.negotiated(), "16 bytes were sent, not 8", who, "SET_VRING_NUM", payload)


@check("errors.enable-2", "vhost-user: VHOST_USER_SET_VRING_ENABLE", needs="REPLY_ACK PROTOCOL_FEATURES")
def enable_2(case: Case) -> None:
    """SET_VRING_ENABLE of 2, which is neither on nor off, is refused."""
    who = "libvhost-user takes it for 1"
    case.should_refuse(case.negotiated(), "2 is neither", who, "SET_VRING_ENABLE", vring_state(case.exercise.queue, 2))


@check("errors.four-gigabytes", "vhost-user: Header")
def four_gigabytes(case: Case) -> None:
    """A message that announces 4 GiB ends the connection."""
    wire = case.connect()
    wire.send_bytes(HEADER.pack(IDS["SET_FEATURES"], 1, 0xFFFF_FFFF))
    if wire.is_quiet(5 * QUIET):
        raise Differs("the back-end waits for the rest", "the end of the connection")
    try:
        answer = wire.receive()
    except Closed:
        return
    fail(f"{answer}", "the end of the connection")


@check("errors.base-of-17-bits", "vhost-user: VRING_BASE", needs="REPLY_ACK")
def base_of_17_bits(case: Case) -> None:
    """A base of a split ring that has more than 16 bits is refused."""
    payload = vring_state(case.exercise.queue, 0x10000)
    who = "libvhost-user keeps its low bits"
    case.should_refuse(case.negotiated(), "a split ring has 16-bit indices", who, "SET_VRING_BASE", payload)
