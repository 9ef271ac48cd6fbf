"""docs/benchmarking.md shows what is printed: not the figures, which are another machine's, but everything else."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage_daemon import storage_daemon
from vhost_user.bench import Disk, measure

PAGE = (Path(__file__).parents[1] / "docs" / "benchmarking.md").read_text()
ONE, TWO, ANY = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
VHOST_USER = [sys.executable, "-m", "vhost_user"]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with the sockets of the page."""
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    with contextlib.ExitStack() as servers:
        servers.enter_context(storage_daemon(tmp_path))
        for command in ("blk disk.img --socket-path disk.sock", "rng --socket-path rng.sock"):
            *_, path = words = command.split()
            process = subprocess.Popen([*VHOST_USER, *words], cwd=tmp_path, stderr=subprocess.DEVNULL)
            servers.enter_context(process)
            servers.callback(process.terminate)
            deadline = time.monotonic() + 30
            while not (tmp_path / path).exists():
                assert time.monotonic() < deadline, f"{command} does not listen"
                time.sleep(0.01)
        yield tmp_path


def printed(block: str, folder: Path) -> tuple[str, str]:
    """What a command of the page prints, in less time than there, and what the page says."""
    line, shown = block.split("\n", 1)
    words = shlex.split(re.sub(r"--runtime \S+", "--runtime 0.2", line))
    assert words[:2] == ["$", "vhost-user"]
    ended = subprocess.run(
        [*VHOST_USER, *words[2:]], cwd=folder, capture_output=True, text=True, timeout=30, check=True
    )
    return ended.stdout, shown


def form(text: str) -> list[str]:
    """The text without figures: those are at the end of a row of the table, or say how much was done."""
    rows = [re.sub(r"\d+ requests, [\d.]+ s", "N requests, N s", row) for row in text.splitlines()]
    return [re.sub(r"( +\d[\d.]*( \[[\d.]+\])?)+$", " N", row) for row in rows]


@pytest.mark.parametrize("block", [ONE, TWO])
def test_the_table_is_the_one_of_the_page(folder: Path, block: str) -> None:
    output, shown = printed(block, folder)
    assert form(output) == form(shown)


def test_a_program_gets_the_figures_of_any_device(folder: Path) -> None:
    output, shown = printed(ANY, folder)
    assert shown == ""
    (run,) = json.loads(output)["targets"][0]["runs"]
    assert run["requests"] > 0


def test_the_code_of_the_page_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    exec(CODE.replace("seconds=2.0", "seconds=0.2"), {"measure": measure, "Disk": Disk})
    figures = [float(word) for word in capsys.readouterr().out.split()]
    assert len(figures) == 3
    assert min(figures) > 0
