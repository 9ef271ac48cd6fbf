"""What is offered, and what may be negotiated of it."""

from __future__ import annotations

from .harness import Case, Differs, check, fail
from .wire import Closed, Feature, Protocol, u64


@check("features.constant", "vhost-user: VHOST_USER_GET_FEATURES")
def constant(case: Case) -> None:
    """GET_FEATURES answers the same before and after SET_FEATURES."""
    wire = case.connect()
    first = wire.ask("GET_FEATURES").u64
    wire.send("SET_OWNER")
    wire.send("SET_FEATURES", u64(first & (Feature.VERSION_1 | Feature.PROTOCOL_FEATURES)))
    second = wire.ask("GET_FEATURES").u64
    if first != second:
        fail(f"{first:#x}, then {second:#x}", "the same")


@check("features.version-1", "Virtio 1.3, 6.2: Driver and Device Requirements")
def version_1(case: Case) -> None:
    """VERSION_1 is offered: a device must."""
    if not case.facts.has("VERSION_1"):
        fail(f"{case.facts.features:#x} is offered", "bit 32 among them")


@check("features.protocol-features", "vhost-user: Protocol features")
def protocol_features(case: Case) -> None:
    """PROTOCOL_FEATURES (bit 30) is offered if GET_PROTOCOL_FEATURES is answered, and only then."""
    if case.facts.has("PROTOCOL_FEATURES"):
        answer = case.connect().ask("GET_PROTOCOL_FEATURES")
        if len(answer.payload) != 8:
            fail(f"{answer}", "8 bytes")
    else:
        raise Differs("bit 30 is not offered: QEMU, cloud-hypervisor and Firecracker need it", "bit 30")


@check("features.accepted", "vhost-user: VHOST_USER_SET_FEATURES", needs="REPLY_ACK")
def accepted(case: Case) -> None:
    """Everything that is offered may be set."""
    wire = case.negotiated()
    offered = case.facts.features & ~(Feature.LOG_ALL | 1 << 33)
    status = wire.acknowledged("SET_FEATURES", u64(offered))
    if status:
        fail(f"SET_FEATURES({offered:#x}) was refused with {status:#x}", "accepted: all of it is offered")


@check("features.none", "vhost-user: VHOST_USER_SET_FEATURES", needs="REPLY_ACK")
def none(case: Case) -> None:
    """A driver that wants no feature of the device type gets none."""
    wire = case.negotiated()
    status = wire.acknowledged(
        "SET_FEATURES", u64(case.facts.features & (Feature.VERSION_1 | Feature.PROTOCOL_FEATURES))
    )
    if status:
        fail(f"refused with {status:#x}", "accepted: no feature has to be taken")


@check("features.again", "vhost-user: VHOST_USER_SET_FEATURES", needs="REPLY_ACK")
def again(case: Case) -> None:
    """SET_FEATURES may be repeated, as QEMU does."""
    wire = case.negotiated()
    value = u64(case.facts.features & (Feature.VERSION_1 | Feature.PROTOCOL_FEATURES))
    statuses = [wire.acknowledged("SET_FEATURES", value) for _ in range(2)]
    if any(statuses):
        fail(f"acknowledged with {statuses}", "[0, 0]")


@check("features.not-offered", "Virtio 1.3, 2.2.1: Driver Requirements", needs="REPLY_ACK")
def not_offered(case: Case) -> None:
    """A feature that is not offered is refused."""
    unknown = next(bit for bit in (49, 48, 47, 23) if not case.facts.features >> bit & 1)
    value = case.facts.features & (Feature.VERSION_1 | Feature.PROTOCOL_FEATURES) | 1 << unknown
    case.should_refuse(
        case.negotiated(), f"bit {unknown} was not offered", "libvhost-user does so; rust-vmm and DPDK refuse",
        "SET_FEATURES", u64(value),
    )  # fmt: skip


@check("features.protocol-constant", "vhost-user: VHOST_USER_GET_PROTOCOL_FEATURES", needs="PROTOCOL_FEATURES")
def protocol_constant(case: Case) -> None:
    """GET_PROTOCOL_FEATURES answers the same twice."""
    wire = case.connect()
    answers = {wire.ask("GET_PROTOCOL_FEATURES").u64 for _ in range(2)}
    if answers != {case.facts.protocol}:
        fail(", ".join(map(hex, sorted(answers))), f"{case.facts.protocol:#x} always")


@check("features.protocol-first", "vhost-user: VHOST_USER_SET_PROTOCOL_FEATURES", needs="REPLY_ACK")
def protocol_first(case: Case) -> None:
    """Protocol features may be negotiated before SET_FEATURES, and SET_OWNER come after them, where QEMU has it."""
    wire = case.connect()
    wire.ask("GET_FEATURES")
    wire.ask("GET_PROTOCOL_FEATURES")
    wire.send("SET_PROTOCOL_FEATURES", u64(Protocol.REPLY_ACK))
    status = wire.acknowledged("SET_OWNER")
    if status:
        fail(f"SET_OWNER was refused with {status:#x}", "an acknowledgement of 0")


@check("features.protocol-accepted", "vhost-user: VHOST_USER_SET_PROTOCOL_FEATURES", needs="REPLY_ACK")
def protocol_accepted(case: Case) -> None:
    """All protocol features that are offered may be set, again as well."""
    wire = case.negotiated()
    statuses = [wire.acknowledged("SET_PROTOCOL_FEATURES", u64(case.facts.protocol)) for _ in range(2)]
    if any(statuses):
        fail(f"acknowledged with {statuses}", "[0, 0]")


@check("features.protocol-not-offered", "vhost-user: VHOST_USER_SET_PROTOCOL_FEATURES", needs="REPLY_ACK")
def protocol_not_offered(case: Case) -> None:
    """A protocol feature that is not offered is refused."""
    wire = case.negotiated()
    value = u64(Protocol.REPLY_ACK | 1 << 62)
    case.should_refuse(wire, "bit 62 was not offered", "libvhost-user does so", "SET_PROTOCOL_FEATURES", value)


@check("features.inband-needs", "vhost-user: In-band notifications", needs="PROTOCOL_FEATURES")
def inband_needs(case: Case) -> None:
    """INBAND_NOTIFICATIONS is offered with BACKEND_REQ and REPLY_ACK, without which it cannot be negotiated."""
    offered = case.facts.protocol
    if offered & Protocol.INBAND_NOTIFICATIONS:
        missing = (Protocol.BACKEND_REQ | Protocol.REPLY_ACK) & ~offered
        if missing:
            fail(f"bit 14 is offered without {missing!r}", "both")


@check("features.queue-count", "vhost-user: VHOST_USER_GET_QUEUE_NUM", needs="MQ")
def queue_count(case: Case) -> None:
    """GET_QUEUE_NUM answers how many queues there are: at least one, and no more than messages can name."""
    count = case.facts.queues
    if not count:
        fail(f"{count} queues", "at least one")
    if count and count > 256:
        raise Differs(f"{count} queues; SET_VRING_KICK has eight bits for their index", "at most 256")


@check("features.reset-owner", "vhost-user: VHOST_USER_RESET_OWNER", needs="REPLY_ACK")
def reset_owner(case: Case) -> None:
    """RESET_OWNER, which is obsolete, is accepted or refused, and does no harm."""
    wire = case.negotiated()
    wire.send("RESET_OWNER")
    case.alive(wire)


@check("features.status", "vhost-user: VHOST_USER_GET_STATUS", needs="STATUS REPLY_ACK")
def status(case: Case) -> None:
    """GET_STATUS tells what SET_STATUS has set: FEATURES_OK after features that were offered."""
    wire = case.negotiated(Protocol.STATUS)
    case.tell(wire, "SET_STATUS", u64(0xB))
    came = wire.ask("GET_STATUS").u64
    if came != 0xB:
        fail(f"{came:#x}", "0xb: ACKNOWLEDGE, DRIVER, FEATURES_OK")


@check("features.status-reset", "Virtio 1.3, 2.4: Device Reset", needs="STATUS REPLY_ACK")
def status_reset(case: Case) -> None:
    """After SET_STATUS(0) the status is 0, and the connection goes on."""
    wire = case.negotiated(Protocol.STATUS)
    case.tell(wire, "SET_STATUS", u64(0xB))
    case.tell(wire, "SET_STATUS", u64(0))
    try:
        came = wire.ask("GET_STATUS").u64
    except Closed:
        came = -1
    if came:
        fail("the end of the connection" if came < 0 else f"{came:#x}", "0")


@check("features.reset-device", "vhost-user: VHOST_USER_RESET_DEVICE", needs="RESET_DEVICE REPLY_ACK")
def reset_device(case: Case) -> None:
    """RESET_DEVICE is accepted, and what was negotiated of the protocol stays."""
    wire = case.negotiated(Protocol.RESET_DEVICE)
    case.tell(wire, "RESET_DEVICE")
    case.tell(wire, "SET_FEATURES", u64(case.facts.features & (Feature.VERSION_1 | Feature.PROTOCOL_FEATURES)))
