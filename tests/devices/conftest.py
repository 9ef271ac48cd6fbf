"""Real Linux guests with devices attached."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import vhost_user as vu
from devices.running import EXAMPLES, Boot, Example, Program, wait_for
from specimens import Serve
from vhost_user.guest import Uml


@pytest.fixture
def boot(serve: Serve) -> Iterator[Boot]:
    """Serve devices, and boot User-Mode Linux with them, until the end of the test."""
    with contextlib.ExitStack() as guests:

        def start(*devices: vu.Device, extra_args: Sequence[str] = ()) -> Uml:
            sockets = [(serve(device), device.device_id) for device in devices]
            return guests.enter_context(Uml(sockets, extra_args=extra_args))

        yield start


@pytest.fixture
def example() -> Example:
    """The names that a file in examples/ defines."""
    return lambda name: runpy.run_path(str(EXAMPLES / name), run_name="example")


#: Runs the program sys.argv[1] as it is, but for where it serves its device: sys.argv[2].
AT_ANOTHER_PATH = """
import functools, runpy, sys, vhost_user as vu
for name in ("serve", "start"):
    method = getattr(vu.Device, name)
    setattr(vu.Device, name, lambda self, path, method=method: method(self, sys.argv[2]))
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    """Run files in examples/ until the end of the test, when they get a Ctrl-C."""
    with contextlib.ExitStack() as running:

        def run(name: str) -> tuple[Path, subprocess.Popen[str]]:
            path = tmp_path / f"{name}.sock"
            process = subprocess.Popen(
                [sys.executable, "-c", AT_ANOTHER_PATH, str(EXAMPLES / name), str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=tmp_path,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
            running.enter_context(process)
            running.callback(process.send_signal, signal.SIGINT)
            wait_for(path.exists)
            return path, process

        yield run
