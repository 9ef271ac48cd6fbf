"""README.md shows what works."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import pytest

import vhost_user as vu
from vhost_user import guest, testing
from vhost_user.cli import attach

PAGE = (Path(__file__).parents[1] / "README.md").read_text()
RNG, IN_A_GUEST, ADDER = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def names_of(code: str) -> dict[str, Any]:
    """What a block of the page defines."""
    names: dict[str, Any] = {"vu": vu, "__name__": "readme"}
    exec(code, names)
    return names


def test_the_first_device_is_one() -> None:
    with testing.connect(names_of(RNG)["Rng"]()) as driver:
        assert len(driver.queues[0].request(writable=[64])) == 64


def test_a_guest_reads_from_it(tmp_path: Path) -> None:
    names = names_of(RNG) | {"guest": guest, "tmp_path": tmp_path}
    exec(IN_A_GUEST, names)
    assert names["server"].device.requestq.statistics.bytes_written > 0


def test_the_adder_adds(capsys: pytest.CaptureFixture[str]) -> None:
    with testing.connect(names_of(ADDER)["Adder"]()) as driver:
        (queue,) = driver.queues
        assert queue.request(readable=[struct.pack("<II", 2, 3)], writable=[8]) == struct.pack("<Q", 5)
        driver.wait_config_change()
        assert driver.read_config(4) == struct.pack("<I", 1)
        driver.write_config(struct.pack("<I", 10), offset=4)
        assert queue.request(readable=[struct.pack("<II", 2, 3)], writable=[8]) == struct.pack("<Q", 15)
    assert capsys.readouterr().out == "bias: 0 -> 10\n"


def test_every_name_of_the_table_exists() -> None:
    table = PAGE.partition("| to | write |")[2].partition("\n\n")[0]
    for owner, pattern in ((vu.Request, r"request\.(\w+)"), (vu.Device, r"`(on_\w+)"), (vu.Loop, r"self\.loop\.(\w+)")):
        names = re.findall(pattern, table)
        assert names
        assert [name for name in names if not hasattr(owner, name)] == []


def test_the_lines_to_paste_are_those_that_the_command_prints() -> None:
    assert attach.instructions(names_of(RNG)["Rng"](), listening=Path("/tmp/rng.sock")) in PAGE


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", PAGE))
def test_a_link_leads_somewhere(link: str) -> None:
    assert (Path(__file__).parents[1] / link).exists()
