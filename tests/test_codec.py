"""Messages by names and values, whatever they are."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import raw
from raw import Id
from vhost_user._core import decode, messages, payloads

NEED_REPLY = raw.NEED_REPLY


def test_the_tables_are_those_of_the_core() -> None:
    source = (Path(__file__).parents[1] / "src" / "protocol" / "requests.rs").read_text()
    rows = re.findall(r"^    (\d+) +=> \w+\(.*?\), \"(\w+)\"", source, re.MULTILINE)
    assert [(info.id, info.name) for info in messages()] == [(int(number), name) for number, name in rows]
    assert {info.channel for info in messages()} == {"main", "back-end"}
    assert all(info.name.startswith("BACKEND_") == (info.channel == "back-end") for info in messages())


def test_a_row_tells_everything_about_a_message() -> None:
    rows = {info.name: info for info in messages()}
    table = rows["SET_MEM_TABLE"]
    assert (table.payload, table.descriptors, table.gate) == ("MemoryTable", "as described", "always")
    assert (table.answer, table.answered, table.rings, table.bits) == ("U64", "asked", "all", None)
    log = rows["SET_LOG_BASE"]
    assert (log.answer, log.answered) == ("Log", "LOG_SHMFD")
    assert (9, "CONFIG") in (rows["GET_PROTOCOL_FEATURES"].bits or [])
    assert (32, "VERSION_1") in (rows["SET_FEATURES"].bits or [])
    assert {info.payload for info in messages()} | {info.answer for info in messages()} <= {
        name for name, _, _ in payloads()
    }


def test_words_of_features_have_names_and_acknowledgements_are_told_from_them() -> None:
    word = raw.u64(1 | raw.VERSION_1)
    asked = decode("main", "front-end", Id.SET_FEATURES, NEED_REPLY, word, 0)
    assert asked.fields == {"value": 1 | raw.VERSION_1, "names": ["bit 0", "VERSION_1"]}
    assert (asked.name, asked.answer, asked.problem) == ("SET_FEATURES", False, None)
    answered = decode("main", "back-end", Id.SET_FEATURES, raw.REPLY, raw.u64(1), 0)
    assert (answered.fields, answered.acknowledgement, answered.problem) == ({"value": 1}, True, None)
    offered = decode("main", "back-end", Id.GET_FEATURES, raw.REPLY, word, 0)
    assert offered.fields == asked.fields
    assert not offered.acknowledgement


def test_the_same_id_is_another_message_on_the_other_channel() -> None:
    assert decode("main", "front-end", 2, 1, b"", 0).name == "SET_FEATURES"
    changed = decode("back-end", "back-end", 2, 1, b"", 0)
    assert (changed.name, changed.answer, changed.problem) == ("BACKEND_CONFIG_CHANGE_MSG", False, None)


@pytest.mark.parametrize(
    ("request_id", "flags", "payload", "descriptors", "problem"),
    [
        (77, 1, b"hi", 0, "unknown request 77 of the front-end; the highest known is 45"),
        (Id.SET_VRING_NUM, 1, raw.vring_state(0, 2)[:7], 0, "expected 8 bytes of payload, got 7"),
        (Id.SET_VRING_NUM, 1, raw.vring_state(0, 2), 1, "expected 0 descriptors, got 1"),
        (Id.SET_VRING_KICK, 1, raw.vring_descriptor(0), 0, "expected 1 descriptors, got 0"),
        (Id.SET_OWNER, 5, b"", 0, "a request has 0x1, or 0x9"),
        (Id.GET_CONFIG, 1, struct.pack("=III", 0, 9, 0), 0, "announces 9 bytes of configuration, carries 0"),
    ],
)
def test_what_is_wrong_is_told(request_id: int, flags: int, payload: bytes, descriptors: int, problem: str) -> None:
    found = decode("main", "front-end", request_id, flags, payload, descriptors).problem
    assert found is not None
    assert problem in found


def test_fields_that_are_there_are_shown_and_so_is_the_rest() -> None:
    assert decode("main", "front-end", Id.SET_VRING_NUM, 1, raw.vring_state(3, 2)[:6], 0).fields == {"index": 3}
    longer = decode("main", "front-end", Id.SET_VRING_NUM, 1, raw.vring_state(3, 2) + b"more", 0)
    assert longer.fields == {"index": 3, "num": 2, "rest": b"more"}
    refused = decode("main", "back-end", Id.GET_CONFIG, raw.REPLY, b"", 0)
    assert refused.problem == "an answer without a payload: the request was refused"


@given(
    st.sampled_from(["main", "back-end"]),
    st.sampled_from(["front-end", "back-end"]),
    st.integers(0, 60) | st.integers(0, 2**32 - 1),
    st.sampled_from([1, 5, 9]) | st.integers(0, 2**32 - 1),
    st.binary(max_size=2200),
    st.integers(0, 300),
)
def test_no_bytes_make_it_fail(
    channel: str, sender: str, request: int, flags: int, payload: bytes, descriptors: int
) -> None:
    found = decode(channel, sender, request, flags, payload, descriptors)
    assert found.answer == ((sender == "back-end") == (channel == "main"))
    if flags not in (1, 5, 9, 13):
        assert found.problem


def test_a_channel_or_a_sender_that_does_not_exist_is_a_value_error() -> None:
    with pytest.raises(ValueError, match='a channel is main or back-end, not "other"'):
        decode("other", "front-end", 1, 1, b"", 0)
    with pytest.raises(ValueError, match='a sender is a front-end or a back-end, not "guest"'):
        decode("main", "guest", 1, 1, b"", 0)
