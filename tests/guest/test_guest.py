"""The guests themselves, without devices: a missing guest fails here, with the words that say how to get it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raw import wait_until
from vhost_user.guest import CommandFailed, CommandTimeout, Guest, GuestError, GuestNotFound, Qemu, Uml


@pytest.fixture(scope="module")
def uml() -> Iterator[Uml]:
    with Uml() as running:
        yield running


@pytest.fixture(scope="module")
def qemu() -> Iterator[Qemu]:
    with Qemu() as running:
        yield running


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


@pytest.fixture(params=["uml", "qemu"])
def any_guest(request: pytest.FixtureRequest) -> Guest:
    running: Guest = request.getfixturevalue(request.param)
    return running


def test_a_command_gives_its_status_and_both_outputs(any_guest: Guest) -> None:
    result = any_guest.run("printf 'out\\0put'; echo error >&2; exit 7", check=False)
    assert (result.status, result.stdout, result.stderr) == (7, b"out\0put", b"error\n")


def test_a_failing_command_raises_with_what_it_printed(any_guest: Guest) -> None:
    with pytest.raises(CommandFailed, match=r"'echo no luck >&2; false' ended with exit status 1\n--- stderr\nno luck"):
        any_guest.run("echo no luck >&2; false")


def test_a_command_is_any_shell_text(any_guest: Guest) -> None:
    script = """
        # it's a "comment" with $dollars, `ticks`, a \\ and ünïcode
        for number in 1 2; do
            echo "$number"
        done
        cat <<'END'
        'it''s'
        END
    """
    assert any_guest.run(textwrap.dedent(script)).text == "1\n2\n'it''s'"


def test_a_long_command_arrives(any_guest: Guest) -> None:
    text = "0123456789'" * 1000
    assert any_guest.run(f'printf %s "{text}"').stdout == text.encode()


def test_output_is_not_touched_on_its_way(any_guest: Guest) -> None:
    command = 'i=0; while [ $i -lt 256 ]; do printf "\\\\$(printf %o $i)"; i=$((i + 1)); done; printf end >&2'
    result = any_guest.run(command)
    assert (result.stdout, result.stderr) == (bytes(range(256)), b"end")


def test_large_output_arrives_whole(uml: Uml) -> None:
    result = uml.run("seq 500000; seq 100000 >&2")
    assert result.stdout == "".join(f"{number}\n" for number in range(1, 500_001)).encode()
    assert len(result.stderr) == 588_895


def test_a_command_is_killed_at_its_deadline_and_the_guest_goes_on(any_guest: Guest) -> None:
    with pytest.raises(CommandTimeout, match="was killed after 1 s") as raised:
        any_guest.run("echo begun; sleep 100", timeout=1)
    assert raised.value.result.stdout == b"begun\n"
    assert any_guest.run("echo here").text == "here"


def test_a_command_without_a_deadline_may_take_its_time(uml: Uml) -> None:
    assert uml.run("sleep 1.5; echo done", timeout=None).text == "done"


def test_a_command_that_a_reboot_ended_says_so() -> None:
    with Uml() as guest, pytest.raises(GuestError, match="the guest rebooted while running 'busybox reboot -f'"):
        guest.run("busybox reboot -f")


def test_a_process_in_the_background_neither_delays_nor_disturbs(uml: Uml) -> None:
    started = time.monotonic()
    uml.run("(while sleep 0.01; do echo noise; done) &")
    assert [uml.run(f"echo {number}").text for number in range(20)] == [str(number) for number in range(20)]
    assert time.monotonic() - started < 20


def test_threads_take_turns(uml: Uml) -> None:
    with ThreadPoolExecutor() as threads:
        answers = threads.map(lambda number: uml.run(f"echo {number}").text, range(8))
    assert list(answers) == [str(number) for number in range(8)]


def test_the_log_has_the_kernel_messages(any_guest: Guest) -> None:
    any_guest.run("echo a mark >/dev/kmsg")
    deadline = time.monotonic() + 30
    while "a mark" not in any_guest.log and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "Linux version" in any_guest.log
    assert "a mark" in any_guest.log


def test_what_is_printed_on_the_console_cannot_be_taken_for_an_answer(any_guest: Guest) -> None:
    any_guest.run("echo 0 0 0 >/dev/console")
    assert any_guest.run("echo here").text == "here"


def test_the_hosts_files_are_there_and_safe(uml: Uml, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("of the host")
    assert uml.run(f"cat {file}").text == "of the host"
    assert b"Read-only" in uml.run(f"echo of the guest > {file}", check=False).stderr
    assert file.read_text() == "of the host"


def test_on_demand_the_hosts_files_can_be_written(tmp_path: Path) -> None:
    with Uml(extra_args=["rw"]) as writer:
        writer.run(f"echo of the guest > {tmp_path}/file")
    assert (tmp_path / "file").read_text() == "of the guest\n"


def test_the_guest_reboots(any_guest: Guest) -> None:
    identity = "cat /proc/sys/kernel/random/boot_id"
    before, pid = any_guest.run(identity).text, any_guest.pid
    any_guest.reboot()
    assert any_guest.run(identity).text != before
    assert any_guest.pid == pid


def test_two_guests_at_once() -> None:
    with Uml() as one, Uml() as other:
        one.run("echo one > /run/name")
        other.run("echo other > /run/name")
        assert (one.run("cat /run/name").text, other.run("cat /run/name").text) == ("one", "other")


def test_stop_powers_off() -> None:
    with Uml() as stopped:
        pid = stopped.pid
        assert stopped.stop()
        assert stopped.stop(), "a second time is no error"
    assert "Power down" in stopped.log
    assert processes_of(pid) == []


def test_stop_kills_a_guest_that_hangs(scratch: Path) -> None:
    with Uml() as hanging:
        pid = hanging.pid
        with ThreadPoolExecutor() as threads:
            command = threads.submit(hanging.run, f"{BEGIN}; sleep 1000", timeout=1000)
            wait_until(lambda: "it has begun" in hanging.log, "the command begins")
            assert not hanging.stop(timeout=1)
            with pytest.raises(GuestError, match=r"the guest ended while running .*sleep 1000'"):
                command.result(timeout=60)
    assert processes_of(pid) == []
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("kind", [Uml, Qemu])
def test_kill_leaves_nothing(kind: type[Uml | Qemu], scratch: Path) -> None:
    killed = kind().start()
    pid = killed.pid
    assert pid in processes_of(pid)
    killed.kill()
    assert processes_of(pid) == []
    assert list(scratch.iterdir()) == []
    assert killed.pid is None
    assert "Linux version" in killed.log
    with pytest.raises(GuestError, match="not running"):
        killed.run("true")
    with killed:
        assert killed.run("echo again").text == "again"


def test_a_guest_that_dies_is_an_error_that_shows_its_last_words() -> None:
    story = r"the guest ended while running 'echo(.|\n)*--- kernel\n(.|\n)*last words"
    with Uml() as dying, pytest.raises(GuestError, match=story):
        dying.run("echo last words >/dev/kmsg; busybox poweroff -f; sleep 10")


def test_a_panic_is_an_error_that_shows_it() -> None:
    with Qemu() as panicking, pytest.raises(GuestError, match=r"the guest ended while running(.|\n)*Kernel panic"):
        # The kernel's last words are lost if another task holds its console at that moment: let it finish first.
        panicking.run("echo 1 >/proc/sys/kernel/sysrq; sleep 1; echo c >/proc/sysrq-trigger", timeout=20)


def test_a_panic_with_a_long_trace_is_shown_from_its_first_line() -> None:
    story = r"--- kernel\n.*Kernel panic - for a test(.|\n)*\n100\n"
    with Uml() as panicking, pytest.raises(GuestError, match=story):
        panicking.run(
            "printf 'Kernel panic - for a test\n%s\n' \"$(seq 100)\" >/dev/kmsg; busybox poweroff -f; sleep 10"
        )


def test_a_guest_ends_with_the_program_that_started_it(scratch: Path) -> None:
    program = "from vhost_user.guest import Uml; uml = Uml().start(); print(uml.pid, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        assert pid in processes_of(pid)
        parent.communicate(b"\n")
    assert processes_of(pid) == []
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("then", ["input()", "uml.run('while :; do :; done', timeout=None)"], ids=["idle", "busy"])
def test_a_guest_does_not_outlive_a_program_that_is_killed(scratch: Path, then: str) -> None:
    program = f"from vhost_user.guest import Uml; uml = Uml().start(); print(uml.pid, flush=True); {then}"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        # A guest hears of the end of the program itself, unless it is busy: which it is soon.
        time.sleep(0.2)
        parent.kill()
    deadline = time.monotonic() + 20
    while processes_of(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(pid) == []
    assert [left.name[:17] for left in scratch.iterdir()] == ["vhost-user-guest-"], "an empty folder is all that stays"


def test_ctrl_c_ends_the_guest() -> None:
    with Uml() as interrupted:
        pid = interrupted.pid

        def interrupt() -> None:
            wait_until(lambda: "it has begun" in interrupted.log, "the command begins")
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            interrupted.run(f"{BEGIN}; sleep 1000", timeout=1000)
        with pytest.raises(GuestError, match=r"the guest did not come back from running .*sleep 1000': stop it"):
            interrupted.run("true")
    assert processes_of(pid) == []


def test_a_kernel_that_does_not_boot(scratch: Path) -> None:
    with pytest.raises(GuestError, match=r"the guest ended while booting\n--- kernel\n(.|\n)*Kernel panic"):
        Uml(extra_args=["rootfstype=ext4"]).start()
    assert list(scratch.iterdir()) == []


def test_a_kernel_that_does_not_boot_in_time(scratch: Path) -> None:
    with pytest.raises(GuestError, match="the guest hangs while booting"):
        Uml(boot_timeout=0.01).start()
    assert list(scratch.iterdir()) == []


def test_a_missing_kernel_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("VHOST_USER_UML", raising=False)
    with pytest.raises(GuestNotFound, match="make guest"):
        Uml().start()
    with pytest.raises(GuestNotFound, match="make guest"):
        Qemu().start()


def test_a_kernel_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(GuestNotFound, match="/linux: no such program"):
        Uml(kernel=tmp_path / "linux").start()


def test_a_root_without_an_init(tmp_path: Path) -> None:
    with pytest.raises(GuestNotFound, match="apt-get install busybox-static"):
        Uml(root=tmp_path).start()


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    for kind in (Uml, Qemu):
        with pytest.raises(GuestError, match=r"rng\.sock: no device listens there; start it before the guest"):
            kind([(tmp_path / "rng.sock", 4)]).start()


#: A command that a test sees the beginning of, in the log.
BEGIN = "echo it has begun >/dev/kmsg"


def processes_of(leader: int | None) -> list[int]:
    """The processes in the guest's process group, those that are only waited for aside."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            state, _parent, group = Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if group == str(leader) and state != "Z":
            found.append(int(process))
    return found
