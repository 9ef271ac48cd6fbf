"""A packed ring as it lies in memory: what was made available and used since the last look. Virtio 1.3, 2.8."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

NEXT, AVAILABLE, USED = 1, 1 << 7, 1 << 15


class Descriptor(NamedTuple):
    """A descriptor of the ring."""

    address: int
    size: int
    """Bytes; in a used one, those that the device wrote."""
    number: int
    """The buffer id."""
    flags: int

    def is_available(self, wrap: int) -> bool:
        """Whether the device may take it, in a lap whose wrap counter is `wrap`."""
        return bool(self.flags & AVAILABLE) == wrap and bool(self.flags & USED) != wrap

    def is_used(self, wrap: int) -> bool:
        """Whether the device has used it, in a lap whose wrap counter is `wrap`."""
        return bool(self.flags & AVAILABLE) == wrap == bool(self.flags & USED)


@dataclass
class Positions:
    """How far a ring was looked at: descriptors, and the wrap counters of their laps."""

    avail: int = 0
    avail_wrap: int = 1
    used: int = 0
    used_wrap: int = 1

    def __post_init__(self) -> None:
        self.counts: dict[int, int] = {}
        """Descriptors of the chains in flight, by buffer id."""
        self.made: deque[tuple[int, int]] = deque()
        """The same, with the buffer ids, as they were made available, if they are given back in that order."""

    @classmethod
    def of(cls, base: int) -> Self:
        """What SET_VRING_BASE says, or those mean who say 16 bits of it."""
        if base == 0:
            return cls()
        if base < 1 << 16:
            base |= base << 16
        return cls(base & 0x7FFF, base >> 15 & 1, base >> 16 & 0x7FFF, base >> 31)


class Request(NamedTuple):
    """A chain that was made available."""

    slot: int
    """Of its first descriptor."""
    number: int
    """Its buffer id."""
    descriptors: list[Descriptor]
    late: bool
    """It was used already, and its first descriptor is lost."""


class Completion(NamedTuple):
    """What the device wrote over a descriptor."""

    number: int
    written: int | None
    """None, if it was given back with one behind it, and has no used descriptor: then all of it was written."""


def chains(
    ring: Sequence[Descriptor], positions: Positions, *, in_order: bool = False
) -> tuple[list[Request], list[Completion]]:
    """What happened since `positions`, which go on with it.

    With `in_order` one used descriptor, the last one's, may give back all chains up to it. Virtio 1.3, section 2.8.
    """
    requests: list[Request] = []
    taken = 0
    while taken < len(ring):
        found = _next_request(ring, positions.avail, positions.avail_wrap)
        if found is None:
            break
        request, count = found
        requests.append(request)
        if in_order:
            positions.made.append((request.number, count))
        else:
            positions.counts[request.number] = count
        positions.avail, positions.avail_wrap = _advance(positions.avail, positions.avail_wrap, count, len(ring))
        taken += count
    completions: list[Completion] = []
    while len(completions) < len(ring):
        batch, count = _batch(ring, positions) if in_order else _next_completion(ring, positions)
        if not batch:
            break
        completions += batch
        positions.used, positions.used_wrap = _advance(positions.used, positions.used_wrap, count, len(ring))
    return requests, completions


def _next_completion(ring: Sequence[Descriptor], positions: Positions) -> tuple[list[Completion], int]:
    """The chain that the device gave back next, and how many descriptors it has."""
    descriptor = ring[positions.used % len(ring)]
    if not descriptor.is_used(positions.used_wrap) or descriptor.number not in positions.counts:
        return [], 0
    return [Completion(descriptor.number, descriptor.size)], positions.counts.pop(descriptor.number)


def _batch(ring: Sequence[Descriptor], positions: Positions) -> tuple[list[Completion], int]:
    """The same of chains that are given back in their order: those up to the one that the used descriptor names.

    If it names none, or is another's, those before one that was given back: whoever looked late took an id for another.
    """
    first = ring[positions.used % len(ring)]
    names_one = first.is_used(positions.used_wrap) and any(number == first.number for number, _ in positions.made)
    slot, wrap, length, written = positions.used, positions.used_wrap, 0, None
    for number, count in positions.made:
        if names_one and number == first.number:
            length, written = length + 1, first.size
            break
        if length and not names_one and ring[slot % len(ring)].is_used(wrap):
            break
        length += 1
        slot, wrap = _advance(slot, wrap, count, len(ring))
    else:
        return [], 0
    batch = [positions.made.popleft() for _ in range(length)]
    completions = [Completion(number, None) for number, _ in batch]
    if written is not None:
        completions[-1] = Completion(batch[-1][0], written)
    return completions, sum(count for _, count in batch)


def _next_request(ring: Sequence[Descriptor], slot: int, wrap: int) -> tuple[Request, int] | None:
    """The chain at a position, and how many descriptors it has."""
    at = slot % len(ring)
    first = ring[at]
    if first.is_available(wrap):
        chain = _chain(ring, at)
        return Request(at, chain[-1].number, chain, False), len(chain)
    if not first.is_used(wrap):
        return None
    # The rest of the chain is as the driver left it, if the driver gives every descriptor the buffer id, as Linux does.
    following, its_wrap = _advance(at, wrap, 1, len(ring))
    rest: list[Descriptor] = []
    if ring[following].is_available(its_wrap):
        rest = _chain(ring, following)
        if any(descriptor.number != first.number for descriptor in rest):
            rest = []
    return Request(at, first.number, rest, True), 1 + len(rest)


def _chain(ring: Sequence[Descriptor], at: int) -> list[Descriptor]:
    chain: list[Descriptor] = []
    for step in range(len(ring)):
        chain.append(ring[(at + step) % len(ring)])
        if not chain[-1].flags & NEXT:
            break
    return chain


def _advance(slot: int, wrap: int, count: int, size: int) -> tuple[int, int]:
    laps, slot = divmod(slot + count, size)
    return slot, wrap ^ laps & 1


def wish(area: bytes) -> str:
    """What event suppression says: "" for every notification, "off", or "at N/W", a descriptor and its wrap counter."""
    event, flags = struct.unpack("<HH", area)
    if flags == 0:
        return ""
    return f"at {event & 0x7FFF}/{event >> 15}" if flags == 2 else "off"
