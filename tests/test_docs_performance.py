"""docs/performance.md shows what works."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from typing import Any

from vhost_user import testing

PAGE = (Path(__file__).parents[1] / "docs" / "performance.md").read_text()


def test_its_devices_are_disks(tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": "performance"}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, names)
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(8192))
    read, write = (struct.pack("<IIQ", kind, 0, 8) for kind in (0, 1))
    for rom in (names["Rom"](image), names["FastRom"](image)):
        with testing.connect(rom) as driver:
            assert driver.read_config(8) == struct.pack("<Q", 16)
            assert driver.queues[0].request(read, [4096, 1]) == image.read_bytes()[4096:] + b"\0"
            assert driver.queues[0].submit([write, bytes(512)], 1).wait() == b"\2"
    with testing.connect(names["Forgetful"]()) as driver:
        assert driver.queues[0].submit([write, bytes(512)], 1).wait() == b"\0"
        assert driver.queues[0].request(read, [512, 1])[512:] == b"\2"
