"""A guest and its devices in virtual time, with a real kernel."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vhost_user as vu
from specimens import Reverse
from vhost_user.devices import Tmp102, i2c
from vhost_user.devices.rng import Rng
from vhost_user.guest import CommandTimeout, GuestError, find_kernel
from vhost_user.simulation import Event, Simulation, SimulationError

ROOT = Path(__file__).parents[1]


class SlowRng(vu.Device, device_id=vu.DeviceId.RNG):
    """Answers each request after 10 seconds."""

    requestq = vu.Queue()

    @requestq.handler
    def fill(self, request: vu.Request) -> None:
        held = request.detach()

        def answer() -> None:
            held.write(b"x" * held.writable)
            held.complete()

        self.loop.call_later(10, answer)


def test_an_hour_of_sleep_is_an_hour_for_everybody(level: None) -> None:
    with Simulation() as simulation:
        guest = simulation.boot_uml()
        before = simulation.now
        uptime = guest.run("sleep 3600; cat /proc/uptime").text.split()[0]
        assert float(uptime) == pytest.approx(3600, abs=0.1)
        assert simulation.now - before == pytest.approx(3600, abs=0.1)


def test_a_device_that_answers_after_ten_seconds_takes_exactly_that_long() -> None:
    with Simulation() as simulation:
        simulation.add(SlowRng())
        guest = simulation.boot_uml()
        guest.run("head -c 8 /dev/hwrng")
        times = {
            what: [e.time for e in simulation.trace if e[1:] == ("SlowRng", what)] for what in ("requestq", "timer")
        }
        assert times["timer"]
        for asked, answered in zip(times["requestq"], times["timer"], strict=False):
            assert answered - asked == pytest.approx(10, abs=1e-9)


def test_only_a_guest_that_works_without_a_pause_for_too_long_hangs() -> None:
    with Simulation() as simulation:
        guest = simulation.boot_uml()
        simulation.patience = 2.5
        for second in range(1, 8):
            simulation.call_at(simulation.now + second, lambda: time.sleep(0.4))
        before = time.monotonic()
        assert guest.run("sleep 8; echo on").text == "on"
        assert time.monotonic() - before > simulation.patience
        simulation.patience = 0.5
        with pytest.raises(GuestError, match="hangs"):
            guest.run("while :; do :; done")


def story() -> list[Event]:
    with Simulation() as simulation:
        simulation.add(Rng(random.Random(1).randbytes))
        sensor = Tmp102()
        bus = simulation.add(i2c.Adapter(sensor))
        guest = simulation.boot_uml()

        def heat() -> None:
            sensor.celsius = 30
            assert bus.loop.time() == simulation.now

        bus.loop.call_later(2, heat)
        guest.run("echo tmp102 0x48 > /sys/bus/i2c/devices/i2c-0/new_device; sleep 1")
        read = "cat /sys/class/hwmon/hwmon0/temp1_input"
        assert guest.run(f"{read}; sleep 2; {read}").text.split() == ["25000", "30000"]
        # From 15 seconds on, Linux does some things at times that it throws dice for.
        guest.run("head -c 64 /dev/hwrng > /dev/null; sleep 70; head -c 64 /dev/hwrng > /dev/null")
        return simulation.trace


def test_two_runs_are_alike() -> None:
    trace = story()
    assert {event.who for event in trace} == {"guest", "Rng", "Adapter"}
    assert trace == story()


def test_time_moves_only_while_somebody_waits() -> None:
    calls: list[float] = []
    with Simulation() as simulation:
        guest = simulation.boot_uml()
        simulation.call_at(simulation.now + 5, lambda: calls.append(simulation.now))
        before = simulation.now
        simulation.run_for(4)
        assert simulation.now - before == pytest.approx(4)
        assert not calls
        simulation.run_for(4)
        assert calls == [pytest.approx(before + 5)]
        assert guest.run("echo on").text == "on"


def test_a_deadline_of_a_command_is_virtual() -> None:
    with Simulation() as simulation:
        guest = simulation.boot_uml()
        with pytest.raises(CommandTimeout, match="killed after 30 s"):
            guest.run("sleep 3600", timeout=30)
        assert simulation.now == pytest.approx(30, abs=1)


def test_a_kernel_that_does_not_know_of_virtual_time_is_told_apart(tmp_path: Path, level: None) -> None:
    kernel = tmp_path / "linux"
    # It never hears of the calendar.
    kernel.write_text(
        "#!/bin/bash\n"
        'for word; do case "$word" in time-travel*) shift;; *) shift; set -- "$@" "$word";; esac; done\n'
        f'exec {find_kernel()} "$@"\n'
    )
    kernel.chmod(0o755)
    with pytest.raises(SimulationError, match="CONFIG_UML_TIME_TRAVEL_SUPPORT"), Simulation() as simulation:
        simulation.boot_uml(kernel=kernel)


def test_a_guest_that_dies_is_told(level: None) -> None:
    with Simulation() as simulation:
        guest = simulation.boot_uml()
        with pytest.raises(GuestError, match="the guest ended while running"):
            guest.run("echo o > /proc/sysrq-trigger; busybox poweroff -f; sleep 10")


def test_ctrl_c_ends_a_wait_and_the_simulation(level: None) -> None:
    def wait() -> None:
        with Simulation() as simulation:
            guest = simulation.boot_uml()
            simulation.call_at(100, lambda: signal.raise_signal(signal.SIGINT))
            guest.run("sleep 1000")

    with pytest.raises(KeyboardInterrupt):
        wait()


def test_what_knows_nothing_of_virtual_time_is_refused(level: None) -> None:
    class Asynchronous(vu.Device, device_id=4):
        requestq = vu.Queue()

        @requestq.handler
        async def fill(self, request: vu.Request) -> None:
            pass

    with Simulation() as simulation:
        with pytest.raises(SimulationError, match="asyncio counts real time"):
            simulation.add(Asynchronous())
        device = simulation.add(Reverse())
        with pytest.raises(SimulationError, match="use call_later"):
            device.loop.watch(0, lambda: None)
    with pytest.raises(vu.StateError):
        simulation.add(Reverse())


def test_the_example_prints_what_the_page_shows() -> None:
    [block] = re.findall(r"```console\n(.*?)```", (ROOT / "docs" / "simulation.md").read_text(), re.DOTALL)
    source, printed = block.split("$ python examples/simulation.py\n")
    example = ROOT / "examples" / "simulation.py"
    assert source == "$ cat examples/simulation.py\n" + example.read_text()
    ended = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=200, check=True)
    assert ended.stdout == printed
