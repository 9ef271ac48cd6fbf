"""What a back-end tells of itself: features, queues, memory slots, configuration space."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from .errors import ProtocolError
from .features import UNKNOWN, DeviceType, Sight, guess, protocol_feature_names
from .frontend import TRANSPORT_FEATURES, Frontend

#: Bytes of configuration space that every known front-end and back-end can send at once.
MAX_CONFIG = 256


@dataclass(frozen=True)
class Info:
    """What was seen, by name."""

    device: DeviceType
    """The type, which was given or guessed; "unknown" if neither."""
    reason: str
    """Why it is thought to be that."""
    features: int
    """The answer to GET_FEATURES."""
    protocol_features: int | None
    """The answer to GET_PROTOCOL_FEATURES; None without the feature PROTOCOL_FEATURES."""
    queues: int | None
    """The answer to GET_QUEUE_NUM; None without the protocol feature MQ. Network devices may count pairs."""
    memory_slots: int | None
    """The answer to GET_MAX_MEM_SLOTS; None without the protocol feature CONFIGURE_MEM_SLOTS."""
    config: bytes
    """The configuration space: as much as the type has, or as the back-end gives up to 256 bytes."""

    @property
    def fields(self) -> dict[str, Any]:
        """The configuration space, decoded."""
        return self.device.decode_config(self.config)

    def as_dict(self) -> dict[str, object]:
        """The same for JSON."""
        protocol = self.protocol_features
        return {
            "device": {"id": self.device.id or None, "name": self.device.name, "reason": self.reason},
            "features": {"value": self.features, "names": self.device.feature_names(self.features)},
            "protocol_features": protocol
            if protocol is None
            else {"value": protocol, "names": protocol_feature_names(protocol)},
            "queues": self.queues,
            "memory_slots": self.memory_slots,
            "config": {"size": len(self.config), "bytes": self.config.hex(), "fields": self.fields},
        }


def inspect(frontend: Frontend, device: DeviceType | None = None) -> Info:
    """Ask the back-end at the other end of `frontend`, which is taken for a `device` if that is given.

    The type cannot be learned from the protocol. It is guessed where features and configuration make it plain.

    Raises:
        VhostUserError: the back-end breaks the protocol, does not answer, or is gone.
    """
    frontend.negotiate()
    has_protocol = bool(frontend.offered_features >> 30 & 1)
    space, exact = _read_config(frontend, device) if "CONFIG" in _names(frontend.protocol) else (b"", False)
    reason = "by --device"
    if device is None:
        sight = Sight(frontend.offered_features & ~TRANSPORT_FEATURES, frontend.queue_count, space, exact)
        device, reason = guess(sight) or (UNKNOWN, "a back-end does not tell; see --device")
        if device.layout is not None:
            space = space[: device.layout.size]
    slots = None
    if "CONFIGURE_MEM_SLOTS" in _names(frontend.protocol):
        (slots,) = struct.unpack("=Q", frontend.exchange("GET_MAX_MEM_SLOTS") or bytes(8))
    return Info(
        device,
        reason,
        frontend.offered_features,
        int(frontend.offered_protocol) if has_protocol else None,
        frontend.queue_count,
        slots,
        space,
    )


def _names(features: int) -> list[str]:
    return protocol_feature_names(features)


def _read_config(frontend: Frontend, device: DeviceType | None) -> tuple[bytes, bool]:
    """As much of the configuration space as there is, and whether more of it was refused."""
    most = device.layout.size if device and device.layout else MAX_CONFIG
    whole = _try_config(frontend, most)
    if whole is not None:
        return whole, False
    # Refused: the back-end has less, and says so only by that.
    least, found = 0, b""
    while most - least > 1:
        size = (least + most) // 2
        space = _try_config(frontend, size)
        if space is None:
            most = size
        else:
            least, found = size, space
    return found, True


def _try_config(frontend: Frontend, size: int) -> bytes | None:
    try:
        return frontend.read_config(size)
    except ProtocolError:
        # After a refusal the session goes on; after anything else the next message tells.
        return None
