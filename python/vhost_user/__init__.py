"""A Python class becomes a virtio device that a real Linux driver talks to.

Derive from :class:`Device`, declare queues and configuration fields, write a handler, and serve it on a socket that
QEMU, User-Mode Linux, cloud-hypervisor, crosvm, Firecracker or DPDK connects to with the vhost-user protocol.

Beside what is here:

    vhost_user.devices      an entropy source, a disk, a console, and an I2C bus with a sensor
    vhost_user.testing      the driver's side in this process, for unit tests, and hostile drivers
    vhost_user.guest        boots a Linux kernel with devices, and runs commands in it
    vhost_user.simulation   one virtual clock for a kernel and its devices
    vhost_user.extensions   what only some device types have: screens, shared memory, crypto sessions
    vhost_user.check        whether a back-end keeps to the specification
    vhost_user.bench        how fast a back-end is
    vhost_user.trace        what a front-end and a back-end say to each other
    vhost_user.reload       new code for a device that is being served
"""

from typing import TYPE_CHECKING

from . import config
from ._core import Blocks, DirtyLog, InflightRecord, Memory, ProtocolFeature, Request, TransportFeature
from .device import Device
from .errors import (
    AddressInUse,
    DeclarationError,
    PeerClosed,
    PeerTimeout,
    ProtocolError,
    QueueFull,
    RequestCompleted,
    RequestError,
    RequestOverflow,
    RequestRevoked,
    RequestUnderflow,
    StateError,
    StateTooLong,
    VhostUserError,
)
from .ids import DeviceId
from .queues import Batch, DeviceQueue, Queue, QueueStatistics

if TYPE_CHECKING:
    from .frontend import Completion, DriverQueue, Event, Frontend
    from .loop import Loop, Timer, Watch
    from .server import Server
else:
    #: What a device class can be declared without is imported when somebody asks for it: with sockets, threads and
    #: logging behind it, it takes longer than everything else here.
    _LATER = {
        "Completion": "frontend",
        "DriverQueue": "frontend",
        "Event": "frontend",
        "Frontend": "frontend",
        "Loop": "loop",
        "Server": "server",
        "Timer": "loop",
        "Watch": "loop",
    }

    def __getattr__(name: str) -> object:
        module = _LATER.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
        from importlib import import_module

        value = globals()[name] = getattr(import_module(f".{module}", __name__), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "AddressInUse",
    "Batch",
    "Blocks",
    "Completion",
    "DeclarationError",
    "Device",
    "DeviceId",
    "DeviceQueue",
    "DirtyLog",
    "DriverQueue",
    "Event",
    "Frontend",
    "InflightRecord",
    "Loop",
    "Memory",
    "PeerClosed",
    "PeerTimeout",
    "ProtocolError",
    "ProtocolFeature",
    "Queue",
    "QueueFull",
    "QueueStatistics",
    "Request",
    "RequestCompleted",
    "RequestError",
    "RequestOverflow",
    "RequestRevoked",
    "RequestUnderflow",
    "Server",
    "StateError",
    "StateTooLong",
    "Timer",
    "TransportFeature",
    "VhostUserError",
    "Watch",
    "config",
]
