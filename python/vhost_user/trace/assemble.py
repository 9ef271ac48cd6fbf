"""From what came on a connection, in pieces, to messages: what each is, and which request an answer is for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from .model import HEADER, Channel, Descriptor, Party, Record

#: A longer payload is no message's; after such a header nobody knows where the next one begins. Bytes.
LONGEST_PAYLOAD = 1 << 16
#: Requests that were never answered are remembered up to this number.
UNANSWERED = 256


@dataclass
class Unanswered:
    """The requests of a channel that may still be answered, oldest first."""

    _requests: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=UNANSWERED))

    def asked(self, request: int, time: int) -> None:
        self._requests.append((request, time))

    def answered(self, request: int, time: int) -> int | None:
        """Nanoseconds since the request. Answers come in the order of requests, some of which have none."""
        if all(asked != request for asked, _ in self._requests):
            return None
        while True:
            asked, at = self._requests.popleft()
            if asked == request:
                return time - at


class Assembler:
    """One direction of a channel. `feed` it what came; it yields what is complete."""

    def __init__(self, connection: int, channel: Channel, sender: Party, unanswered: Unanswered) -> None:
        self._blank = Record(0, connection, "message", channel, sender)
        self._unanswered = unanswered
        self._bytes = bytearray()
        self._descriptors: list[Descriptor] = []
        #: Why the messages cannot be told apart any more.
        self._lost = ""

    @property
    def at_boundary(self) -> bool:
        """Whether the next byte is the first of a message."""
        return not self._bytes and not self._lost

    def feed(self, data: bytes, descriptors: Sequence[Descriptor], time: int) -> Iterator[Record]:
        self._descriptors += [replace(descriptor, offset=len(self._bytes)) for descriptor in descriptors]
        self._bytes += data
        while self._bytes and not self._lost:
            if len(self._bytes) < HEADER.size:
                return
            request, _, size = HEADER.unpack_from(self._bytes)
            if size > LONGEST_PAYLOAD:
                self._lost = (
                    f"request {request} announces {size} bytes of payload, more than any message has: "
                    "from here on, messages cannot be told apart"
                )
                break
            if len(self._bytes) < HEADER.size + size:
                return
            yield self._message(request, self._take(HEADER.size + size, time))
        if self._lost and self._bytes:
            yield replace(self._take(len(self._bytes), time), event="bytes", text=self._lost)

    def end(self, time: int) -> Iterator[Record]:
        """The connection is over."""
        count = len(self._bytes)
        if not count:
            return
        if count < HEADER.size:
            text = f"the connection ended after {count} of the {HEADER.size} bytes of a header"
        else:
            request, _, size = HEADER.unpack_from(self._bytes)
            text = f"the connection ended after {count - HEADER.size} of the {size} payload bytes of request {request}"
        yield replace(self._take(count, time), event="bytes", text=text)

    def _take(self, count: int, time: int) -> Record:
        data = bytes(self._bytes[:count])
        del self._bytes[:count]
        mine = tuple(descriptor for descriptor in self._descriptors if descriptor.offset < count)
        later = self._descriptors[len(mine) :]
        self._descriptors = [replace(descriptor, offset=descriptor.offset - count) for descriptor in later]
        return replace(self._blank, time=time, data=data, descriptors=mine)

    def _message(self, request: int, record: Record) -> Record:
        if record.is_answer:
            return replace(record, latency=self._unanswered.answered(request, record.time))
        self._unanswered.asked(request, record.time)
        return record
