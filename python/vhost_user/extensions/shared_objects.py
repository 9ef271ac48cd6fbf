"""Objects that devices share with each other, by name."""

from __future__ import annotations

from uuid import UUID

from .._core import ProtocolFeature
from ..device import Device
from ..loop import HasFileno


class SharedObjects(Device, offers=ProtocolFeature.SHARED_OBJECT):
    """Exports objects that other devices may use, as DMA buffers. vhost-user specification, "Shared objects"."""

    def shared_object(self, uuid: UUID) -> int | HasFileno | None:
        """The file of an object, which stays this device's own; None if it has none of this name."""
        return None

    def _shared_object(self, uuid: bytes) -> int | None:
        file = self.shared_object(UUID(bytes=uuid))
        return file if file is None or isinstance(file, int) else file.fileno()
