"""Options of a class on the command line: ``-o key=value``, by the annotations of its constructor."""

from __future__ import annotations

import collections.abc
import difflib
import enum
import inspect
import os
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .command import UsageError

T = TypeVar("T")

_NUMBER = re.compile(r"([+-]?(?:0x[0-9a-f_]+|0b[01_]+|0o[0-7_]+|[0-9][0-9_]*))(?:([kmgt])(?:i?b)?)?", re.IGNORECASE)
_BOOLEANS = dict.fromkeys(("1", "yes", "true", "on"), True) | dict.fromkeys(("0", "no", "false", "off"), False)
_SEQUENCES = {list: list, tuple: tuple, collections.abc.Sequence: list, collections.abc.Iterable: list}


def integer(text: str) -> int:
    """A number in decimal, or with 0x, 0o or 0b, and perhaps a K, M, G or T, which count in 1024s."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise ValueError("a number such as 512, 0x200 or 64K")
    digits, suffix = match.groups()
    return int(digits, 0) << 10 * " kmgt".index((suffix or " ").lower())


@dataclass(frozen=True)
class Option:
    """A parameter of a constructor."""

    name: str
    kind: Any
    default: Any

    def __str__(self) -> str:
        kind = self.kind if isinstance(self.kind, str) else inspect.formatannotation(self.kind)
        if self.default is inspect.Parameter.empty:
            return f"{self.name}: {kind}, required"
        return f"{self.name}: {kind}, default {self.default!r}"


def construct(cls: type[T], assignments: Sequence[str]) -> T:
    """An instance of `cls`, whose constructor gets the values of ``key=value`` assignments.

    ``key`` alone is ``key=yes``; a dash in a key is an underscore.

    Raises:
        UsageError: the constructor takes no such key, misses one, or a value is not of the type that it takes.
    """
    by_name = {option.name: option for option in options(cls)}
    values: dict[str, object] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip().replace("-", "_")
        if key not in by_name:
            close = difflib.get_close_matches(key, by_name, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UsageError(f"-o {assignment}: there is no {key or 'such key'}; {hint}{accepted(cls)}")
        try:
            values[key] = _convert(by_name[key].kind, text if equals else "yes")
        except ValueError as expected:
            raise UsageError(f"-o {assignment}: expected {expected}, not {text if equals else 'no value'!r}") from None
    for option in by_name.values():
        if option.default is inspect.Parameter.empty and option.name not in values:
            raise UsageError(f"-o {option.name}=… is missing; {accepted(cls)}")
    arguments = inspect.BoundArguments(_signature(cls), types.MappingProxyType(values))  # type: ignore[arg-type]
    return cls(*arguments.args, **arguments.kwargs)


def options(cls: type) -> list[Option]:
    """What ``-o`` accepts for `cls`."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        Option(parameter.name, _kind(parameter, cls), parameter.default)
        for parameter in _signature(cls).parameters.values()
        if parameter.kind not in variable
    ]


def accepted(cls: type) -> str:
    """The same, to read."""
    listed = [str(option) for option in options(cls)]
    if not listed:
        return f"{cls.__name__} takes no options"
    return "\n  ".join([f"{cls.__name__} takes", *listed])


def _signature(cls: type) -> inspect.Signature:
    # Not inspect.signature(cls), which would be that of Device.__new__.
    init: Any = cls.__init__  # type: ignore[misc]
    if init is object.__init__:
        return inspect.Signature()
    signature = inspect.signature(init)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _kind(parameter: inspect.Parameter, cls: type) -> Any:
    kind = parameter.annotation
    if isinstance(kind, str):
        try:
            kind = eval(kind, inspect.unwrap(cls.__init__).__globals__)  # type: ignore[misc]
        except Exception:
            # A name that is imported for type checkers only.
            return str
    if kind is inspect.Parameter.empty:
        return str if parameter.default in (None, inspect.Parameter.empty) else type(parameter.default)
    return kind


def _convert(kind: Any, text: str) -> Any:
    """The value of `kind` that `text` stands for. The ValueError says what is expected instead."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _convert_any(arguments, text)
    if origin is typing.Literal:
        by_text = {str(choice): choice for choice in arguments}
        return _choose(by_text, text)
    if origin in _SEQUENCES or kind in _SEQUENCES:
        item = arguments[0] if arguments else str
        return _SEQUENCES[origin or kind](_convert(item, part) for part in text.split(",") if part)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _choose({member.name.lower(): member for member in kind}, text.lower())
    convert = _SCALARS.get(origin or kind)
    if convert is None:
        raise ValueError(f"a {inspect.formatannotation(kind)}, which cannot be written on a command line")
    return convert(text)


def _convert_any(kinds: Sequence[Any], text: str) -> Any:
    # Every text is a str: that comes last.
    expected = []
    for kind in sorted((kind for kind in kinds if kind is not types.NoneType), key=lambda kind: kind is str):
        try:
            return _convert(kind, text)
        except ValueError as error:
            expected.append(str(error))
    raise ValueError(" or ".join(expected))


def _choose(choices: dict[str, Any], text: str) -> Any:
    if text not in choices:
        raise ValueError("one of " + ", ".join(choices))
    return choices[text]


def _boolean(text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise ValueError("yes or no")
    return _BOOLEANS[text.lower()]


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("a number such as 21.5") from None


_SCALARS: dict[Any, Callable[[str], object]] = {
    int: integer,
    bool: _boolean,
    float: _float,
    str: str,
    bytes: str.encode,
    Path: Path,
    os.PathLike: Path,
    Any: str,
    object: str,
}
