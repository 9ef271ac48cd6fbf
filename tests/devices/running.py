"""What the tests of devices share: the types of their fixtures, and patience."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vhost_user.guest import Uml

MIB = 1 << 20

EXAMPLES = Path(__file__).parents[2] / "examples"

#: Serves devices, and boots a guest with them.
Boot = Callable[..., Uml]
#: The names that a file in examples/ defines.
Example = Callable[[str], dict[str, Any]]
#: Runs a file in examples/. Returns the socket of its device, and the process.
Program = Callable[[str], tuple[Path, "subprocess.Popen[str]"]]


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait until `condition()` is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


class MortalDisk:
    """A disk in a process of its own, which is killed and started again."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.image, self.socket = folder / "disk.img", folder / "disk.sock"
        self.image.write_bytes(bytes(16 * MIB))
        self._options = options
        self._start()

    def _start(self) -> None:
        command = [sys.executable, "-m", "vhost_user", "blk", str(self.image), *self._options]
        command += ["--socket-path", str(self.socket)]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self._written = self.image.stat().st_mtime_ns

    @property
    def in_use(self) -> bool:
        """Whether the process of today has written to the disk."""
        return self.image.stat().st_mtime_ns != self._written

    def die(self) -> None:
        self._process.kill()
        self._process.wait()
        self._start()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self.socket.unlink(missing_ok=True)
