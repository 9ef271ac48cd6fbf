"""What only some devices have: a class for each, to derive a device from.

    class Net(extensions.Rarp, extensions.Mtu, device_id=vu.DeviceId.NET):
        def on_mtu(self, mtu: int) -> None: ...

A device offers the protocol features of the classes that it derives from, and no others. A hook that raises refuses
what the front-end asked for. The driver's half of each is a method of :class:`vhost_user.Frontend`.
"""

from .answers import Answer
from .crypto import AsymmetricSession, CryptoSessions, SymmetricSession
from .gpu import GpuSocket
from .network import Mtu, Rarp
from .shared_memory import HostNotifiers, SharedMemory
from .shared_objects import SharedObjects

__all__ = [
    "Answer",
    "AsymmetricSession",
    "CryptoSessions",
    "GpuSocket",
    "HostNotifiers",
    "Mtu",
    "Rarp",
    "SharedMemory",
    "SharedObjects",
    "SymmetricSession",
]
