"""docs/shell.md shows what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from test_shell import Open, Terminal, folder, terminal

__all__ = ["folder", "terminal"]

PAGE = (Path(__file__).parents[1] / "docs" / "shell.md").read_text()
SOURCE, COMMAND, SESSION, RELOADED = (block for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture
def answer(folder: Path) -> Path:
    path = folder / "answer.py"
    path.write_text(SOURCE.removeprefix("$ cat answer.py\n"))
    return path


def test_the_command_prints_what_the_page_shows(answer: Path) -> None:
    line, printed = COMMAND.split("\n", 1)
    ended = subprocess.run(
        line.replace("$ vhost-user", f"{sys.executable} -m vhost_user"),
        shell=True,
        cwd=answer.parent,
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert ended.stdout == printed


def test_the_session_is_what_the_page_shows(answer: Path, terminal: Open) -> None:
    guest = terminal("answer.py:Answer")
    introduction, *steps = SESSION.split("guest# ")
    assert introduction == "$ vhost-user shell answer.py:Answer\n" + guest.introduction.removesuffix("guest# ")
    for step in steps:
        command, printed = step.split("\n", 1)
        assert guest.run(command) == printed


EDITS: list[Callable[[str], str]] = [
    lambda source: source.replace("42", "7"),
    lambda source: source.replace("* request.writable)", "* request.writable"),
    lambda source: source.replace("number =", "eventq = vu.Queue()\n    number ="),
]


def test_the_edits_have_the_effect_that_the_page_shows(answer: Path, terminal: Open) -> None:
    guest = terminal("answer.py:Answer", "--reload")
    edits = iter(EDITS)
    source = answer.read_text()
    for step in RELOADED.split("guest# ")[1:]:
        command, *lines = step.splitlines()
        printed = [line for line in lines if not line.startswith("answer.py")]
        assert guest.run(command).splitlines() == printed
        for report in lines[len(printed) :]:
            changed = next(edits)(source)
            answer.write_text(changed)
            wait_for_line(guest, report)
            if report.endswith("has new code"):
                source = changed
    assert next(edits, None) is None


def wait_for_line(guest: Terminal, line: str) -> None:
    assert guest.read_until("\r\n").strip() == line
