"""A Python class becomes a virtio device that a real Linux driver talks to.

Derive from :class:`Device`, declare queues and configuration fields, write a handler, and serve it on a socket that
QEMU, User-Mode Linux, cloud-hypervisor, crosvm, Firecracker or DPDK connects to with the vhost-user protocol.
"""

from . import config
from ._core import DirtyLog, InflightRecord, Memory, ProtocolFeature, Request, TransportFeature
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
    VhostUserError,
)
from .frontend import Completion, DriverQueue, Event, Frontend
from .ids import DeviceId
from .loop import Loop, Timer, Watch
from .queues import Batch, DeviceQueue, Queue, QueueStatistics
from .server import Server

__all__ = [
    "AddressInUse",
    "Batch",
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
    "Timer",
    "TransportFeature",
    "VhostUserError",
    "Watch",
    "config",
]
