"""Traces as files for Wireshark, and as tshark reads them."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import shutil
import struct
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import raw
import vhost_user as vu
from specimens import Serve
from vhost_user import _core
from vhost_user.devices import Blk, Rng
from vhost_user.guest import Uml
from vhost_user.trace import dissector, pcapng
from vhost_user.trace.model import Descriptor, Record
from vhost_user.trace.proxy import Proxy, running


def tshark(folder: Path, file: Path, *arguments: str) -> str:
    """What tshark prints about a file, with our plugin."""
    assert shutil.which("tshark"), "this test needs tshark: apt-get install tshark"
    plugin = folder / "vhost_user.lua"
    plugin.write_text(dissector.text())
    command = ["tshark", "-X", f"lua_script:{plugin}", "-r", str(file), *arguments]
    # Its settings are its own, and those of nobody who runs this.
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env={"HOME": str(folder), "PATH": PATH})
    assert "Lua" not in ended.stderr, ended.stderr
    return ended.stdout


PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def fields(folder: Path, file: Path, *names: str, only: str = "") -> list[list[str]]:
    """Values of fields, of every packet that a filter lets through."""
    arguments = ["-T", "fields", *(argument for name in names for argument in ("-e", f"vhost_user.{name}"))]
    printed = tshark(folder, file, *arguments, "-Y", only or "vhost_user")
    return [line.split("\t") for line in printed.splitlines()]


def write(file: Path, records: Iterable[Record]) -> None:
    with file.open("wb") as out:
        writer = pcapng.Writer(out)
        for record in records:
            writer(record)


@pytest.fixture
def recorded(serve: Serve, tmp_path: Path) -> tuple[Path, list[Record]]:
    """A guest that reads random numbers, in a file and as records."""
    records: list[Record] = []
    with running(Proxy(tmp_path / "traced", serve(Rng()), records.append)) as proxy:
        with Uml([(tmp_path / "traced", vu.DeviceId.RNG)]) as guest:
            guest.run("head -c 64 /dev/hwrng")
        raw.wait_until(lambda: not proxy.front_ends, "the end")
    write(tmp_path / "guest.pcapng", records)
    return tmp_path / "guest.pcapng", records


def test_tshark_shows_what_the_guest_said(recorded: tuple[Path, list[Record]], tmp_path: Path) -> None:
    file, records = recorded
    messages = [record for record in records if record.event == "message"]
    assert fields(tmp_path, file, "name", "answer", "direction", only="vhost_user.event == 0") == [
        [record.decoded.name, str(int(record.is_answer)), str(int(record.sender == "back-end"))] for record in messages
    ]
    assert tshark(tmp_path, file, "-Y", "_ws.expert") == ""

    ((names,),) = fields(tmp_path, file, "feature", only='vhost_user.name == "SET_FEATURES" && vhost_user.answer == 0')
    (sent,) = (record for record in messages if record.decoded.name == "SET_FEATURES" and not record.is_answer)
    assert names.split(",") == sent.decoded.fields["names"]

    table = "memory_table.regions."
    (shown,) = fields(
        tmp_path,
        file,
        table + "guest_address",
        table + "size",
        "descriptor.kind",
        "descriptor.size",
        only="vhost_user.memory_table.count",
    )
    (record,) = (record for record in messages if record.decoded.name == "SET_MEM_TABLE" and not record.is_answer)
    (region,) = record.decoded.fields["regions"]
    assert shown == [str(region["guest_address"]), str(region["size"]), "2", str(128 << 20)]

    ((index, number),) = fields(
        tmp_path,
        file,
        "vring_state.index",
        "vring_state.num",
        only='vhost_user.name == "SET_VRING_NUM" && vhost_user.answer == 0',
    )[:1]
    assert (index, number) == ("0", "256")


def test_tshark_names_the_feature_bits_of_the_device_type(serve: Serve, tmp_path: Path) -> None:
    records: list[Record] = []
    with running(Proxy(tmp_path / "traced", serve(Blk(1 << 20, num_queues=2)), records.append)) as proxy:
        with vu.Frontend.connect(tmp_path / "traced") as frontend:
            frontend.negotiate()
            frontend.read_config(60)
            frontend.exchange("GET_FEATURES")
        raw.wait_until(lambda: not proxy.front_ends, "the end")
    write(tmp_path / "disk.pcapng", records)
    file = tmp_path / "disk.pcapng"
    only = 'vhost_user.name == "GET_FEATURES" && vhost_user.answer == 1'
    first, last = fields(tmp_path, file, "feature", "device", only=only)
    # What it is shows later, to those who look twice.
    assert "bit 9" in first[0].split(",")
    assert {"FLUSH", "MQ", "VERSION_1"} < set(last[0].split(","))
    assert last[1] == "blk"
    twice = tshark(tmp_path, file, "-2", "-T", "fields", "-e", "vhost_user.feature", "-Y", only).splitlines()
    assert twice == [last[0], last[0]]
    assert [record.device.name for record in pcapng.read(io.BytesIO(file.read_bytes()))][-1] == "blk"


def test_tshark_finds_the_request_of_every_answer(recorded: tuple[Path, list[Record]], tmp_path: Path) -> None:
    file, records = recorded
    packets = {str(number): record for number, record in enumerate(records, 1)}
    answers = fields(tmp_path, file, "request_in", "latency", only="vhost_user.answer == 1")
    assert len(answers) == sum(record.is_answer for record in records)
    found = [record for record in records if record.is_answer]
    for (request_in, latency), answer in zip(answers, found, strict=True):
        assert packets[request_in].header[0] == answer.header[0]
        assert answer.latency is not None
        assert float(latency) == pytest.approx(answer.latency / 1e9, abs=1e-5)


def packets(folder: Path, file: Path) -> list[dict[str, list[str]]]:
    """Every packet as tshark sees it: the values of each field."""
    lines = [json.loads(line) for line in tshark(folder, file, "-T", "ek").splitlines()]
    layers = [line["layers"]["vhost_user"] for line in lines if "layers" in line]
    return [
        {
            name.removeprefix("vhost_user_vhost_user_"): [
                each.replace(":", "")
                for each in (value if isinstance(value, list) else [value])
                if isinstance(each, str)
            ]
            for name, value in layer.items()
        }
        for layer in layers
    ]


def flat(prefix: str, fields: dict[str, Any]) -> dict[str, list[str]]:
    """Values as `packets` has them."""
    found: dict[str, list[str]] = {}
    for name, value in fields.items():
        if name == "names":
            found["feature"] = value
            continue
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                for path, values in flat(f"{prefix}_{name}", each).items():
                    found.setdefault(path, []).extend(values)
            else:
                shown = each.hex() if isinstance(each, bytes) else str(each)
                found.setdefault("rest" if name == "rest" else f"{prefix}_{name}", []).append(shown)
    return found


def nonsense(name: str, layout: list[Any], noise: random.Random) -> bytes:
    """A payload of the right size, with anything in it."""
    if name == "MemoryTable":
        return struct.pack("=II", 2, 0) + noise.randbytes(2 * 32)
    # Those that end as they like have 8 bytes more.
    return noise.randbytes(sum(field[2] or 8 for field in layout))


def test_the_plugin_reads_every_field_of_every_message(tmp_path: Path) -> None:
    noise = random.Random(1)
    layouts = {name: fields for name, size, fields in _core.payloads() if size is None}
    records, expected = [], []
    for info in _core.messages():
        main = info.channel == "main"
        for is_answer in (False, True):
            payload = info.answer if is_answer else info.payload
            body = nonsense(payload, layouts[payload], noise)
            data = raw.HEADER.pack(info.id, raw.REPLY if is_answer else raw.REQUEST, len(body)) + body
            record = Record(
                1,
                1,
                "message",
                "main" if main else "back-end",
                "front-end" if main != is_answer else "back-end",
                data,
            )
            abbreviation = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", payload).lower()
            records.append(record)
            expected.append({"name": [info.name]} | flat(abbreviation, record.decoded.fields))
    write(tmp_path / "all.pcapng", records)
    found = packets(tmp_path, tmp_path / "all.pcapng")
    assert len(found) == len(records) == 2 * len(_core.messages())
    for packet, fields_of_it in zip(found, expected, strict=True):
        assert {name: packet.get(name) for name in fields_of_it} == fields_of_it


def test_nonsense_makes_no_error_in_the_plugin(tmp_path: Path) -> None:
    noise = random.Random(2)
    records = [
        Record(
            number,
            1,
            noise.choice(pcapng.EVENTS),
            noise.choice(pcapng.CHANNELS),
            noise.choice(pcapng.PARTIES),
            struct.pack("=I", noise.randrange(50)) + noise.randbytes(noise.choice([0, 3, 8, 12, 16, 48, 300])),
            (Descriptor("memfd", 1),) * noise.randrange(3),
        )
        for number in range(2000)
    ]
    write(tmp_path / "nonsense.pcapng", records)
    shown = tshark(tmp_path, tmp_path / "nonsense.pcapng", "-V")
    assert shown.count("\nvhost-user\n") == len(records)
    assert "Lua Error" not in shown


descriptors = st.builds(
    Descriptor,
    st.sampled_from(["memfd", "file"]),
    st.integers(0, 2**63),
    st.just(""),
    st.integers(0, 2**32 - 1),
) | st.builds(Descriptor, st.sampled_from(["eventfd", "socket", "other"]))


@given(
    st.lists(
        st.builds(
            Record,
            st.integers(0, 2**63),
            st.integers(1, 2**32 - 1),
            st.sampled_from(["message", "bytes", "opened", "closed"]),
            st.sampled_from(pcapng.CHANNELS),
            st.sampled_from(pcapng.PARTIES),
            st.binary(max_size=300),
            st.lists(descriptors, max_size=3).map(tuple),
        )
    )
)
def test_what_is_written_is_read(records: list[Record]) -> None:
    file = io.BytesIO()
    writer = pcapng.Writer(file)
    for record in records:
        writer(record)
    file.seek(0)
    assert list(pcapng.read(file)) == records


@given(st.binary(max_size=200), st.booleans())
def test_a_file_that_is_none_is_at_worst_a_value_error(data: bytes, begins_well: bool) -> None:
    file = io.BytesIO()
    if begins_well:
        pcapng.Writer(file)
    file.write(data)
    file.seek(0)
    with contextlib.suppress(ValueError):
        assert all(isinstance(record, Record) for record in pcapng.read(file))
