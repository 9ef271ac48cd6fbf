"""docs/migration.md shows what happens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from specimens import Reverse
from vhost_user.testing import connect

PAGE = (Path(__file__).parents[1] / "docs" / "migration.md").read_text()


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """Everything that the page defines."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, names)
    return names


def test_the_test_on_the_page_passes(shown: dict[str, Any]) -> None:
    shown["test_the_temperature_moves_along"]()


def test_pages_that_were_written_to_are_found(shown: dict[str, Any]) -> None:
    with connect(Reverse()) as frontend:
        pages = shown["pages_written_to"](frontend)
        # The answer, and the used ring.
        assert 1 <= len(pages) <= 2
        assert all(
            any(start <= page * 4096 < start + size for start, size in frontend.memory.regions) for page in pages
        )


def test_a_guest_can_be_moved(shown: dict[str, Any]) -> None:
    assert callable(shown["move"])
