"""docs/checking.md shows what happens."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import vhost_user as vu
from specimens import Serve
from vhost_user.devices import Blk

PAGE = (Path(__file__).parents[1] / "docs" / "checking.md").read_text()
SHOWN = re.findall(r"^\$ (vhost-user .*)\n((?:(?!\$ |```).*\n)*)", PAGE, re.MULTILINE)
PROGRAM = [sys.executable, "-m", "vhost_user"]


@pytest.fixture
def played(tmp_path: Path) -> Iterator[list[tuple[str, str]]]:
    """What the page says that is printed, and what is; its background jobs run in a folder of their own."""
    (wrong,) = re.findall(r"^\$ cat wrong.py\n((?:(?!\$ ).*\n)*)", PAGE, re.MULTILINE)
    (tmp_path / "wrong.py").write_text(wrong)
    outcome = []
    with contextlib.ExitStack() as jobs:
        for line, shown in SHOWN:
            words = line.replace("/tmp/", f"{tmp_path}/").split()[1:]
            if words[-1] == "&":
                job = subprocess.Popen([*PROGRAM, *words[:-1]], cwd=tmp_path, stderr=subprocess.DEVNULL)
                jobs.callback(job.wait)
                jobs.callback(job.terminate)
                deadline = time.monotonic() + 30
                while not Path(words[-2]).exists():
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
            else:
                ended = subprocess.run([*PROGRAM, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
                outcome.append((shown, ended.stdout + ended.stderr))
        yield outcome


def test_the_commands_print_what_the_page_shows(played: list[tuple[str, str]]) -> None:
    assert len(played) == 3
    for shown, printed in played:
        assert printed == shown


def test_the_python_on_the_page_runs(serve: Serve) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    device: vu.Device = Blk(1 << 20)
    exec(code.replace("/tmp/disk.sock", str(serve(device))), {})
