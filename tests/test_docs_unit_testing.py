"""docs/unit-testing.md shows what happens."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "unit-testing.md").read_text()
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
SHOWN = re.findall(r"```console\n\$ (.*?)\n(.*?)```", PAGE, re.DOTALL)


def without_time(printed: str) -> str:
    return re.sub(r"in [0-9.]+s", "in a moment", printed)


def test_all_files_and_commands_are_found() -> None:
    assert len(FILES) == PAGE.count("```python") == 5
    assert len(SHOWN) == PAGE.count("```console") == 3
    assert {name for name in FILES if name.startswith("test_")} == {
        name for command, _ in SHOWN for name in re.findall(r"test_\w+\.py", command)
    }


@pytest.mark.parametrize(("command", "printed"), SHOWN)
def test_a_command_prints_what_the_page_shows(tmp_path: Path, command: str, printed: str) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    ended = subprocess.run(
        [sys.executable, "-m", *command.split(), "-W", "error"],
        cwd=tmp_path,
        # In continuous integration, pytest does not cut its lines.
        env=os.environ | {"COLUMNS": "80", "CI": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert without_time(ended.stdout) == without_time(printed)
