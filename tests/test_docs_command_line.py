"""docs/command-line.md shows what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "command-line.md").read_text()
BLOCKS = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)

#: Command, and what it printed, for all that end by themselves.
SHOWN = [
    (command, printed)
    for block in BLOCKS
    for command, printed in re.findall(r"^\$ (vhost-user .*)\n((?:[^$].*\n)*)", block, re.MULTILINE)
    if "is served" not in printed
]


def file_shown(name: str) -> str:
    content: str
    (content,) = (block.split("\n", 1)[1] for block in BLOCKS if block.startswith(f"$ cat {name}\n"))
    return content


def test_there_is_something_to_try() -> None:
    assert len(SHOWN) == 3


@pytest.mark.parametrize(("command", "printed"), SHOWN)
def test_a_command_prints_what_the_page_shows(tmp_path: Path, command: str, printed: str) -> None:
    (tmp_path / "disk.py").write_text(file_shown("disk.py"))
    ended = subprocess.run(
        [sys.executable, "-m", "vhost_user", *command.split()[1:]],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=10,
        check=False,
    )
    assert ended.stdout == printed


def test_the_page_shows_what_to_paste(tmp_path: Path) -> None:
    path = tmp_path / "rng.sock"
    with subprocess.Popen(
        [sys.executable, "-m", "vhost_user", "rng", "--socket-path", path], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = [process.stderr.readline() for _ in range(5)]
        process.terminate()
    assert "".join(said).replace(str(path), "/tmp/rng.sock") in PAGE
