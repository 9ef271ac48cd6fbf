"""What front-ends tell network devices."""

from .._core import ProtocolFeature
from ..device import Device


class Rarp(Device, offers=ProtocolFeature.RARP):
    """Announces the guest to the network after a migration, for drivers that cannot do it themselves.

    vhost-user specification, VHOST_USER_SEND_RARP.
    """

    def on_rarp(self, mac: bytes) -> None:
        """Broadcast a fake RARP packet from `mac`, the 6 bytes of the guest's address."""


class Mtu(Device, offers=ProtocolFeature.NET_MTU):
    """Is told the MTU that the front-end gave the driver.

    It belongs to the feature F_MTU (bit 3) of network devices, and the field ``mtu`` of their configuration space.
    vhost-user specification, VHOST_USER_NET_SET_MTU; Virtio 1.3, section 5.1.4.
    """

    def on_mtu(self, mtu: int) -> None:
        """Packets will have up to `mtu` bytes, from 68 to 65535. Raise if the device cannot do that."""
