"""docs/security.md: its claims have tests, and its numbers are those of the code."""

from __future__ import annotations

import re
from inspect import signature
from pathlib import Path

import pytest

import raw
import vhost_user as vu
from raw import Id, Memory, Ring
from specimens import NO_TYPE, Connect, Serve

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "security.md").read_text()
TESTS = re.findall(r"`([\w/.]+)::(\w+)`", PAGE)


def limit(of: str) -> str:
    """What the page says in its table of limits."""
    (found,) = re.findall(rf"^\| {re.escape(of)} \| (.*?) \|", PAGE, re.MULTILINE)
    return str(found)


def constant(file: str, name: str) -> str:
    """The value of a constant of the core."""
    (found,) = re.findall(rf"const {name}: [\w:]+ = (.*);", (ROOT / "src" / file).read_text())
    return str(found)


@pytest.mark.parametrize(("file", "name"), TESTS)
def test_a_claim_of_the_page_has_its_test(file: str, name: str) -> None:
    source = (ROOT / file).read_text()
    is_there = rf"def {name}\(" if file.endswith(".py") else rf"fn {name}\(|replay! {{[^}}]*\b{name}\b"
    assert re.search(is_there, source), f"{file} has no test {name}"


def test_the_page_names_its_tests() -> None:
    assert len(TESTS) > 50
    assert len(set(TESTS)) == len(TESTS)


def test_the_limits_are_what_the_page_says() -> None:
    request = "bytes of a request, readable and writable together"
    assert limit(request) == f"{vu.Queue().max_request >> 20} MiB"
    assert limit("descriptors of a ring") == constant("virtqueue/mod.rs", "MAX_QUEUE_SIZE")
    assert limit("payload of a message") == constant("protocol/header.rs", "MAX_PAYLOAD") + " bytes"
    slots = constant("backend/session.rs", "MAX_MEMORY_SLOTS")
    assert limit("memory regions") == f"{constant('protocol/payload.rs', 'MAX_REGIONS')} in a table, {slots} in slots"
    for what, name in [
        ("a front-end that reads no answers", "SEND_DEADLINE"),
        ("requests in flight when a driver resets or disables a queue", "QUIESCE_DEADLINE"),
        ("requests in flight when a session ends", "END_DEADLINE"),
    ]:
        assert f"Duration::from_secs({limit(what).split()[0]})" == constant("backend/session.rs", name)
    asked = limit("an address that the front-end is asked for, behind an IOMMU").split()[0]
    assert f"Duration::from_secs({asked})" == constant("backend/translation.rs", "MISS_DEADLINE")
    state = signature(vu.Frontend.save_state).parameters["limit"].default
    assert limit("the state of a device that a driver saves") == f"{state >> 20} MiB"
    assert limit("looking for requests before going to sleep") == f"{vu.Device.busy_poll * 1e6:g} µs"


def test_a_request_of_more_bytes_than_the_limit_breaks_its_queue(
    serve: Serve, connect: Connect, memory: Memory
) -> None:
    class Small(vu.Device, device_id=NO_TYPE):
        requestq = vu.Queue(max_request=100)

        @requestq.handler
        def answer(self, request: vu.Request) -> None:
            request.write(request.read())

        def on_queue_error(self, queue: vu.DeviceQueue, error: str) -> None:
            self.error = error

    device = Small()
    front = connect(serve(device))
    front.negotiate()
    front.share(memory)
    ring = Ring(memory)
    front.start(ring)
    assert front.exchange(ring, b"x" * 50, 50) == b"x" * 50
    ring.add([b"x" * 51], [50])
    front.kick(ring)
    raw.wait_until(lambda: hasattr(device, "error"), "the queue is broken")
    assert "holds 101 bytes or more; the queue takes 100" in device.error
    assert front.get_u64(Id.GET_FEATURES)
