"""Devices that are served and front-ends that connect to them, and a look at what is left over afterwards."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import raw
import vhost_user as vu
from devices.vmms import compile_guest
from specimens import Connect, Serve

# Whoever starts programs in the background may have them, and what they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


def open_descriptors() -> dict[str, str]:
    """What this process has open, by number."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        # The listing's own descriptor is gone by now.
        with contextlib.suppress(FileNotFoundError):
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return found


def guest_mappings() -> list[str]:
    """The guest memory that this process has mapped."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:guest" in line]


def belongings(folder: Path) -> set[object]:
    """What a device may leave behind: descriptors, threads, mappings of guest memory, socket files."""
    sockets = [path for path in folder.rglob("*") if path.is_socket()]
    return {*open_descriptors().items(), *threading.enumerate(), *guest_mappings(), *sockets}


@pytest.fixture
def level(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing is left over after the test."""
    before = belongings(tmp_path)
    yield
    if belongings(tmp_path) - before:
        # Records keep the tracebacks of failed handlers, and those keep devices and requests.
        caplog.get_records("call").clear()
        gc.collect()
    assert belongings(tmp_path) - before == set()


@pytest.fixture
def serve(level: None, tmp_path: Path) -> Iterator[Serve]:
    """Serve a device in a thread until the end of the test. Returns the path of its socket."""
    numbers = itertools.count()
    with contextlib.ExitStack() as servers:

        def start(device: vu.Device) -> Path:
            path = tmp_path / f"{next(numbers)}.sock"
            servers.enter_context(device.start(path))
            return path

        yield start


@pytest.fixture
def connect(serve: Serve) -> Iterator[Connect]:
    """Connect a raw front-end until the end of the test, unless it is closed before."""
    with contextlib.ExitStack() as front_ends:
        yield lambda path: front_ends.enter_context(raw.FrontEnd(path))


@pytest.fixture
def memory(level: None) -> Iterator[raw.Memory]:
    """A megabyte of guest memory."""
    with raw.Memory() as memory:
        yield memory


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guest without an operating system."""
    return compile_guest(tmp_path_factory.mktemp("bare"))
