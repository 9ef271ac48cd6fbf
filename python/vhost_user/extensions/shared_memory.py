"""Memory of a device that its driver sees, and pages to notify a device by."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .._core import ProtocolFeature
from ..device import Device
from ..errors import DeclarationError
from ..loop import HasFileno
from .answers import Answer, ask

if TYPE_CHECKING:
    from ..queues import DeviceQueue

_MMAP = struct.Struct("=B7xQQQQ")
_AREA = struct.Struct("=QQQ")
_WRITABLE = 1
_NO_DESCRIPTOR = 1 << 8


class SharedMemory(Device, offers=ProtocolFeature.SHMEM):
    """Has shared memory regions, into which it maps files for its driver. Virtio 1.3, section 2.10.

    The front-end is asked only while a queue runs: until then the answers wait. What asks may raise:
        StateError: the front-end did not negotiate it, or is not there.

    vhost-user specification, VHOST_USER_BACKEND_SHMEM_MAP.
    """

    #: Bytes of each region, by its index from 0 to 255: multiples of the page size. An instance may assign its own
    #: before it is served.
    shared_memory: Mapping[int, int] = {}

    def map_shared_memory(
        self,
        region: int,
        offset: int,
        file: int | HasFileno,
        size: int,
        *,
        file_offset: int = 0,
        writable: bool = True,
    ) -> Answer:
        """Show the driver `size` bytes of a file at `offset` of a region. All three are multiples of the page size.

        They must not overlap others. A reset of the device takes them away.
        """
        flags = _WRITABLE if writable else 0
        payload = _MMAP.pack(region, file_offset, offset, size, flags)
        return ask(self, "BACKEND_SHMEM_MAP", payload, file)

    def unmap_shared_memory(self, region: int, offset: int, size: int) -> Answer:
        """Take away again what was mapped there, as a whole."""
        return ask(self, "BACKEND_SHMEM_UNMAP", _MMAP.pack(region, 0, offset, size, 0))

    def _shared_memory(self) -> Mapping[int, int]:
        for region, size in self.shared_memory.items():
            if not 0 <= region < 256 or size <= 0 or size % mmap.PAGESIZE:
                raise DeclarationError(
                    f"{type(self).__name__}.shared_memory has a region {region} of {size} bytes; regions are numbered "
                    f"from 0 to 255, and their sizes are multiples of {mmap.PAGESIZE}"
                )
        return self.shared_memory


class HostNotifiers(Device, offers=ProtocolFeature.HOST_NOTIFIER):
    """Gives its driver pages to notify it by, such as those of hardware, instead of having the front-end do it.

    The front-end is asked only while a queue runs: until then the answers wait. What asks may raise:
        StateError: the front-end did not negotiate it, or is not there.

    vhost-user specification, VHOST_USER_BACKEND_VRING_HOST_NOTIFIER_MSG.
    """

    def set_host_notifier(self, queue: DeviceQueue, file: int | HasFileno, offset: int = 0) -> Answer:
        """Let the driver write to the page at `offset` of a file when it notifies the queue."""
        payload = _AREA.pack(queue.index, mmap.PAGESIZE, offset)
        return ask(self, "BACKEND_VRING_HOST_NOTIFIER_MSG", payload, file)

    def remove_host_notifier(self, queue: DeviceQueue) -> Answer:
        """Take the page away again: the driver notifies the queue as others do."""
        return ask(self, "BACKEND_VRING_HOST_NOTIFIER_MSG", _AREA.pack(queue.index | _NO_DESCRIPTOR, 0, 0))
