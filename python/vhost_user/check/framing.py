"""Headers, answers, and the stream that they travel in."""

from __future__ import annotations

from .harness import QUIET, Case, Differs, check, fail
from .wire import HEADER, IDS, NEED_REPLY, REPLY, VERSION, Closed, Protocol, Silent, Wire, u64, vring_state


@check("framing.silent-on-connect", "vhost-user: Communication")
def silent_on_connect(case: Case) -> None:
    """The back-end says nothing before it was asked."""
    wire = case.connect()
    if not wire.is_quiet(QUIET):
        fail(f"before any request: {wire.receive()}", "nothing")


@check("framing.reply-id", "vhost-user: Header")
def reply_id(case: Case) -> None:
    """An answer carries the id of its request."""
    answer = case.connect().ask("GET_FEATURES")
    if answer.request != IDS["GET_FEATURES"]:
        fail(f"an answer with id {answer.request}", "id 1")


@check("framing.reply-flags", "vhost-user: Header")
def reply_flags(case: Case) -> None:
    """An answer has version 1 and the reply flag, and no flags that do not exist."""
    answer = case.connect().ask("GET_FEATURES")
    if answer.flags & ~NEED_REPLY != VERSION | REPLY:
        fail(f"flags {answer.flags:#x}", "0x5: version 1, reply")


@check("framing.reply-without-need-reply", "vhost-user: Header", needs="REPLY_ACK")
def reply_without_need_reply(case: Case) -> None:
    """The answer to a request with NEED_REPLY does not itself ask for one."""
    answer = case.negotiated().ask("GET_FEATURES", flags=VERSION | NEED_REPLY)
    if answer.flags & ~NEED_REPLY != VERSION | REPLY:
        fail(f"flags {answer.flags:#x}", "0x5: version 1, reply")
    if answer.flags & NEED_REPLY:
        raise Differs("flags 0xd: libvhost-user leaves NEED_REPLY set, too; QEMU, UML and DPDK accept 0x5 only", "0x5")


@check("framing.reply-size", "vhost-user: Payload")
def reply_size(case: Case) -> None:
    """The answer to GET_FEATURES is a 64-bit number, without descriptors."""
    answer = case.connect().ask("GET_FEATURES")
    if len(answer.payload) != 8 or answer.descriptors:
        fail(f"{len(answer.payload)} bytes and {answer.descriptors} descriptors", "8 bytes")


@check("framing.no-unasked-answer", "vhost-user: Communication", needs="REPLY_ACK")
def no_unasked_answer(case: Case) -> None:
    """A request that has no answer of its own gets none without NEED_REPLY."""
    wire = case.negotiated()
    wire.send("SET_VRING_NUM", vring_state(case.exercise.queue, 16))
    answer = wire.ask("GET_FEATURES")
    if answer.request != IDS["GET_FEATURES"]:
        fail(f"the first message after it is {answer}", "the answer to GET_FEATURES, which was asked next")


@check("framing.acknowledgement", "vhost-user: VHOST_USER_PROTOCOL_F_REPLY_ACK", needs="REPLY_ACK")
def acknowledgement(case: Case) -> None:
    """With REPLY_ACK and NEED_REPLY, a request is acknowledged by its id and a 64-bit 0."""
    payload = vring_state(case.exercise.queue, 16)
    answer = case.negotiated().ask("SET_VRING_NUM", payload, flags=VERSION | NEED_REPLY)
    right = (answer.request, answer.flags & ~NEED_REPLY, answer.payload) == (IDS["SET_VRING_NUM"], 5, bytes(8))
    if not right:
        fail(f"{answer}", "SET_VRING_NUM flags 0x5 size 8: zeroes")


@check(
    "framing.acknowledgement-when-features-are-set", "vhost-user: VHOST_USER_PROTOCOL_F_REPLY_ACK", needs="REPLY_ACK"
)
def acknowledgement_of_protocol_features(case: Case) -> None:
    """SET_PROTOCOL_FEATURES is acknowledged when it negotiates REPLY_ACK itself, as User-Mode Linux has it."""
    wire = case.connect()
    wire.ask("GET_PROTOCOL_FEATURES")
    try:
        status = wire.acknowledged("SET_PROTOCOL_FEATURES", u64(Protocol.REPLY_ACK))
    except Silent:
        raise Differs("not answered: the feature was not negotiated when it was sent", "an acknowledgement") from None
    if status:
        fail(f"refused with {status:#x}", "accepted: REPLY_ACK is offered")


@check("framing.one-answer", "vhost-user: VHOST_USER_PROTOCOL_F_REPLY_ACK", needs="REPLY_ACK")
def one_answer(case: Case) -> None:
    """A request that has an answer of its own gets no acknowledgement besides, also with NEED_REPLY."""
    wire = case.negotiated()
    wire.ask("GET_FEATURES", flags=VERSION | NEED_REPLY)
    if not wire.is_quiet(QUIET):
        fail(f"a second answer: {wire.receive()}", "one answer")


@check("framing.pipelined", "vhost-user: Communication")
def pipelined(case: Case) -> None:
    """Requests that arrive together are handled one after the other: a stream has no borders between messages."""
    wire = case.connect()
    wire.send_bytes(HEADER.pack(IDS["SET_OWNER"], 1, 0) + 2 * HEADER.pack(IDS["GET_FEATURES"], 1, 0))
    for _ in range(2):
        answer = wire.receive()
        if answer.request != IDS["GET_FEATURES"]:
            fail(f"{answer}", "the answer to GET_FEATURES, twice")


@check("framing.in-order", "vhost-user: Communication", needs="PROTOCOL_FEATURES")
def in_order(case: Case) -> None:
    """Answers come in the order of their requests."""
    wire = case.connect()
    wire.send("GET_FEATURES")
    wire.send("GET_PROTOCOL_FEATURES")
    came = [wire.receive().request for _ in range(2)]
    if came != [IDS["GET_FEATURES"], IDS["GET_PROTOCOL_FEATURES"]]:
        fail(f"answers with the ids {came}", "[1, 15]")


@check("framing.header-in-pieces", "vhost-user: Communication")
def header_in_pieces(case: Case) -> None:
    """A header that arrives in pieces is read to its end."""
    wire = case.connect()
    header = HEADER.pack(IDS["GET_FEATURES"], 1, 0)
    for at in range(0, len(header), 4):
        wire.send_bytes(header[at : at + 4])
        wire.is_quiet(0.005)
    came = wire.receive().u64
    if came != case.facts.features:
        fail(f"{came:#x}", f"{case.facts.features:#x}, as to a whole one")


@check("framing.payload-in-pieces", "vhost-user: Communication", needs="REPLY_ACK")
def payload_in_pieces(case: Case) -> None:
    """A payload that arrives after its header, and in pieces, is read to its end."""
    wire = case.negotiated()
    message = HEADER.pack(IDS["SET_VRING_NUM"], VERSION | NEED_REPLY, 8) + vring_state(case.exercise.queue, 16)
    for piece in (message[:12], message[12:15], message[15:]):
        wire.send_bytes(piece)
        wire.is_quiet(0.005)
    answer = wire.receive()
    if answer.request != IDS["SET_VRING_NUM"] or answer.u64:
        fail(f"{answer}", "an acknowledgement of 0")


@check("framing.version", "vhost-user: Header")
def version(case: Case) -> None:
    """A request of another version than 1 is not served."""
    wire = case.connect()
    wire.send("GET_FEATURES", flags=2)
    _unserved(wire, "a request of version 2 was served; libvhost-user does not look at it")


@check("framing.reply-is-no-request", "vhost-user: Header")
def reply_is_no_request(case: Case) -> None:
    """A message with the reply flag is not taken for a request."""
    wire = case.connect()
    wire.send("GET_FEATURES", flags=VERSION | REPLY)
    _unserved(wire, "a reply that nobody asked for was served as a request; libvhost-user does so")


def _unserved(wire: Wire, who: str) -> None:
    try:
        answer = wire.receive() if not wire.is_quiet(QUIET) else None
    except Closed:
        return
    if answer is None:
        return
    if answer.flags & ~NEED_REPLY != VERSION | REPLY:
        fail(
            f"an answer with flags {answer.flags:#x}", "nothing, the end of the connection, or an answer with flags 0x5"
        )
    raise Differs(who, "nothing, or the end of the connection")
