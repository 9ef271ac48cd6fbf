"""``vhost-user info``: what back-ends tell of themselves, ours and QEMU's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vhost_user as vu
from specimens import Serve
from storage_daemon import storage_daemon
from vhost_user.config import Field
from vhost_user.devices import Blk, Console, Rng
from vhost_user.features import TYPES, by_name
from vhost_user.info import Info, inspect


@pytest.fixture
def qemu_disk(tmp_path: Path) -> Iterator[Path]:
    with storage_daemon(tmp_path, queues=3) as path:
        yield path


def seen(path: Path, device: str | None = None) -> Info:
    with vu.Frontend.connect(path) as frontend:
        return inspect(frontend, by_name(device) if device else None)


@pytest.mark.parametrize("device", [Blk, Console])
def test_the_table_has_the_fields_where_our_devices_have_them(device: type[vu.Device]) -> None:
    layout = TYPES[device.device_id].layout
    assert layout is not None
    table = {field.name: (field.offset, field.size) for field in layout.fields}
    declared = [value for value in vars(device).values() if isinstance(value, Field)]
    assert [field for field in declared if field.name in table]
    for field in declared:
        assert table.get(field.name, (field.offset, field.size)) == (field.offset, field.size)


def test_a_disk_is_recognised_and_decoded(serve: Serve) -> None:
    info = seen(serve(Blk(1 << 20, num_queues=2)))
    assert info.device is TYPES[vu.DeviceId.BLOCK]
    assert {"FLUSH", "MQ", "VERSION_1", "PROTOCOL_FEATURES"} <= {*info.device.feature_names(info.features)}
    assert (info.fields["capacity"], info.fields["num_queues"], info.queues) == (2048, 2, 2)
    assert info.memory_slots == 509


def test_a_console_is_recognised(serve: Serve) -> None:
    info = seen(serve(Console(cols=132, rows=43)))
    assert info.device.name == "console"
    assert (info.fields["cols"], info.fields["rows"]) == (132, 43)


def test_what_is_not_plain_is_not_guessed(serve: Serve) -> None:
    path = serve(Rng())
    assert seen(path).device.name == "unknown"
    assert seen(path, "rng").device is TYPES[vu.DeviceId.RNG]
    assert seen(path, "rng").config == b""


def test_the_configuration_of_qemu_is_read_to_its_end_and_no_further(qemu_disk: Path) -> None:
    """QEMU refuses to tell more than it has: 60 or 96 bytes, by its version, which nobody says beforehand."""
    info = seen(qemu_disk)
    assert info.device.name == "blk"
    assert (info.fields["capacity"], info.fields["num_queues"]) == (2048, 3)
    assert len(seen(qemu_disk, "sound").config) == 16
    size = len(seen(qemu_disk, "200").config)
    assert size in {60, 96}
    with vu.Frontend.connect(qemu_disk) as frontend:
        frontend.negotiate()
        assert len(frontend.read_config(size)) == size
        with pytest.raises(vu.ProtocolError):
            frontend.read_config(size + 1)


def test_a_word_of_features_has_the_names_of_its_type() -> None:
    assert by_name("net").feature_names(1 << 15 | 1 << 29 | 1 << 49) == ["MRG_RXBUF", "EVENT_IDX", "bit 49"]
    assert by_name("77").feature_names(1) == ["bit 0"]
    with pytest.raises(KeyError):
        by_name("toaster")


def test_the_command_prints_for_people_and_for_programs(qemu_disk: Path) -> None:
    command = [sys.executable, "-m", "vhost_user", "info", str(qemu_disk)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    told = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True, timeout=20).stdout)
    assert "device             blk (2): its features and configuration are those of a disk" in shown
    assert re.search(r"^  capacity +2048$", shown, re.MULTILINE)
    assert told["device"]["name"] == "blk"
    assert told["config"]["fields"]["num_queues"] == told["queues"] == 3
    assert "REPLY_ACK" in told["protocol_features"]["names"]


def test_nobody_there_is_told_in_a_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vhost_user", "info", str(tmp_path / "none.sock")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    assert (ended.returncode, ended.stderr) == (
        1,
        f"vhost-user info: {tmp_path / 'none.sock'}: No such file or directory\n",
    )
