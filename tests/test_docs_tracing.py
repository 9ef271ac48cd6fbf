"""docs/tracing.md shows what happens."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from specimens import Serve
from vhost_user.devices import Blk, Rng

PAGE = (Path(__file__).parents[1] / "docs" / "tracing.md").read_text()
CONSOLES = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
#: Every command of the page, with what it prints.
SHOWN = {
    command: printed.splitlines()
    for console in CONSOLES
    for command, printed in re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", console, re.MULTILINE)
}
((PROGRAM,),) = [re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)]


def same(line: str) -> str:
    """A line without what differs from time to time."""
    line = re.sub(r"^ *\d+\.\d{6}", "", line)
    line = re.sub(r"  \([\d.]+ [um]s\)$", "", line.replace(", seen late", ""))
    line = re.sub(r"=0x[0-9a-f]+|  [0-9a-f]{32}\.\.\.", "", line)
    line = re.sub(r'"time_ns": \d+', "", line)
    return line.rstrip()


def check(command: str, printed: str) -> None:
    """What was printed is what the page shows, but for what it leaves out."""
    lines = iter([same(line) for line in printed.splitlines()])
    for line in SHOWN.pop(command):
        if line != "…":
            assert same(line) in lines, f"{command}: {line}"


def test_the_commands_print_what_the_page_shows(serve: Serve, tmp_path: Path) -> None:
    assert shutil.which("tshark"), "this test needs tshark: apt-get install tshark"
    sockets = {
        "/tmp/rng.sock": serve(Rng()),
        "/tmp/disk.sock": serve(Blk(1 << 20, num_queues=2)),
        "/tmp/traced.sock": tmp_path / "traced.sock",
    }
    # The commands are those of this package, whatever is installed.
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "vhost-user").write_text(f'#!/bin/sh\nexec {sys.executable} -m vhost_user "$@"\n')
    (bin_folder / "vhost-user").chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}

    def here(text: str) -> str:
        for shown, path in sockets.items():
            text = text.replace(shown, str(path))
        return text

    def there(text: str) -> str:
        for shown, path in sockets.items():
            text = text.replace(str(path), shown)
        return text

    (trace, *others) = SHOWN
    with subprocess.Popen(
        here(trace),
        shell=True,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as tracing:
        assert tracing.stdout is not None
        said = tracing.stdout.readline()
        exec(here(PROGRAM), {})
        rest, _ = tracing.communicate(timeout=60)
    check(trace, there(said + rest))

    for command in others:
        ended = subprocess.run(
            here(command), shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == int("disk.sock" in command), ended.stderr
        shown = SHOWN[command]
        check(command, there(ended.stdout))
        assert len(ended.stdout.splitlines()) == len(shown)
    assert SHOWN == {}
