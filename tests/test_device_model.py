"""Whatever a driver does with a device, and in whatever order, the device has seen it once, in order, and answers it.

The driver is the package's own; a model beside it says what the device has to have seen. `test_session_model` does the
same with messages.
"""

from __future__ import annotations

import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import vhost_user as vu
from specimens import NO_TYPE

QUEUES = st.integers(0, 1)
LEVELS = st.integers(0, (1 << 32) - 1)
PARTS = st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=4)


class Witness(vu.Device, device_id=NO_TYPE):
    """Remembers what it was asked and told."""

    askq = vu.Queue.many(2)
    pushq = vu.Queue()
    level = vu.config.u32(7, writable=True)

    def __init__(self) -> None:
        self.asked: list[tuple[int, bytes]] = []
        self.levels: list[tuple[int, int]] = []
        self.resets = 0
        self.ends: list[Exception | None] = []
        self.errors: list[str] = []

    @askq.handler
    def answer(self, request: vu.Request) -> None:
        data = request.read()
        self.asked.append((request.queue, data))
        request.write(data[::-1][: request.writable])

    @level.on_write
    def _level(self, old: int, new: int) -> None:
        self.levels.append((old, new))

    def on_reset(self) -> None:
        self.resets += 1

    def on_disconnect(self, error: Exception | None) -> None:
        self.ends.append(error)

    def on_queue_error(self, queue: vu.DeviceQueue, error: str) -> None:
        self.errors.append(f"{queue.index}: {error}")


class QueueModel:
    """What the driver knows of one of its queues."""

    def __init__(self, queue: vu.DriverQueue, base: int) -> None:
        self.queue = queue
        self.base = base
        self.enabled = True
        #: Requests that the device has not answered, with what it should answer.
        self.waiting: deque[tuple[vu.Completion, bytes, bytes]] = deque()
        self.free = queue.size


class Driver(RuleBasedStateMachine):
    """One device, one session after the other."""

    device: Witness
    path: Path

    @initialize()
    def connect(self) -> None:
        self.device.level = 7
        self.device.asked.clear()
        self.device.levels.clear()
        self.device.resets = 0
        self.resets = 0
        self.level = 7
        self.asked: list[tuple[int, bytes]] = []
        self.levels: list[tuple[int, int]] = []
        self.queues: dict[int, QueueModel] = {}
        self.memory = vu.Memory(1 << 20)
        self.more: list[vu.Memory] = []
        self.frontend = vu.Frontend.connect(self.path)
        self.frontend.negotiate()
        self.frontend.share(self.memory)

    # --- Queues -----------------------------------------------------------------------------------------------------

    @rule(index=QUEUES, size=st.sampled_from([4, 16, 256]), base=st.sampled_from([0, 1, 65535]), indirect=st.booleans())
    def make(self, index: int, size: int, base: int, indirect: bool) -> None:
        old = self.queues.get(index)
        if old is not None and old.queue.running:
            with pytest.raises(vu.StateError, match="is running"):
                self.frontend.queue(index, size)
            return
        queue = self.frontend.queue(index, size, base=base, indirect=indirect)
        if old is not None:
            self.lose(old)
        self.queues[index] = QueueModel(queue, base)

    @rule(index=QUEUES, parts=PARTS, room=st.integers(0, 60))
    def submit(self, index: int, parts: list[bytes], room: int) -> None:
        model = self.queues.get(index)
        if model is None:
            return
        if model.free < len(parts) + 1:
            return
        data = b"".join(parts)
        completion = model.queue.submit(parts, room)
        model.waiting.append((completion, data, data[::-1][:room]))
        model.free -= len(parts) + 1

    @rule(index=QUEUES)
    def stop(self, index: int) -> None:
        model = self.queues.get(index)
        if model is None or not model.queue.running:
            return
        self.settle(index)
        assert model.queue.stop() == model.base
        model.enabled = False

    @rule(index=QUEUES)
    def start(self, index: int) -> None:
        model = self.queues.get(index)
        if model is None or model.queue.running:
            return
        model.queue.start()
        model.enabled = True

    @rule(index=QUEUES, on=st.booleans())
    def enable(self, index: int, on: bool) -> None:
        model = self.queues.get(index)
        if model is None or not model.queue.running:
            return
        self.settle(index)
        model.queue.enable(on)
        model.enabled = on

    @rule(index=QUEUES)
    def settle(self, index: int) -> None:
        """Everything is answered that may be, and nothing else."""
        model = self.queues.get(index)
        if model is None:
            return
        if not (model.queue.running and model.enabled):
            # Whatever it may do wrong was done before a message is answered.
            self.frontend.status()
            assert not any(completion.done for completion, _, _ in model.waiting)
            return
        while model.waiting:
            completion, data, expected = model.waiting.popleft()
            assert completion.wait() == expected
            self.asked.append((index, data))
            model.base = (model.base + 1) % 65536
        model.free = model.queue.size

    def lose(self, model: QueueModel) -> None:
        """The queue is gone, and what it had."""
        for completion, _, _ in model.waiting:
            with pytest.raises(vu.StateError):
                completion.wait()

    # --- The device -------------------------------------------------------------------------------------------------

    @rule(level=LEVELS)
    def write_config(self, level: int) -> None:
        self.frontend.write_config(level.to_bytes(4, "little"))
        self.levels.append((self.level, level))
        self.level = level

    @rule(level=LEVELS)
    def device_changes_its_config(self, level: int) -> None:
        self.device.level = self.level = level

    @rule(offset=st.integers(0, 8), size=st.integers(0, 8))
    def read_config(self, offset: int, size: int) -> None:
        space = self.level.to_bytes(4, "little")
        assert self.frontend.read_config(size, offset) == space[offset : offset + size].ljust(size, b"\0")

    @rule(data=st.binary(min_size=1, max_size=30))
    def device_pushes(self, data: bytes) -> None:
        queue = self.frontend.queue(2, 4)
        completion = queue.submit(writable=64)
        # The device may not have seen the queue's kick yet.
        self.device.pushq.push(data, timeout=10)
        assert completion.wait() == data
        assert queue.stop() == 1

    # --- The session ------------------------------------------------------------------------------------------------

    @rule(sizes=st.lists(st.sampled_from([1 << 12, 1 << 16]), max_size=3))
    def share(self, sizes: list[int]) -> None:
        """Other memory comes and goes while queues run."""
        self.more = [vu.Memory(regions=[((at + 1) << 32, size)]) for at, size in enumerate(sizes)]
        self.frontend.share(self.memory, *self.more)

    @rule()
    def reset(self) -> None:
        self.settle_all()
        self.frontend.reset()
        self.resets += 1
        self.forget_queues()

    @rule()
    def reconnect(self) -> None:
        self.settle_all()
        self.frontend.reconnect()
        self.forget_queues()

    def settle_all(self) -> None:
        for index in self.queues:
            self.settle(index)

    def forget_queues(self) -> None:
        for model in self.queues.values():
            self.lose(model)
        self.queues.clear()

    @invariant()
    def the_device_was_told_the_same(self) -> None:
        assert self.device.level == self.level
        assert self.device.levels == self.levels
        assert self.device.resets == self.resets
        assert not self.device.errors

    def teardown(self) -> None:
        if not hasattr(self, "frontend"):
            return
        try:
            self.settle_all()
            for index in (0, 1):
                seen = [data for queue, data in self.device.asked if queue == index]
                assert seen == [data for queue, data in self.asked if queue == index]
        finally:
            self.frontend.close()


def test_a_device_sees_what_its_model_says(level: None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.sock"
        device = Witness()
        with device.start(path):
            machine: Any = type("ServedDevice", (Driver,), {"device": device, "path": path})
            run_state_machine_as_test(
                machine,
                settings=settings(
                    max_examples=50,
                    stateful_step_count=25,
                    deadline=None,
                    derandomize=True,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        assert set(device.ends) == {None}
