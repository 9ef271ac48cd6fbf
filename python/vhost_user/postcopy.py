"""Postcopy: a back-end starts to work while guest memory is still on its way, and gets each page when it touches it.

What :meth:`vhost_user.Frontend.postcopy` returns. vhost-user specification, "Migration".
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ._core import LatePages
from .errors import VhostUserError
from .queues import Buffer

if TYPE_CHECKING:
    from .frontend import Frontend

PAGE_SIZE = 4096

logger = logging.getLogger(__name__)


class Postcopy:
    """Provides pages of guest memory to a back-end, in a thread. Its ``with`` block ends with :meth:`end`."""

    def __init__(self, frontend: Frontend, late: LatePages, page: Callable[[int], Buffer]) -> None:
        self._frontend = frontend
        self._late = late
        self._page = page
        self._provided: list[int] = []
        self._quit = os.eventfd(0)
        self._thread = threading.Thread(target=self._serve, name="vhost-user pages", daemon=True)
        self._thread.start()

    @property
    def provided(self) -> list[int]:
        """The guest addresses of the pages that the back-end has waited for, in order."""
        return list(self._provided)

    def provide(self, address: int, data: Buffer) -> bool:
        """Provide whole pages of 4096 bytes that nobody has asked for yet, from a guest address on.

        Returns False if the first of them is there already: it stays as it is.

        Raises:
            StateError: these are not whole pages of one region.
        """
        return self._late.provide(address, bytes(data))

    def fileno(self) -> int:
        """The descriptor of the back-end's userfaultfd."""
        return self._late.fileno()

    def end(self) -> None:
        """Tell the back-end that all pages are there. Those that were never provided are zeroes from now on.

        May raise what every method of the front-end may raise that exchanges messages.
        """
        if self._stop() and not self._frontend.closed:
            self._frontend._session.end_postcopy()

    def _stop(self) -> bool:
        """Provide nothing more. Returns whether that is news."""
        is_running = self._quit >= 0
        if is_running:
            os.eventfd_write(self._quit, 1)
            if threading.current_thread() is not self._thread:
                self._thread.join()
            os.close(self._quit)
            self._quit = -1
        return is_running

    def _serve(self) -> None:
        quit_fd = self._quit
        poll = select.poll()
        poll.register(quit_fd, select.POLLIN)
        poll.register(self._late, select.POLLIN)
        try:
            while quit_fd not in [fd for fd, _ in poll.poll()]:
                while (address := self._late.wanted()) is not None:
                    data = bytes(self._page(address))
                    self._provided.append(address)
                    self._late.provide(address, data)
        except Exception as error:
            # The back-end would wait for ever. Once the connection is closed it goes on with zeroes, and may answer.
            why = "a page of guest memory cannot be provided"
            logger.exception("%s; the connection is closed", why, exc_info=error)
            self._frontend._end_queues(f"{why}: {error}")
            with contextlib.suppress(VhostUserError):
                self._frontend._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.end()
        else:
            self._stop()
