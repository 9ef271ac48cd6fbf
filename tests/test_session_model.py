"""Whatever a front-end does in whatever order, a request is answered exactly once, rightly, and when it may be.

A model of the states of a ring beside the real session. vhost-user specification, "Ring states".
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from raw import (
    CONFIGURE_MEM_SLOTS,
    INDIRECT_DESC,
    MQ,
    PROTOCOL_FEATURES,
    REPLY_ACK,
    VERSION_1,
    Chain,
    FrontEnd,
    Id,
    Memory,
    Ring,
    u64,
    vring_state,
)
from specimens import ReverseMany

FEATURES = PROTOCOL_FEATURES | VERSION_1 | INDIRECT_DESC
QUEUES = st.integers(0, 1)


class QueueModel:
    """What the specification says about one queue."""

    def __init__(self) -> None:
        self.ring: Ring | None = None
        self.started = False
        self.enabled = False
        self.has_kick = False
        self.base = 0
        self.offered: list[tuple[Chain, bytes]] = []

    @property
    def processes(self) -> bool:
        return self.started and self.enabled


class Session(RuleBasedStateMachine):
    """One device, one front-end after the other, and two queues of each."""

    device: ReverseMany
    path: Path

    @initialize()
    def connect(self) -> None:
        self.front = FrontEnd(self.path)
        self.memory = Memory(1 << 24)
        self.queues = [QueueModel() for _ in range(2)]
        self.data = self.numbers()
        self.front.negotiate(FEATURES, REPLY_ACK | MQ | CONFIGURE_MEM_SLOTS)
        self.front.share(self.memory)
        self.set_up(index=0, size=16, base=0)
        self.start(index=0)
        self.enable(index=0, on=True)

    @staticmethod
    def numbers() -> Iterator[bytes]:
        number = 0
        while True:
            number += 1
            yield b"request %d" % number

    def offer(self, queue: QueueModel, *, indirect: bool) -> None:
        if queue.ring is None or len(queue.offered) == queue.ring.size // 2:
            return
        data = next(self.data)
        pieces = [data[:3], data[3:]] if indirect else [data]
        queue.offered.append((queue.ring.add(pieces, [30], indirect=indirect), data))

    def settle(self, index: int) -> None:
        """Everything that was offered is answered if it may be, and nothing if it may not."""
        queue = self.queues[index]
        if queue.ring is None:
            return
        if not queue.processes:
            if queue.has_kick:
                self.front.kick(queue.ring)
            # Whatever the kick leads to has happened when a later message is answered.
            self.front.get_u64(Id.GET_QUEUE_NUM)
            assert queue.ring.take() == []
            return
        if queue.offered:
            self.front.kick(queue.ring)
            lengths = dict(queue.ring.wait(len(queue.offered)))
            for chain, data in queue.offered:
                assert chain.written(lengths[chain.head]) == bytes([index]) + data[::-1]
            queue.offered.clear()
        assert queue.ring.take() == []

    # --- What a front-end does --------------------------------------------------------------------------------------

    @rule(index=QUEUES, size=st.sampled_from([4, 16, 256]), base=st.sampled_from([0, 1, 65535]))
    def set_up(self, index: int, size: int, base: int) -> None:
        """A new ring in new memory: what was offered on the last one is forgotten."""
        queue = self.queues[index]
        ring = Ring(self.memory, index, size)
        ring.clear(base)
        if queue.processes:
            assert self.front.ask(Id.SET_VRING_NUM, vring_state(index, size)) != 0
            return
        self.front.place(ring, base)
        # A ring that was started before and not stopped goes on with the kick descriptor that it has.
        queue.ring, queue.base, queue.offered = ring, base, []

    @rule(index=QUEUES)
    def start(self, index: int) -> None:
        queue = self.queues[index]
        if queue.ring is not None:
            self.front.set_kick(queue.ring)
            queue.started = queue.has_kick = True
            self.settle(index)

    @rule(index=QUEUES, on=st.booleans())
    def enable(self, index: int, on: bool) -> None:
        queue = self.queues[index]
        self.front.tell(Id.SET_VRING_ENABLE, vring_state(index, int(on)))
        queue.enabled = on
        self.settle(index)

    @rule(index=QUEUES, indirect=st.booleans(), count=st.integers(1, 5))
    def submit(self, index: int, indirect: bool, count: int) -> None:
        for _ in range(count):
            self.offer(self.queues[index], indirect=indirect)
        self.settle(index)

    @rule(index=QUEUES)
    def stop(self, index: int) -> None:
        queue = self.queues[index]
        expected = queue.base
        if queue.ring is not None:
            expected = (queue.ring.avail_index - len(queue.offered)) % 65536
        assert self.front.get(Id.GET_VRING_BASE, vring_state(index)) == vring_state(index, expected)
        queue.started = False
        self.settle(index)

    @rule()
    def negotiate_again(self) -> None:
        self.front.tell(Id.SET_FEATURES, u64(FEATURES))

    @rule()
    def enable_all_by_features(self) -> None:
        self.front.tell(Id.SET_FEATURES, u64(FEATURES & ~PROTOCOL_FEATURES))
        for index, queue in enumerate(self.queues):
            queue.enabled = True
            self.settle(index)
        self.front.tell(Id.SET_FEATURES, u64(FEATURES))

    @rule()
    def share_again(self) -> None:
        """The same memory, mapped anew under running rings."""
        self.front.share(self.memory)

    @rule()
    def reset(self) -> None:
        self.front.tell(Id.RESET_DEVICE)
        for queue in self.queues:
            queue.enabled = False
            if queue.ring is not None:
                queue.ring.clear()
            queue.base, queue.offered = 0, []

    @precondition(lambda self: any(queue.ring for queue in self.queues))
    @rule()
    def reconnect(self) -> None:
        self.close()
        self.connect()

    def close(self) -> None:
        self.front.close()
        self.memory.close()

    def teardown(self) -> None:
        if hasattr(self, "front"):
            for index in range(2):
                self.settle(index)
            self.close()


def test_a_session_behaves_like_its_model(level: None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.sock"
        device = ReverseMany()
        with device.start(path):
            machine = type("ServedSession", (Session,), {"device": device, "path": path})
            run_state_machine_as_test(
                machine,
                settings=settings(
                    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
                ),
            )
        assert all(queue.statistics.errors == 0 for queue in device.queues)
