"""What a back-end is, by what it says on the way: it gives names to the feature bits of its device type."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from ..features import TRANSPORT_BITS, UNKNOWN, DeviceType, Sight, guess
from .model import Record

_CONFIG = struct.Struct("=III")
_TRANSPORT = sum(1 << bit for bit in TRANSPORT_BITS)


@dataclass
class _Seen:
    """What was seen of the back-end of a connection."""

    features: int = 0
    queues: int | None = None
    space: bytes = b""
    device: DeviceType = UNKNOWN


class Types:
    """Tells of every record what its back-end is: `given`, or what its answers make plain."""

    def __init__(self, given: DeviceType | None) -> None:
        self._given = given
        self._seen: dict[int, _Seen] = {}

    def known(self, record: Record) -> Record:
        """The same record, with its device type."""
        if self._given is not None:
            return replace(record, device=self._given)
        seen = self._seen.setdefault(record.connection, _Seen())
        if record.event == "message" and record.channel == "main" and record.is_answer and not record.problem:
            self._learn(seen, record)
        if (record.event, record.channel) == ("closed", "main"):
            del self._seen[record.connection]
        return replace(record, device=seen.device)

    def _learn(self, seen: _Seen, record: Record) -> None:
        match record.decoded.name:
            case "GET_FEATURES":
                seen.features = record.decoded.fields["value"]
            case "GET_QUEUE_NUM":
                seen.queues = record.decoded.fields["value"]
            case "GET_CONFIG" if len(record.payload) > _CONFIG.size:
                offset, _, _ = _CONFIG.unpack_from(record.payload)
                data = record.payload[_CONFIG.size :]
                if offset <= len(seen.space):
                    seen.space = seen.space[:offset] + data + seen.space[offset + len(data) :]
            case _:
                return
        found = guess(Sight(seen.features & ~_TRANSPORT, seen.queues, seen.space, exact=False))
        seen.device = found[0] if found else UNKNOWN
