"""What an installed wheel has to do, with nothing else installed: run it with the interpreter it was installed for.

The standard library and `raw`, which shares no code with the package, are all that this needs.
"""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import unittest
from pathlib import Path

import vhost_user as vu

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))

import raw  # noqa: E402

COMMAND = Path(sysconfig.get_path("scripts")) / "vhost-user"
PACKAGE = Path(vu.__file__).parent
DISTRIBUTION = importlib.metadata.distribution("vhost-user")


class Rng(vu.Device, device_id=vu.DeviceId.RNG):
    requestq = vu.Queue(size=64)

    @requestq.handler
    def fill(self, request: vu.Request) -> None:
        request.write(b"x" * request.writable)


class Wheel(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.socket = Path(folder.name) / "rng.sock"

    def exchange(self) -> bytes:
        """What 16 bytes of room come back with."""
        with raw.Memory() as memory, raw.FrontEnd(self.socket) as front_end:
            ring = raw.Ring(memory)
            front_end.negotiate()
            front_end.share(memory)
            front_end.start(ring)
            return front_end.exchange(ring, room=16)

    def test_it_is_the_installed_package_that_is_tested(self) -> None:
        assert not PACKAGE.is_relative_to(TESTS.parent / "python")

    def test_it_requires_no_other_package(self) -> None:
        assert [line for line in DISTRIBUTION.requires or [] if "extra ==" not in line] == []

    def test_type_checkers_find_the_types(self) -> None:
        for name in ("py.typed", "_core.pyi"):
            assert (PACKAGE / name).is_file(), name

    def test_both_licences_are_in_it(self) -> None:
        assert DISTRIBUTION.metadata["License-Expression"] == "Apache-2.0 OR MIT"
        files = {file.name for file in DISTRIBUTION.files or []}
        assert {"LICENSE-APACHE", "LICENSE-MIT"} <= files

    def test_a_device_answers_a_request_over_its_socket(self) -> None:
        with Rng().start(self.socket):
            assert self.exchange() == b"x" * 16

    def test_the_command_explains_itself(self) -> None:
        for command in ([COMMAND], [sys.executable, "-m", "vhost_user"]):
            told = subprocess.run([*command, "--help"], check=True, capture_output=True, text=True)
            assert "--socket-path" in subprocess.check_output([*command, "rng", "--help"], text=True)
            assert "usage: vhost-user" in told.stdout

    def test_the_command_serves_a_device_until_it_is_told_to_end(self) -> None:
        command = subprocess.Popen([COMMAND, "rng", "--socket-path", self.socket], stdout=subprocess.DEVNULL)
        try:
            raw.wait_until(self.socket.is_socket, "a socket")
            assert self.exchange() != bytes(16)
            command.send_signal(signal.SIGTERM)
            assert command.wait(raw.DEADLINE) == 0
        finally:
            command.kill()
            command.wait()
        assert not os.path.lexists(self.socket)

    @unittest.skipUnless(sysconfig.get_config_var("Py_GIL_DISABLED"), "this Python has a global interpreter lock")
    def test_a_free_threaded_interpreter_stays_so(self) -> None:
        told = subprocess.check_output([sys.executable, "-c", "import sys, vhost_user; print(sys._is_gil_enabled())"])
        assert told.strip() == b"False"


if __name__ == "__main__":
    unittest.main(verbosity=2)
