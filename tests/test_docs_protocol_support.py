"""The page on what of the protocol is supported says what is there."""

from __future__ import annotations

import ast
import contextlib
import fnmatch
import importlib.util
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import vhost_user as vu
from devices.test_dpdk import HEADER, HELLO, PATIENCE, THEIRS, Net, ping, run_testpmd
from devices.test_peers import BACK_ENDS, use_disk
from devices.test_qemu_front_ends import FRONT_ENDS, drive
from devices.vmms import CloudHypervisor, Crosvm, Firecracker, Monitor, Orders, monitors
from raw import wait_until
from specimens import Serve
from storage_daemon import storage_daemon
from vhost_user._core import messages
from vhost_user.devices import Blk
from vhost_user.guest import Qemu, Uml
from vhost_user.trace.model import Record
from vhost_user.trace.proxy import Proxy, running

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """What writes the page."""
    spec = importlib.util.spec_from_file_location("protocol_support", ROOT / "docs" / "protocol_support.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks itself up there.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "protocol_support", module)
        spec.loader.exec_module(module)
    return module


def test_the_page_is_what_its_generator_writes(generator: ModuleType) -> None:
    assert generator.PAGE.read_text() == generator.page(), "run python docs/protocol_support.py"


def test_every_message_has_its_row_and_nothing_else_does(generator: ModuleType) -> None:
    assert set(generator.SUPPORT) == {row.name for row in messages()}


def test_what_a_device_and_a_driver_offer_is_on_the_page(serve: Serve, generator: ModuleType) -> None:
    device = Blk(1 << 20)
    device.packed_rings = device.in_order = device.iommu = True
    with vu.Frontend.connect(serve(device)) as frontend:
        offered = frontend.negotiate().offered_features
    assert {feature.name for feature in vu.TransportFeature if feature & offered} == set(generator.TRANSPORT)


def test_every_test_that_the_page_names_is_there(generator: ModuleType) -> None:
    for test in generator.named_tests():
        file, name = test.split("::")
        text = (ROOT / "tests" / file).read_text()
        if file.endswith(".rs"):
            names = re.findall(r"^#\[test\]\nfn (\w+)", text, re.MULTILINE)
        else:
            names = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
        assert fnmatch.filter(names, name), test


def test_every_peer_is_told_where_it_was_seen_and_with_what(generator: ModuleType) -> None:
    features = [*vu.ProtocolFeature, *vu.TransportFeature]
    known = {row.name for row in messages()} | {feature.name for feature in features}
    assert list(generator.PEERS) == list(generator.SEEN)
    for names in generator.SEEN.values():
        assert names
        assert names <= known


@pytest.mark.parametrize("kind", [Uml, Qemu])
def test_a_guest_says_what_the_page_says_that_it_says(
    serve: Serve, tmp_path: Path, generator: ModuleType, kind: type[Uml | Qemu]
) -> None:
    path = serve(Blk(1 << 20))
    with traced(path, tmp_path / "traced") as said:
        with kind([(tmp_path / "traced", vu.DeviceId.BLOCK)]) as guest:
            guest.run("dd if=/dev/vda of=/dev/null bs=4096 count=4 iflag=direct")
        wait_until(lambda: "closed" in said, "the end of the connection")
    peer = {Uml: "UML", Qemu: "QEMU"}[kind]
    assert generator.SEEN[peer] - said == set()


@pytest.mark.parametrize(
    ("peer", "model"),
    [
        ("QEMU (input)", "vhost-user-input-pci"),
        ("QEMU (network)", "virtio-net-pci"),
        ("QEMU (crypto)", "virtio-crypto-pci"),
        ("QEMU (GPU)", "vhost-user-gpu-pci"),
        ("QEMU (windows)", "vhost-user-test-device-pci (windows)"),
    ],
)
def test_a_front_end_of_qemu_says_what_the_page_says_that_it_says(
    serve: Serve, tmp_path: Path, generator: ModuleType, peer: str, model: str
) -> None:
    device = FRONT_ENDS[model].device()
    with traced(serve(device), tmp_path / "traced") as said:
        drive(model, device, tmp_path / "traced", tmp_path)
        wait_until(lambda: "closed" in said, "the end of the connection", PATIENCE)
    assert generator.SEEN[peer] - said == set()


@monitors(CloudHypervisor, Crosvm, Firecracker)
def test_a_monitor_says_what_the_page_says_that_it_says(
    serve: Serve, tmp_path: Path, generator: ModuleType, bare: Path, kind: type[Monitor]
) -> None:
    disk = Blk(16 << 20)
    Orders(Path(f"/proc/self/fd/{disk.fileno()}")).give(rounds=1, lives=2 if kind.resets else 1)
    with traced(serve(disk), tmp_path / "traced") as said:
        with kind(tmp_path / "monitor", bare, tmp_path / "traced", None) as monitor:
            monitor.wait_for("all is well")
        wait_until(lambda: "closed" in said, "the end of the connection", PATIENCE)
    assert generator.SEEN[kind.name] - said == set()


def test_every_front_end_of_qemu_has_its_row_and_nothing_else_does(generator: ModuleType) -> None:
    assert set(generator.FRONT_ENDS) == set(FRONT_ENDS)


def test_our_front_end_says_it_to_a_disk_that_nobody_here_wrote(tmp_path: Path, generator: ModuleType) -> None:
    read = struct.pack("<IIQ", 0, 0, 0)
    first, second = vu.Memory(1 << 20), vu.Memory(regions=[(1 << 21, 1 << 20)])
    with (
        storage_daemon(tmp_path, queues=2) as path,
        traced(path, tmp_path / "traced") as said,
        vu.Frontend.connect(tmp_path / "traced") as frontend,
    ):
        frontend.negotiate().share(first, second)
        frontend.write_config(b"\0", 32)
        assert frontend.read_config(33)[32] == 0
        queue = frontend.queue(0)
        assert queue.request(read, 513) == bytes(513)
        log = vu.DirtyLog(frontend.memory)
        frontend.set_log(log)
        frontend.log_all()
        assert queue.request(read, 513) == bytes(513)
        assert log.take()
        queue.stop()
        frontend.share(first)
        frontend.exchange("GET_FEATURES")
    assert generator.SEEN["qemu-storage-daemon"] - said == set()


def test_libblkio_says_what_the_page_says_that_it_says(serve: Serve, tmp_path: Path, generator: ModuleType) -> None:
    with traced(serve(Blk(16 << 20)), tmp_path / "traced") as said:
        use_disk(tmp_path / "traced")
        wait_until(lambda: "closed" in said, "the end of the connection", PATIENCE)
    assert generator.SEEN["libblkio"] - said == set()


@pytest.mark.parametrize("peer", BACK_ENDS)
def test_our_front_end_says_it_to_devices_that_nobody_here_wrote(
    tmp_path: Path, generator: ModuleType, peer: str
) -> None:
    start, use = BACK_ENDS[peer]
    with start(tmp_path) as path, traced(path, tmp_path / "traced") as said:
        use(tmp_path / "traced", tmp_path)
    assert generator.SEEN[peer] - said == set()


def test_a_driver_of_dpdk_says_what_the_page_says_that_it_says(tmp_path: Path, generator: ModuleType) -> None:
    device = Net()
    with device.start(tmp_path / "net"), traced(tmp_path / "net", tmp_path / "traced") as said:
        with run_testpmd(f"net_virtio_user0,path={tmp_path / 'traced'}"):
            device.greet()
        wait_until(lambda: "closed" in said, "the end of the connection", PATIENCE)
    assert generator.SEEN["DPDK's driver"] - said == set()


def test_our_front_end_says_it_to_a_device_of_dpdk(tmp_path: Path, generator: ModuleType) -> None:
    path = tmp_path / "net"
    with run_testpmd(f"net_vhost0,iface={path},queues=1"):
        wait_until(path.is_socket, "the socket of testpmd", PATIENCE)
        with (
            traced(path, tmp_path / "traced") as said,
            vu.Frontend.connect(tmp_path / "traced", timeout=PATIENCE) as frontend,
        ):
            frontend.negotiate(vu.TransportFeature.VERSION_1)
            receive, send = frontend.start_queues(2)
            frontend.set_mtu(1500)
            frontend.send_rarp(THEIRS)
            log = vu.DirtyLog(frontend.memory)
            frontend.set_log(log)
            frontend.log_all()
            answer = receive.submit(writable=2048)
            # It drops what comes before it is ready.
            deadline = time.monotonic() + PATIENCE
            while not answer.done and time.monotonic() < deadline:
                send.request(HEADER + ping(HELLO))
                with contextlib.suppress(vu.PeerTimeout):
                    answer.wait(0.05)
            assert log.take()
            receive.stop()
            send.stop()
    assert generator.SEEN["DPDK's device"] - said == set()


@contextlib.contextmanager
def traced(back_end: Path, path: Path) -> Iterator[set[str]]:
    """The names of what both sides say to each other through `path`: messages that are good, and features."""
    said: set[str] = set()

    def hear(record: Record) -> None:
        if record.event == "message" and not record.problem:
            said.add(record.decoded.name)
            if record.decoded.name in ("SET_FEATURES", "SET_PROTOCOL_FEATURES") and not record.is_answer:
                said.update(record.fields["names"])
        elif (record.event, record.channel) == ("closed", "main"):
            said.add("closed")

    with running(Proxy(path, back_end, hear)):
        yield said
