"""What the tests of devices share: the types of their fixtures, and patience."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vhost_user.guest import Uml

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
