"""The device: a class to derive from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Self

from . import config
from ._core import ProtocolFeature
from .errors import DeclarationError
from .functions import is_coroutine_function, takes
from .queues import Queue

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from ._core import Request
    from ._runtime import Runtime
    from .loop import Loop
    from .queues import DeviceQueue
    from .server import Address, PathLike, Server


class Device:
    """A virtio device.

    A subclass declares its queues, its configuration space and its handlers:

        class Rng(vu.Device, device_id=vu.DeviceId.RNG):
            requestq = vu.Queue()

            @requestq.handler
            def fill(self, request: vu.Request) -> None:
                request.write(os.urandom(request.writable))

    An ``__init__`` of its own need not call this one's. Everything that starts with ``on_`` may be overridden and does
    nothing by itself. Handlers and hooks run on the thread that serves the device, one at a time, but for the two that
    move its state, and handlers on :attr:`workers`.
    """

    #: The virtio device type. Virtio 1.3, section 5.
    device_id: ClassVar[int]

    #: Feature bits of the device type that the device offers; those of the transport are added. An instance may assign
    #: its own before it is served.
    features: int = 0

    #: Whether the device may be behind an IOMMU (the feature ACCESS_PLATFORM): its addresses are then I/O addresses,
    #: the front-end is asked where they are, and a driver shows the device no more of its memory than it has to.
    #: QEMU makes use of it when it emulates an IOMMU and its device has ``iommu_platform=on,ats=on``, as with
    #: ``vhost_user.guest.Qemu(iommu=True)``. User-Mode Linux would accept it and has no IOMMU: leave it off there. An
    #: instance may decide for itself before it is served; nothing else in the device changes. Buffers and rings may be
    #: scattered over guest memory, as an IOMMU allows and as Linux makes rings of more than a page. Only a ring whose
    #: pages are scattered over huge pages (hugetlbfs) breaks: a part of those cannot be mapped by itself. vhost-user
    #: specification, "IOMMU support".
    iommu: bool = False

    #: For how long the device's threads look for requests by themselves before they sleep, in seconds, up to 1; 0 for
    #: not at all. It saves the driver the kick, and the device the time to wake up. A thread looks as long as requests
    #: come within that time; the more often none does, the less often it looks again. An instance may decide for itself
    #: before it is served. Nothing is looked for in a simulation, in asyncio, and with :attr:`in_band`.
    busy_poll: float = 50e-6

    #: Threads beside the device's own, over which the queues that have a handler are spread: queue `i` is worked on by
    #: thread `i % workers`. With 0 the device's own thread does it all. Handlers of different queues then run at the
    #: same time, and beside the hooks, :meth:`on_request_error` on the thread of its request: what they share needs a
    #: lock. A queue without a handler, the hooks, timers and watches stay on the device's thread. At most one for each
    #: queue. Not with ``async`` handlers or a simulation, and the class cannot be changed meanwhile. An
    #: instance may decide for itself before it is served.
    workers: int = 0

    #: Seconds for which requests that are done may wait for others that came with them, before the driver is notified.
    #: From a millisecond on, the driver sees none of them before all that are worked on together are done, however long
    #: that takes: for drivers that cannot take one without the other. Other queues may then wait as many seconds.
    batch_patience: float = 200e-6

    #: Whether the front-end may send its kicks as messages, and get its calls as messages: then virtual time knows of
    #: them, see :mod:`vhost_user.simulation`. User-Mode Linux does so whenever it is offered, and everything is slower
    #: for it. An instance may decide for itself before it is served. vhost-user specification, "In-band notifications".
    in_band: bool = False

    #: Whether the front-end may start the device while guest memory is still on its way from another host, and provide
    #: each page when the device touches it (PAGEFAULT). While a page is missing the device waits, with all its process.
    #: It is offered only where the process may open a userfaultfd that waits in system calls too, and then in
    #: place of CONFIGURE_MEM_SLOTS: guest memory has at most 8 regions. An instance may decide for itself before it is
    #: served. vhost-user specification, "Migration".
    postcopy: bool = False

    #: Whether the device offers packed rings (RING_PACKED), and to complete requests in the order in which the driver
    #: made them (IN_ORDER). A driver takes what it knows: Linux takes packed rings, for which QEMU's device needs
    #: ``packed=on``, and its newest versions both; what works better depends on driver and device. In order, a request
    #: that is completed early is held back until those before it are, and one that is never completed holds back all
    #: that follow. Nothing else in the device changes. User-Mode Linux takes what it is offered. An instance may
    #: decide for itself before it is served. Virtio 1.3, sections 2.8, 2.7.9 and 2.8.9.
    packed_rings: bool = False
    in_order: bool = False

    #: Whether the device takes legacy drivers on big-endian machines (the protocol feature CROSS_ENDIAN): those that do
    #: not accept VERSION_1. The rings are converted. What is in requests and in the configuration space is not: it has
    #: the byte order that :attr:`DeviceQueue.byteorder` tells, and this device has to look at it wherever it packs or
    #: unpacks; the configuration space is written in it in :meth:`on_queue_start`. An instance may decide for itself
    #: before it is served. vhost-user specification, VHOST_USER_SET_VRING_ENDIAN; Virtio 1.3, section 2.7.3.
    cross_endian: bool = False

    #: Filled in for every subclass.
    _queues: ClassVar[list[Queue]] = []
    _handlers: ClassVar[Mapping[Queue, str]] = {}
    _batch_handlers: ClassVar[Mapping[Queue, str]] = {}
    _blocks: ClassVar[Mapping[Queue, str]] = {}
    _layout: ClassVar[config.Layout] = config.Layout("Device", [])
    _field_hooks: ClassVar[Mapping[str, str]] = {}

    #: What :mod:`vhost_user.extensions` adds to it.
    _offers: ClassVar[ProtocolFeature] = ProtocolFeature(0)
    _takes_gpu_socket: ClassVar[bool] = False

    _runtime: Runtime

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        # Whoever only declares classes is not made to wait for what serves their instances.
        from ._runtime import Runtime

        device = super().__new__(cls)
        device._runtime = Runtime(device)
        return device

    def __init_subclass__(
        cls, *, device_id: int | None = None, offers: int = 0, gpu_socket: bool = False, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        if device_id is not None:
            if not 0 < device_id < 1 << 16:
                raise DeclarationError(f"{cls.__name__}: a device id is a number from 1 to 65535, not {device_id}")
            cls.device_id = device_id
        members = [member for base in reversed(cls.__mro__) for member in vars(base).values()]
        for base in cls.__bases__:
            offers |= getattr(base, "_offers", 0)
            gpu_socket |= getattr(base, "_takes_gpu_socket", False)
        cls._offers = ProtocolFeature(offers)
        cls._takes_gpu_socket = gpu_socket
        cls._queues = _last_by_name(members, Queue)
        cls._layout = config.Layout(cls.__name__, _last_by_name(members, config.Field))
        cls._handlers = _handlers(cls, members, "__vhost_user_queue__", 2)
        cls._batch_handlers = _batch_handlers(cls, members)
        cls._blocks = _unless_replaced(cls, _handlers(cls, members, "__vhost_user_blocks__", 1))
        cls._field_hooks = {
            field.name: member.__name__ for member in members for field in getattr(member, "__vhost_user_fields__", ())
        }

    # --- Serving ----------------------------------------------------------------------------------------------------

    def serve(
        self,
        path: PathLike | None = None,
        *,
        fd: int | None = None,
        connect: PathLike | None = None,
        once: bool = False,
        mode: int = 0o600,
    ) -> None:
        """Serve the device until :meth:`stop`, Ctrl-C, or, with `once`, until the first front-end is gone.

        Listens at the socket `path`, whose permissions will be `mode`; or uses the inherited descriptor `fd`, which may
        listen or be connected; or connects to a front-end that listens at `connect`; or, with none of them, uses the
        socket that systemd passed. One front-end is served at a time, and one follows the other.

        Raises:
            DeclarationError: the device cannot be as it declares itself.
            AddressInUse: somebody else listens at the path, or it is not a socket.
            OSError: the path cannot be bound or connected to.
            ProtocolError: the only connection that there was to be ended with an error.
        """
        from .server import Endpoint

        endpoint = Endpoint(path=path, fd=fd, connect=connect, mode=mode)
        if self._runtime.has_coroutines:
            import asyncio

            asyncio.run(self._runtime.serve_async(endpoint, once))
        else:
            self._runtime.serve(endpoint, once)

    async def serve_async(
        self,
        path: PathLike | None = None,
        *,
        fd: int | None = None,
        connect: PathLike | None = None,
        once: bool = False,
        mode: int = 0o600,
    ) -> None:
        """Serve the device within a running asyncio loop, on whose thread the handlers run. Cancelling it ends it.

        The arguments, and what is raised, are those of :meth:`serve`.
        """
        from .server import Endpoint

        await self._runtime.serve_async(Endpoint(path=path, fd=fd, connect=connect, mode=mode), once)

    def start(
        self,
        path: PathLike | None = None,
        *,
        fd: int | None = None,
        connect: PathLike | None = None,
        once: bool = False,
        mode: int = 0o600,
    ) -> Server:
        """Serve the device in a thread of its own. The socket is there when this returns.

        The arguments, and what is raised, are those of :meth:`serve`. The server that it returns is a context manager
        that stops at the end of its block.
        """
        from .server import Endpoint, Server

        return Server(self, Endpoint(path=path, fd=fd, connect=connect, mode=mode), once)

    def stop(self) -> None:
        """End serving, after requests in flight are done. From any thread; nothing happens if it is not served."""
        self._runtime.stop()

    # --- State ------------------------------------------------------------------------------------------------------

    @property
    def queues(self) -> list[DeviceQueue]:
        """All queues, by index."""
        return self._runtime.queues

    @property
    def loop(self) -> Loop:
        """The loop of the device, for descriptors and timers of its own, from :meth:`on_start` on."""
        return self._runtime.loop

    @property
    def address(self) -> Address | None:
        """Where the device is served, if it is."""
        return self._runtime.address

    @property
    def connected(self) -> bool:
        """Whether a front-end is connected."""
        return self._runtime.connected

    @property
    def negotiated(self) -> int:
        """The feature bits that the driver accepted; 0 before it did."""
        return self._runtime.negotiated

    def config_update(self) -> AbstractContextManager[None]:
        """Assign several configuration fields in a ``with`` block, and notify the driver once, at its end."""
        return self._runtime.config.update()

    def _shared_memory(self) -> Mapping[int, int]:
        """Bytes of each shared memory region, by its index."""
        return {}

    # --- Hooks ------------------------------------------------------------------------------------------------------

    def on_start(self) -> None:
        """The device is going to be served: open files here, watch descriptors, start timers."""

    def on_stop(self) -> None:
        """The device is not served any more."""

    def on_connect(self) -> None:
        """A front-end connected."""

    def on_disconnect(self, error: Exception | None) -> None:
        """The front-end is gone: in good order, or with the error that ended the connection."""

    def on_features(self, features: int) -> None:
        """The driver accepted `features`, of those that were offered."""

    def on_queue_start(self, queue: DeviceQueue) -> None:
        """The driver set the queue up: buffers may be there already."""

    def on_queue_stop(self, queue: DeviceQueue) -> None:
        """The driver is taking the queue away, or lost it: complete the requests of it that you hold."""

    def on_buffers(self, queue: DeviceQueue) -> None:
        """The driver made buffers available on a queue without a handler: when it started it, and after a look that
        found none. The backlog was served first."""

    def on_config_write(self, field: config.Field[Any], old: Any, new: Any) -> None:
        """The driver wrote to a writable configuration field."""

    def on_reset(self) -> None:
        """The driver reset the device."""

    def on_save_state(self, file: BinaryIO) -> None:
        """The device moves to another process: write what that one has to know to `file`.

        Its queues are not part of it: the front-end moves them. They are all stopped. Nothing is written by default.
        Called on a thread of its own, so that it may wait for the front-end to read. An exception is logged, and fails
        the migration, after which this device may go on. vhost-user specification, "Migrating back-end state".
        """

    def on_load_state(self, file: BinaryIO) -> None:
        """The device comes from another process: read from `file` what :meth:`on_save_state` wrote there, all of it.

        What comes is no more to be trusted than the front-end: check it before anything changes, never unpickle it.
        Every queue is stopped. Called on a thread of its own. An exception is logged, and fails the migration.
        """

    def on_reload(self, old_class: type[Device]) -> None:
        """The device has got new code, see :mod:`vhost_user.reload`: bring up to date what it keeps.

        ``__init__`` is not called again. An exception makes the device keep its old code.
        """

    def on_queue_error(self, queue: DeviceQueue, error: str) -> None:
        """The driver broke the queue: it is stopped, the others go on. The error was logged."""

    def on_request_error(self, request: Request, error: BaseException) -> None:
        """A handler raised, which was logged: write the status that the device type has for that.

        The request is completed afterwards. What is written so far stays, so that :meth:`Request.write_tail` is usually
        what is needed.
        """


def _last_by_name(members: list[Any], kind: type[Any]) -> list[Any]:
    """Members of a kind, in the order of their first declaration; a subclass replaces what it declares again."""
    by_name = {member.name: member for member in members if isinstance(member, kind)}
    return list(by_name.values())


def _handlers(cls: type[Device], members: list[Any], mark: str, arguments: int) -> dict[Queue, str]:
    by_name = {queue.name: queue for queue in cls._queues}
    handlers: dict[Queue, str] = {}
    for member in members:
        wanted: Queue | None = getattr(member, mark, None)
        if wanted is None or isinstance(member, Queue):
            continue
        queue = by_name.get(getattr(wanted, "name", ""))
        if queue is None:
            raise DeclarationError(
                f"{cls.__name__}.{member.__name__} handles {wanted}, which is not a queue of the class"
            )
        _check_signature(cls, member, arguments)
        other = handlers.get(queue)
        if other not in (None, member.__name__) and other in vars(cls) and member.__name__ in vars(cls):
            raise DeclarationError(f"{cls.__name__}.{queue.name} has two handlers, {other} and {member.__name__}")
        handlers[queue] = member.__name__
    return handlers


def _batch_handlers(cls: type[Device], members: list[Any]) -> dict[Queue, str]:
    handlers = _unless_replaced(cls, _handlers(cls, members, "__vhost_user_batches__", 2))
    for name in handlers.values():
        if is_coroutine_function(getattr(cls, name)):
            raise DeclarationError(f"{cls.__name__}.{name} handles batches; it cannot be an `async def`")
    return handlers


def _unless_replaced(cls: type[Device], handlers: dict[Queue, str]) -> dict[Queue, str]:
    """Without those that a subclass has replaced by a handler of its own."""
    kept = {}
    for queue, name in handlers.items():
        origin = next(at for at, base in enumerate(cls.__mro__) if name in vars(base))
        below = [member for base in cls.__mro__[:origin] for member in vars(base).values()]
        if not any(queue.name in _handled_queues(member) for member in below):
            kept[queue] = name
    return kept


def _handled_queues(member: object) -> set[str]:
    """Those of which a member takes all requests that come."""
    if isinstance(member, Queue):
        return set()
    marks = ("__vhost_user_queue__", "__vhost_user_batches__")
    return {queue.name for mark in marks if isinstance(queue := getattr(member, mark, None), Queue)}


def _check_signature(cls: type[Device], handler: Callable[..., object], arguments: int) -> None:
    if not takes(handler, arguments):
        raise DeclarationError(f"{cls.__name__}.{handler.__name__} must take (self, request) to handle a queue")
