"""What every command shares: a parser that loads it when it is used, messages, exit status."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

from ..errors import VhostUserError

FAILURE = 1
WRONG_USAGE = 2
INTERRUPTED = 130

#: What tells a process to end.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class UsageError(Exception):
    """The command line asks for something that cannot be. The message says what can."""


class CommandParser(argparse.ArgumentParser):
    """A parser that imports what it needs to know of its command only when it is used.

    Whoever configures it may set `capabilities`: what ``--print-capabilities`` prints, made from the arguments.
    """

    def __init__(self, *, configure: str = "", **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self.capabilities: Callable[[Sequence[str]], dict[str, object]] | None = None
        self._configure = configure

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        configure, self._configure = self._configure, ""
        if configure:
            module, function = configure.split(":")
            getattr(importlib.import_module(f"{__package__}.{module}"), function)(self)
            self.add_argument("-v", "--verbose", action="count", default=0, help="log more; -vv logs everything")
            self.set_defaults(prog=self.prog)
        if self.capabilities and "--print-capabilities" in args:
            # Whatever else is there is not looked at, so that a management program may ask with any arguments.
            print(json.dumps(self.capabilities(args)))
            self.exit()
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_USAGE, f"{self.prog}: {message}; see '{self.prog} --help'\n")


def execute(arguments: argparse.Namespace) -> int:
    """Run the command that was parsed, tell what went wrong in a line, and return the exit status."""
    detailed = "%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(
        format=detailed if arguments.verbose else f"{arguments.prog}: %(message)s",
        datefmt="%H:%M:%S",
        level=[logging.WARNING, logging.INFO, logging.DEBUG][min(arguments.verbose, 2)],
    )
    try:
        status: int = arguments.action(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if arguments.verbose:
            traceback.print_exception(error)
        print(f"{arguments.prog}: {_sentence(error)}", file=sys.stderr)
        return WRONG_USAGE if isinstance(error, UsageError) else FAILURE
    return status


@contextlib.contextmanager
def ended_by_signals(status: int) -> Iterator[None]:
    """Within the block, SIGTERM and SIGHUP end the process with `status`, after all that ``finally`` says."""

    def end(_number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(status)

    before = {number: signal.getsignal(number) for number in ENDING}
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, UsageError | VhostUserError | OSError):
        return str(error)
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({where.filename}, line {where.lineno}; -v shows the way there)"
