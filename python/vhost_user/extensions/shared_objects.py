"""Objects that devices share with each other, by name."""

from __future__ import annotations

from uuid import UUID

from .._core import ProtocolFeature
from ..device import Device
from ..loop import HasFileno
from .answers import Answer, ask


class SharedObjects(Device, offers=ProtocolFeature.SHARED_OBJECT):
    """Exports objects that other devices may use, as DMA buffers, and uses those of others.

    The front-end is asked only while a queue runs: until then the answers wait. What asks may raise:
        StateError: the front-end did not negotiate it, or is not there.

    vhost-user specification, VHOST_USER_GET_SHARED_OBJECT and VHOST_USER_BACKEND_SHARED_OBJECT_ADD.
    """

    def shared_object(self, uuid: UUID) -> int | HasFileno | None:
        """The file of an object, which stays this device's own; None if it has none of this name."""
        return None

    def add_shared_object(self, uuid: UUID) -> Answer:
        """Tell the front-end of an object, which it will ask for by :meth:`shared_object`."""
        return ask(self, "BACKEND_SHARED_OBJECT_ADD", uuid.bytes)

    def remove_shared_object(self, uuid: UUID) -> Answer:
        """Tell the front-end that an object of this device is gone."""
        return ask(self, "BACKEND_SHARED_OBJECT_REMOVE", uuid.bytes)

    def look_up_shared_object(self, uuid: UUID) -> Answer:
        """Ask for an object of another device. The answer is a descriptor of its file."""
        return ask(self, "BACKEND_SHARED_OBJECT_LOOKUP", uuid.bytes)

    def _shared_object(self, uuid: bytes) -> int | None:
        file = self.shared_object(UUID(bytes=uuid))
        return file if file is None or isinstance(file, int) else file.fileno()
