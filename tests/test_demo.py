"""The demonstration tells the truth: what it shows happened, and what goes wrong is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

#: Each makes a device do something else than it says.
LIES = {
    "rng": "d.Rng.fill = lambda self, request: request.write(bytes(request.writable))",
    "disk": "d.Blk.write = lambda self, request, offset, count: None",
    "console": "w = d.Console.write; d.Console.write = lambda self, data: w(self, data.upper())",
    "sensor": "d.Tmp102.celsius = property(lambda self: 25.0, lambda self, celsius: None)",
}


def demo(*arguments: str, lies: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys\nimport vhost_user.devices as d\n{lies}\nfrom vhost_user.cli import main\nsys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, "demo", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def assert_that_all_is_well(ended: subprocess.CompletedProcess[str]) -> None:
    assert (ended.returncode, ended.stderr) == (0, "")
    for shown in (
        "rng      read 16 bytes",
        "disk     wrote 4 MiB and read them back; sha256",
        'console  asked "who is there?", read "Python 3.',
        "sensor   measured 21.5 °C; then Python assigned sensor.celsius = -7.25, and it measured -7.25 °C",
        "All as expected, in ",
    ):
        assert shown in ended.stdout


def test_a_real_kernel_uses_the_four_devices() -> None:
    ended = demo()
    assert_that_all_is_well(ended)
    assert "start    Linux " in ended.stdout


def test_without_a_guest_a_driver_in_the_process_uses_them() -> None:
    ended = demo("--no-guest")
    assert_that_all_is_well(ended)
    assert "Linux" not in ended.stdout


def test_a_missing_kernel_is_told_and_replaced() -> None:
    ended = demo(VHOST_USER_UML="/nowhere")
    assert_that_all_is_well(ended)
    assert "No guest: /nowhere: " in ended.stdout
    assert "The driver in this process takes its place." in ended.stdout


@pytest.mark.parametrize("device", LIES)
def test_a_device_that_lies_is_found_out(device: str) -> None:
    ended = demo("--no-guest", lies=LIES[device])
    assert (ended.returncode, ended.stdout.count("FAILED")) == (1, 1)
    assert f"{device:8} FAILED: " in ended.stdout


def test_the_kernel_finds_out_all_that_lie() -> None:
    ended = demo(lies="\n".join(LIES.values()))
    assert (ended.returncode, ended.stdout.splitlines()[-1]) == (1, "4 of 4 devices failed.")


def test_sigterm_leaves_nothing_behind(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "vhost_user", "demo"], env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        while b"Linux" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert list(tmp_path.iterdir()) == []
