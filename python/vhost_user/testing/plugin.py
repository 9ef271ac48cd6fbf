"""The pytest plugin: it is loaded by itself where the package is installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

import pytest

if TYPE_CHECKING:
    from ..device import Device
    from ..frontend import Frontend
    from .drivers import Driver

D = TypeVar("D", bound="Driver")


class ConnectDevice(Protocol):
    """What the fixture `connect_device` is."""

    @overload
    def __call__(self, device: Device, **options: Any) -> Frontend: ...

    @overload
    def __call__(self, device: Device, driver: type[D], **options: Any) -> D: ...


@pytest.fixture
def connect_device() -> Iterator[ConnectDevice]:
    """Serve a device in this process until the end of the test, and be its driver: see `vhost_user.testing.connect`.

    ``connect_device(device)`` returns a negotiated `Frontend`, and ``connect_device(device, BlkDriver)`` a driver.
    """
    from .connection import connect

    with contextlib.ExitStack() as stack:

        def connected(device: Device, driver: type[Driver] | None = None, **options: Any) -> Any:
            frontend = stack.enter_context(connect(device, **options))
            return frontend if driver is None else driver(frontend)

        yield connected
