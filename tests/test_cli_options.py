"""``-o key=value``: what a text becomes, by the annotation of a constructor's parameter."""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhost_user.cli.command import UsageError
from vhost_user.cli.options import construct, integer, options

if TYPE_CHECKING:
    from nowhere import Nothing  # type: ignore[import-not-found]


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (int, "64", 64),
        (int, "-1", -1),
        (int, "0x1f", 31),
        (int, "64K", 1 << 16),
        (int, "2gib", 2 << 30),
        (bool, "yes", True),
        (bool, "Off", False),
        (float, "21.5", 21.5),
        (str, "a=b", "a=b"),
        (str, "", ""),
        (bytes, "AB", b"AB"),
        (Path, "a/b", Path("a/b")),
        (str | os.PathLike[str], "a/b", Path("a/b")),
        (Colour, "Red", Colour.RED),
        (Literal["left", 2], "2", 2),
        (int | None, "5", 5),
        (int | str, "5", 5),
        (str | int, "five", "five"),
        (list[int], "1,0x2", [1, 2]),
        (tuple[float, ...], "1,2", (1.0, 2.0)),
        (Sequence[str], "a,b", ["a", "b"]),
        (list, "a,b", ["a", "b"]),
        (Any, "x", "x"),
    ],
)
def test_a_text_becomes_what_is_annotated(annotation: object, text: str, value: object) -> None:
    class Device:
        def __init__(self, key):  # type: ignore[no-untyped-def]
            self.key = key

    Device.__init__.__annotations__["key"] = annotation
    key = construct(Device, [f"key={text}"]).key
    assert (key, type(key)) == (value, type(value))


@pytest.mark.parametrize(
    ("annotation", "text", "expected"),
    [
        (int, "big", "expected a number such as 512, 0x200 or 64K, not 'big'"),
        (int, "K", "expected a number"),
        (int, "1.5", "expected a number"),
        (bool, "maybe", "expected yes or no, not 'maybe'"),
        (float, "warm", "expected a number such as 21.5, not 'warm'"),
        (Literal["left", "right"], "up", "expected one of left, right, not 'up'"),
        (int | bool, "x", "expected a number such as 512, 0x200 or 64K or yes or no, not 'x'"),
        (list[int], "1,x", "expected a number"),
        (Callable[[], int], "f", "which cannot be written on a command line"),
    ],
)
def test_another_text_is_refused_with_what_is_expected(annotation: object, text: str, expected: str) -> None:
    class Device:
        def __init__(self, key):  # type: ignore[no-untyped-def]
            raise AssertionError

    Device.__init__.__annotations__["key"] = annotation
    with pytest.raises(UsageError) as refusal:
        construct(Device, [f"key={text}"])
    assert expected in str(refusal.value)


@given(st.integers(-(2**70), 2**70), st.sampled_from(["", "K", "M", "G", "T"]))
def test_a_number_is_read_as_it_is_written(number: int, suffix: str) -> None:
    factor = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[suffix]
    assert integer(f"{number}{suffix}") == integer(f"{number:#x}{suffix}") == number * factor


def test_parameters_of_every_kind_are_filled() -> None:
    class Device:
        def __init__(
            self, first: int, /, second: int = 2, third: int = 3, *rest: int, fourth: int, **more: int
        ) -> None:
            self.seen = (first, second, third, rest, fourth, more)

    assert construct(Device, ["first=1", "third=5", "fourth=6"]).seen == (1, 2, 5, (), 6, {})


def test_without_annotation_the_default_says_the_type() -> None:
    class Device:
        def __init__(self, size=1, name=None):  # type: ignore[no-untyped-def]
            self.seen = (size, name)

    assert construct(Device, ["size=1K", "name=1"]).seen == (1024, "1")


def test_an_annotation_that_only_type_checkers_know_is_a_text() -> None:
    class Device:
        def __init__(self, key: Nothing) -> None:
            self.key = key

    assert construct(Device, ["key=1"]).key == "1"


def test_a_dataclass_has_a_constructor() -> None:
    @dataclass
    class Device:
        size: int
        name: str = "x"

    assert construct(Device, ["size=2"]) == Device(2, "x")


def test_a_class_without_constructor_takes_nothing() -> None:
    assert options(type("Device", (), {})) == []
