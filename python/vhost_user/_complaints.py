"""Lines of a log about what a peer or a driver did, as often as it liked."""

from __future__ import annotations

import logging

from ._core import Complaints


def report(
    logger: logging.Logger,
    complaints: Complaints,
    text: str,
    *arguments: object,
    level: int = logging.ERROR,
    error: BaseException | None = None,
) -> None:
    """Log `text`, unless there were too many of its kind just now. The next one tells how many."""
    unsaid = complaints.due()
    if unsaid is None:
        return
    if unsaid:
        text, arguments = f"{text} (and %d errors before it that were not logged)", (*arguments, unsaid)
    logger.log(level, text, *arguments, exc_info=error)
