"""A trace from a file, of either kind."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import StateError
from . import pcapng
from .model import Record, from_json

SECTION_HEADER = b"\x0a\x0d\x0d\x0a"


def read(path: str | os.PathLike[str]) -> Iterator[Record]:
    """The records of a file that ``vhost-user trace --json`` or ``--pcapng`` wrote.

    Raises:
        OSError: the file cannot be read.
        StateError: it is no trace.
    """
    with Path(path).open("rb") as file:
        is_pcapng = file.read(4) == SECTION_HEADER
        file.seek(0)
        if is_pcapng:
            try:
                yield from pcapng.read(file)
            except ValueError as error:
                raise StateError(f"{os.fspath(path)}: {error}") from None
            return
        for number, line in enumerate(file, 1):
            try:
                record = from_json(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise StateError(f"{os.fspath(path)}, line {number}: this is not of a trace ({reason})") from None
            yield record
