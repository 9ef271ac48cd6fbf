"""The plugin by which Wireshark understands a trace: `vhost_user.lua`, with the tables of this package in it."""

from __future__ import annotations

import re
from importlib import resources
from typing import Any

from .._core import messages, payloads
from ..features import TYPES

#: Stands where the tables go.
PLACE = "--@TABLES@\n"

#: Lua: a number, a string, nothing, a list or a table.
Item = int | str | None | list["Item"] | dict[Any, "Item"]


def text() -> str:
    """The plugin, ready to be written into a file."""
    template = resources.files(__package__).joinpath("vhost_user.lua").read_text()
    assert PLACE in template
    items = {"requests": _requests(), "payloads": _payloads(), "device_types": _device_types()}
    tables = "\n".join(f"local {name} = {_lua(item)}\n" for name, item in items.items())
    return template.replace(PLACE, tables)


def _requests() -> Item:
    """By number of the channel, and by id."""
    rows: dict[Any, Item] = {0: {}, 1: {}}
    for info in messages():
        row: dict[Any, Item] = {
            "name": info.name,
            "payload": info.payload,
            "answer": info.answer,
            "answered": info.answered,
            "bits": dict(info.bits) if info.bits else None,
        }
        of_channel = rows[0 if info.channel == "main" else 1]
        assert isinstance(of_channel, dict)
        of_channel[info.id] = row
    return rows


def _payloads() -> Item:
    return [
        {"name": name, "abbr": _abbreviation(name), "size": size, "fields": _fields(fields)}
        for name, size, fields in payloads()
    ]


def _device_types() -> Item:
    """By number: what it is called, and the names of its feature bits."""
    return {number: {"name": known.name, "bits": dict(known.features)} for number, known in TYPES.items()}


def _fields(fields: list[tuple[str, int, int, str, list[Any]]]) -> Item:
    return [
        {"name": name, "offset": offset, "size": size, "shape": shape, **_parts(shape, parts)}
        for name, offset, size, shape, parts in fields
    ]


def _parts(shape: str, parts: list[Any]) -> dict[str, Item]:
    if shape == "bits":
        shifts = [(name, (mask & -mask).bit_length() - 1, mask.bit_count()) for name, mask in parts]
        return {"parts": [{"name": name, "shift": shift, "width": width} for name, shift, width in shifts]}
    if shape in ("structure", "structures"):
        return {"parts": _fields(parts), "stride": sum(size for _, _, size, _, _ in parts)}
    return {}


def _abbreviation(name: str) -> str:
    """As Wireshark has names: vring_state for VringState."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _lua(item: Item, indent: str = "") -> str:
    deeper = indent + "    "
    match item:
        case dict():
            pairs = [
                f"{deeper}{key if isinstance(key, str) else f'[{key}]'} = {_lua(value, deeper)},\n"
                for key, value in item.items()
                if value is not None
            ]
            return "{\n" + "".join(pairs) + indent + "}"
        case list():
            return "{\n" + "".join(f"{deeper}{_lua(value, deeper)},\n" for value in item) + indent + "}"
        case str():
            return f'"{item}"'
    return str(item)
