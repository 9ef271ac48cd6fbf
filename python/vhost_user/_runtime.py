"""What is behind a device: its queues and configuration while it is served, and the calls from the core.

The core calls the methods without an underscore below "From the core", on the thread that serves the device.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from . import queues
from ._complaints import report
from ._core import Backend, BatchHandler, Complaints, ProtocolFeature, Request, TransportFeature
from ._state import Transfer
from .errors import DeclarationError, StateError, VhostUserError
from .functions import is_coroutine_function
from .loop import Loop, Timer, Watch

if TYPE_CHECKING:
    import asyncio
    from concurrent.futures import Future
    from types import FrameType

    from .config import Field
    from .device import Device
    from .queues import DeviceQueue, Queue
    from .server import Address, Endpoint

logger = logging.getLogger("vhost_user.device")

#: Seconds for which a second front-end is kept waiting for the first one to go away.
PATIENCE = 1.0

#: Seconds after which a device that was told to stop says what it waits for. Requests in flight have five.
STOP_REMINDER = 8.0


class Offer(NamedTuple):
    """What a device offers to a front-end, beside what every device has."""

    features: int
    """Bits of the device type."""
    transport: int
    """Bits of the transport and the rings."""
    protocol: int
    """Bits of the protocol."""
    gpu_socket: bool
    """Whether it takes GPU_SET_SOCKET, for which there is no bit."""
    shared_memory: Mapping[int, int]
    """Bytes of each shared memory region, by its index."""


class ConfigStorage:
    """The bytes of the configuration space, in step with the core's while the device is served."""

    def __init__(self, device: Device) -> None:
        self.space = device._layout.initial()
        #: Another one after each change.
        self.version = 0
        self._backend: Backend | None = None
        self._lock = threading.Lock()
        self._quiet = 0

    def attach(self, backend: Backend | None) -> None:
        self._backend = backend

    def leave_to_parent(self) -> None:
        """This process was forked: a thread that it does not have may hold the lock."""
        self._lock = threading.Lock()
        self._quiet = 0

    def read(self, offset: int, size: int) -> bytes:
        with self._lock:
            return bytes(self.space[offset : offset + size])

    def write(self, offset: int, data: bytes, *, notify: bool = True) -> None:
        with self._lock:
            self.space[offset : offset + len(data)] = data
            self.version += 1
            if self._backend:
                self._backend.config_write(offset, data)
        if notify and not self._quiet:
            self._notify()

    @contextlib.contextmanager
    def update(self) -> Iterator[None]:
        with self._lock:
            self._quiet += 1
        before = bytes(self.space)
        try:
            yield
        finally:
            with self._lock:
                self._quiet -= 1
            if bytes(self.space) != before:
                self._notify()

    def _notify(self) -> None:
        if self._backend:
            self._backend.config_changed()


#: Those that are being served.
_SERVED: weakref.WeakSet[Runtime] = weakref.WeakSet()


def _on_fork() -> None:
    for runtime in list(_SERVED):
        runtime.leave_to_parent()
    _SERVED.clear()


os.register_at_fork(after_in_child=_on_fork)


class Conductor(Protocol):
    """Lets a device live in a time of its own."""

    def loop(self, backend: Backend) -> Loop: ...

    def postpones(self, index: int) -> bool:
        """Whether what is available on a queue is to be looked at later."""
        ...


class Runtime:
    """Everything of a device that is not its author's business."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.config = ConfigStorage(device)
        self.negotiated = 0
        self.address: Address | None = None
        self._queues: dict[Queue, list[DeviceQueue]] | None = None
        self._backend: Backend | None = None
        self._serving = threading.Lock()
        self._stopped = threading.Event()
        self._listener: socket.socket | None = None
        self._watch: Watch | None = None
        self._waiting: socket.socket | None = None
        self._patience: Timer | None = None
        self._once = False
        self._asyncio: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._transfer: Transfer | None = None
        #: Who decides when this device does something, if it is not the device's own thread.
        self.conductor: Conductor | None = None
        #: What drivers can bring about as often as they like.
        self._failures = Complaints()
        self._breakages = Complaints()
        #: The threads that may be in a handler, and whether it was said that one of them does not return.
        self._threads: list[threading.Thread] = []
        self._reminded = False
        #: What ended the only connection that there was to be.
        self._failure: Exception | None = None

    # --- For the device ---------------------------------------------------------------------------------------------

    def queues_of(self, declaration: Queue) -> list[DeviceQueue]:
        if self._queues is None:
            self._queues = dict(queues.build(self.device, self.device._queues))
        return self._queues[declaration]

    @property
    def queues(self) -> list[DeviceQueue]:
        return [queue for declaration in self.device._queues for queue in self.queues_of(declaration)]

    @property
    def loop(self) -> Loop:
        if self._backend is None:
            raise StateError(f"{self._name} is not served: use its loop from on_start() on")
        return self.conductor.loop(self._backend) if self.conductor else Loop(self._backend)

    @property
    def connected(self) -> bool:
        return self._backend is not None and self._backend.connected

    @property
    def has_coroutines(self) -> bool:
        cls = type(self.device)
        return any(is_coroutine_function(getattr(cls, name)) for name in self.device._handlers.values())

    @property
    def _name(self) -> str:
        return type(self.device).__name__

    # --- Serving ----------------------------------------------------------------------------------------------------

    def serve(self, endpoint: Endpoint, once: bool, ready: Callable[[], None] = lambda: None) -> None:
        """Serve on this thread."""
        with self._served(endpoint, once) as backend:
            ready()
            try:
                backend.run()
            except BaseException:
                # Ctrl-C, or an exception that means the end: what was begun is finished before it goes on.
                if not backend.forked:
                    backend.stop()
                    backend.run()
                raise

    async def serve_async(self, endpoint: Endpoint, once: bool, ready: Callable[[], None] = lambda: None) -> None:
        """Serve within the running asyncio loop."""
        import asyncio

        loop = asyncio.get_running_loop()
        ended = loop.create_future()
        with self._served(endpoint, once) as backend:
            self._asyncio = loop

            def dispatch() -> None:
                try:
                    goes_on = backend.dispatch(0)
                except BaseException as error:
                    if not ended.done():
                        ended.set_exception(error)
                    return
                if not goes_on and not ended.done():
                    ended.set_result(None)
                elif backend.busy:
                    loop.call_soon(dispatch)

            loop.add_reader(backend.fileno(), dispatch)
            try:
                ready()
                try:
                    await asyncio.shield(ended)
                except BaseException:
                    if not backend.forked and (not ended.done() or ended.exception()):
                        ended = loop.create_future()
                        backend.stop()
                        await ended
                    raise
            finally:
                if not backend.forked:
                    loop.remove_reader(backend.fileno())
                self._asyncio = None

    def stop(self) -> None:
        backend = self._backend
        if backend is not None:
            backend.stop()

    @contextlib.contextmanager
    def _served(self, endpoint: Endpoint, once: bool) -> Iterator[Backend]:
        serving = self._serving
        if not serving.acquire(blocking=False):
            raise StateError(f"{self._name} is being served already; make another instance, or stop it first")
        try:
            # Once it is open, a descriptor that was given away is closed whatever happens.
            with endpoint.open() as (listener, connection, address):
                backend = self._make_backend()
                self._failures, self._breakages = Complaints(), Complaints()
                self._threads, self._reminded = [threading.current_thread()], False
                self._once = once or listener is None
                self._attach(backend)
                self.address = address
                _SERVED.add(self)
                try:
                    self.device.on_start()
                    with self._workers(backend):
                        if connection is not None:
                            self._connect(connection)
                        if listener is not None:
                            self._listener = listener
                            self._listen()
                        yield backend
                finally:
                    if not backend.forked:
                        self._clean_up()
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure
        finally:
            self._failure = None
            serving.release()

    def _clean_up(self) -> None:
        _SERVED.discard(self)
        self._stop_listening()
        self._refuse_waiting("the device was stopped")
        self._listener = None
        self.address = None
        if self._transfer is not None:
            self._transfer.cancel()
            self._transfer.join(PATIENCE)
            self._transfer = None
        self._attach(None)
        self._threads = []
        self.device.on_stop()

    def leave_to_parent(self) -> None:
        """In a child that was forked while the device was served: it is not served here, and may be."""
        self._serving = threading.Lock()
        self._listener = self._watch = self._waiting = self._patience = self._transfer = self._asyncio = None
        self._tasks = set()
        self._threads = []
        self._failure = self.address = None
        self.negotiated = 0
        self.config.leave_to_parent()
        for queue in self.queues:
            queue._leave_to_parent()
        self._attach(None)

    @contextlib.contextmanager
    def _workers(self, backend: Backend) -> Iterator[None]:
        """The threads beside the loop's. At exit the interpreter must not wait for them before it stops the server."""
        threads = [
            threading.Thread(target=backend.work, args=(at,), name=f"vhost-user {self._name} worker {at}", daemon=True)
            for at in range(self.device.workers)
        ]
        started: list[threading.Thread] = []
        try:
            for thread in threads:
                thread.start()
                started.append(thread)
            self._threads = [*self._threads, *started]
            yield
        finally:
            if not backend.forked:
                self._end_workers(backend, started)

    def _end_workers(self, backend: Backend, started: list[threading.Thread]) -> None:
        backend.stop_workers()
        self._threads = started
        since = time.monotonic()
        for thread in started:
            thread.join(max(since + STOP_REMINDER - time.monotonic(), 0))
            if thread.is_alive():
                self.remind_of_handlers()
            thread.join()

    def remind_of_handlers(self) -> None:
        """Say, once, what keeps a device from stopping that was told to :data:`STOP_REMINDER` seconds ago."""
        if self._reminded:
            return
        self._reminded = True
        frames = sys._current_frames()
        stacks = [_foreign_calls(frames[thread.ident]) for thread in self._threads if thread.ident in frames]
        calls = "and what it waits for:\n".join("".join(traceback.format_list(stack)) for stack in stacks if stack)
        logger.warning(
            "%s: it was told to stop %g s ago, and waits for a handler or hook to return (requests in flight: %s)%s",
            self._name,
            STOP_REMINDER,
            ", ".join(f"{queue.in_flight} on queue {queue.index}" for queue in self.queues if queue.in_flight)
            or "none",
            f":\n{calls}".rstrip() if calls else "",
        )

    def _check_workers(self) -> None:
        device = self.device
        if not 0 <= device.workers <= len(self.queues):
            raise DeclarationError(
                f"{self._name}.workers is {device.workers}; there can be 0 to {len(self.queues)}, one for each queue"
            )
        if not device.workers:
            return
        if self.has_coroutines:
            raise DeclarationError(f"{self._name} has async handlers, which run in the asyncio loop: workers must be 0")
        if self.conductor:
            raise DeclarationError(
                f"{self._name} is in a simulation, where one thing happens at a time: workers must be 0"
            )

    def _make_backend(self) -> Backend:
        device = self.device
        if not hasattr(type(device), "device_id"):
            raise DeclarationError(f"class {self._name}(vu.Device, device_id=…): the device id is missing")
        features = int(device.features)
        if features < 0 or features >> 64:
            raise DeclarationError(f"{self._name}.features is {features:#x}; feature words have 64 bits")
        reserved = features & RESERVED_FEATURES
        if reserved:
            raise DeclarationError(
                f"{self._name}.features has {reserved:#x}: bits 24 to 41 belong to the transport, which sets them"
            )
        devices_queues = self.queues
        if not devices_queues:
            raise DeclarationError(f"{self._name} declares no queue: write `requestq = vu.Queue()` in the class")
        if len(devices_queues) > 256:
            raise DeclarationError(f"{self._name} has {len(devices_queues)} queues; vhost-user can name 256")
        self._check_workers()
        sizes = [queues.MAX_SIZE] * len(devices_queues)
        limits = [queue.max_request for queue in devices_queues]
        transport = self._transport_features()
        offer = Offer(features, transport, self._protocol_features(), device._takes_gpu_socket, device._shared_memory())
        handlers = self._bound_handlers()
        backend = Backend(self, sizes, limits, handlers, offer, bytes(self.config.space), device.workers)
        # Kicks that are messages can be suppressed no more than virtual time can pass.
        backend.set_busy_poll(0.0 if self.conductor or device.in_band else device.busy_poll)
        backend.set_patience(device.batch_patience)
        return backend

    def _transport_features(self) -> int:
        """Those that only some devices offer."""
        wanted = {
            TransportFeature.ACCESS_PLATFORM: self.device.iommu,
            TransportFeature.RING_PACKED: self.device.packed_rings,
            TransportFeature.IN_ORDER: self.device.in_order,
        }
        return sum(int(feature) for feature, is_wanted in wanted.items() if is_wanted)

    def _protocol_features(self) -> int:
        """Likewise."""
        wanted = {
            ProtocolFeature.INBAND_NOTIFICATIONS: self.device.in_band,
            ProtocolFeature.CROSS_ENDIAN: self.device.cross_endian,
            ProtocolFeature.PAGEFAULT: self.device.postcopy,
        }
        return sum((int(feature) for feature, is_wanted in wanted.items() if is_wanted), int(self.device._offers))

    def _bound_handlers(self) -> list[Callable[[Request], object] | BatchHandler | None]:
        """What takes the requests of each queue."""
        return [
            self._handler_of(declaration) for declaration in self.device._queues for _ in self.queues_of(declaration)
        ]

    def _handler_of(self, declaration: Queue) -> Callable[[Request], object] | BatchHandler | None:
        each = self._handler(self.device._handlers.get(declaration))
        together = self.device._batch_handlers.get(declaration)
        blocks = self.device._blocks.get(declaration)
        if together is None and (blocks is None or each is None):
            return each
        bound = [None if name is None else getattr(self.device, name) for name in (together, blocks)]
        return BatchHandler(bound[0], each, bound[1])

    def _handler(self, name: str | None) -> Callable[[Request], object] | None:
        if name is None:
            return None
        method = getattr(self.device, name)
        if not is_coroutine_function(method):
            return method  # type: ignore[no-any-return]

        def begin(request: Request) -> None:
            task = self._running_loop().create_task(self._finish(request.detach(), method(request)))
            # The loop itself keeps only weak references.
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        return begin

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._asyncio is None:
            raise StateError(f"{self._name} has an async handler but no asyncio loop")
        return self._asyncio

    async def _finish(self, request: Request, work: Coroutine[Any, Any, object]) -> None:
        try:
            await work
        except Exception as error:
            self.request_failed(request.queue, request, error)
        finally:
            if not request.completed:
                request.complete()

    def _attach(self, backend: Backend | None) -> None:
        self._backend = backend
        self.config.attach(backend)
        for queue in self.queues:
            queue._attach(backend)

    # --- New code ---------------------------------------------------------------------------------------------------

    def change_class(self, new_class: type[Device], changed: Future[None]) -> None:
        """Make the device an instance of `new_class` on the thread of its loop, between two requests.

        Coroutines that are under way are finished first, with the code that they began with: for a moment no other is
        begun. What is available meanwhile stays in the rings.
        """
        backend = self._backend
        if backend is None:
            self._change_class_now(new_class, changed)
        else:
            backend.call_soon(lambda: self._change_class_when_idle(backend, new_class, changed))

    def _change_class_when_idle(self, backend: Backend, new_class: type[Device], changed: Future[None]) -> None:
        if not self._tasks:
            self._change_class_now(new_class, changed)
            return

        def change(_task: asyncio.Task[None] | None = None) -> None:
            if not changed.done() and (_task is None or not self._tasks):
                timer.cancel()
                self._change_class_now(new_class, changed)

        backend.set_handlers([None] * len(self.queues))
        timer = Timer(backend, PATIENCE, change)
        for task in self._tasks:
            task.add_done_callback(change)

    def _change_class_now(self, new_class: type[Device], changed: Future[None]) -> None:
        wanted = changed.set_running_or_notify_cancel()
        failure = self._try_class(new_class) if wanted else None
        if self._backend is not None:
            self._backend.set_handlers(self._bound_handlers())
        if failure is not None:
            changed.set_exception(failure)
        elif wanted:
            changed.set_result(None)

    def _try_class(self, new_class: type[Device]) -> BaseException | None:
        """Returns why it has to be the old class again."""
        device, old_class, old_queues = self.device, type(self.device), self._queues
        try:
            if self._backend is not None and device.workers:
                raise DeclarationError("its workers may be in the middle of the old code; restart the device")
            before = self._declaration()
            # Other threads may push meanwhile: the queues are found by the declarations of both classes.
            kept = dict(zip(new_class._queues, map(self.queues_of, old_class._queues), strict=False))
            self._queues = {**(self._queues or {}), **kept}
            try:
                device.__class__ = new_class
            except TypeError as error:
                raise DeclarationError(f"a {old_class.__name__} cannot become one of the new class: {error}") from None
            self._check_unchanged(before)
            device.on_reload(old_class)
        except BaseException as error:
            device.__class__ = old_class
            self._queues = old_queues
            return error
        self._queues = kept
        for declaration, built in kept.items():
            for queue in built:
                queue._backlog_limit = declaration.backlog
        return None

    def _declaration(self) -> dict[str, object]:
        """What the driver was told, and cannot be told again."""
        device = self.device
        return {
            "device_id": int(device.device_id),
            "features": f"{int(device.features):#x}",
            "transport features": f"{self._transport_features():#x}",
            "protocol features": f"{self._protocol_features():#x}",
            "queues": [queue.name for _, built in queues.build(device, device._queues) for queue in built],
            "max_request": [declaration.max_request for declaration in device._queues],
            "configuration space": [f"{field.name} at {field.offset}" for field in device._layout.fields],
            "bytes of configuration space": device._layout.size,
        }

    def _check_unchanged(self, before: dict[str, object]) -> None:
        for what, now in self._declaration().items():
            if now != before[what]:
                raise DeclarationError(
                    f"{what}: {now} instead of {before[what]}, which a running driver cannot be told"
                )
        if self.has_coroutines and self._backend is not None and self._asyncio is None:
            raise DeclarationError("async handlers need asyncio, which the device was started without; restart it")

    # --- Connections ------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        if self._listener is not None:
            self._watch = Watch(self.backend, self._listener.fileno(), self._accept, read=True, write=False)

    def _stop_listening(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()

    def _accept(self) -> None:
        if self._listener is None:
            return
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # Without descriptors, say. The front-end stays where it is: the listener would be ready again at once.
            text = "%s: a front-end could not be accepted: %s; trying again in %g s"
            report(logger, self._failures, text, self._name, error, PATIENCE)
            self._stop_listening()
            Timer(self.backend, PATIENCE, self._listen)
            return
        if not self.connected:
            self._connect(connection)
        elif self._waiting is None and not self._once:
            # The first one may be gone without our having read it yet.
            self._waiting = connection
            self._patience = Timer(self.backend, PATIENCE, lambda: self._refuse_waiting("another one is connected"))
        else:
            self._refuse(connection, "another one is connected")

    def _connect(self, connection: socket.socket) -> None:
        logger.info("%s: a front-end connected", self._name)
        self.backend.connect(connection.detach())
        try:
            self.device.on_connect()
        except Exception as error:
            self.callback_failed("on_connect", error)

    def _refuse_waiting(self, why: str) -> None:
        waiting = self._take_waiting()
        if waiting is not None:
            self._refuse(waiting, why)

    def _take_waiting(self) -> socket.socket | None:
        """The front-end that waits, which nobody is impatient with any more."""
        waiting, self._waiting = self._waiting, None
        patience, self._patience = self._patience, None
        if patience is not None:
            patience.cancel()
        return waiting

    def _refuse(self, connection: socket.socket, why: str) -> None:
        logger.warning("%s: a front-end was turned away: %s; a device serves one at a time", self._name, why)
        connection.close()

    @property
    def backend(self) -> Backend:
        if self._backend is None:
            raise StateError(f"{self._name} is not served")
        return self._backend

    # --- From the core ----------------------------------------------------------------------------------------------

    def session_ended(self, error: Exception | None) -> None:
        self.negotiated = 0
        if error is None:
            logger.info("%s: the front-end disconnected", self._name)
        else:
            logger.error("%s: the connection was closed: %s", self._name, error)
        try:
            self.device.on_disconnect(error)
        finally:
            if self._once:
                self._failure = error
                self.stop()
            elif waiting := self._take_waiting():
                self._connect(waiting)

    def features_negotiated(self, features: int) -> None:
        self.negotiated = features
        self.device.on_features(features)

    def queue_started(self, index: int) -> None:
        self.device.on_queue_start(self.queues[index])

    def queue_stopping(self, index: int) -> None:
        self.device.on_queue_stop(self.queues[index])

    def queue_broke(self, index: int, error: str) -> None:
        report(logger, self._breakages, "%s: queue %d: %s; the queue is stopped", self._name, index, error)
        self.device.on_queue_error(self.queues[index], error)

    def buffers_available(self, index: int) -> None:
        if self.conductor and self.conductor.postpones(index):
            return
        queue = self.queues[index]
        queue._on_buffers()
        self.device.on_buffers(queue)

    def config_written(self, offset: int, data: bytes) -> None:
        device, storage = self.device, self.config
        fields = device._layout.touched(offset, len(data))
        if offset + len(data) > len(storage.space) or not fields:
            size = len(storage.space)
            raise VhostUserError(
                f"bytes {offset}..{offset + len(data)} are outside the {size} of the configuration space"
            )
        for field in fields:
            if not field.writable:
                # QEMU writes the whole space back when a driver changes a byte of it.
                continue
            before = storage.read(field.offset, field.size)
            after = bytearray(before)
            for at in range(max(offset, field.offset), min(offset + len(data), field.offset + field.size)):
                after[at - field.offset] = data[at - offset]
            storage.write(field.offset, bytes(after), notify=False)
            try:
                self._call_config_hooks(field, field.decode(before), field.decode(bytes(after)))
            except Exception:
                # The driver is told that the write was refused: nothing came of it.
                storage.write(field.offset, before, notify=False)
                raise

    def _call_config_hooks(self, field: Field[Any], old: Any, new: Any) -> None:
        hook = self.device._field_hooks.get(field.name)
        if hook is not None:
            getattr(self.device, hook)(old, new)
        self.device.on_config_write(field, old, new)

    def extension(self, method: str, *arguments: object) -> object:
        """A method of one of the classes in :mod:`vhost_user.extensions`, from which the device is derived."""
        return getattr(self.device, method)(*arguments)

    def begin_transfer(self, saves: bool, fd: int) -> None:
        if self._transfer is not None and not self._transfer.ended:
            os.close(fd)
            raise StateError(f"{self._name} is still busy with the state of the last migration")
        backend = self.backend
        # Whatever is called soon makes the loop ask what became of it.
        self._transfer = Transfer(self.device, saves, fd, self._failures, lambda: backend.call_soon(lambda: None))

    def transferred(self) -> str | None:
        transfer = self._transfer
        if transfer is None or not transfer.ended:
            return None
        self._transfer = None
        transfer.join(PATIENCE)
        return transfer.failure or ""

    def abandon_transfer(self) -> None:
        if self._transfer is not None:
            self._transfer.cancel()

    def device_reset(self) -> None:
        self.device.on_reset()

    def request_failed(self, index: int, request: Request, error: BaseException) -> None:
        text = "%s: queue %d: the handler failed on %r"
        report(logger, self._failures, text, self._name, index, request, error=error)
        if request.completed:
            return
        try:
            self.device.on_request_error(request, error)
        except Exception as second:
            text = "%s: queue %d: on_request_error failed, too"
            report(logger, self._failures, text, self._name, index, error=second)

    def callback_failed(self, what: str, error: BaseException) -> None:
        report(logger, self._failures, "%s: %s failed", self._name, what, error=error)


def _foreign_calls(frame: FrameType) -> list[traceback.FrameSummary]:
    """Of what a thread is doing, the calls behind those of this module, or of a thread's own beginning."""
    stack = traceback.extract_stack(frame)
    ours = [at for at, call in enumerate(stack) if call.filename == __file__ or _is_beginning(call)]
    return stack[ours[-1] + 1 :] if ours else list(stack)


def _is_beginning(call: traceback.FrameSummary) -> bool:
    return call.filename == threading.__file__ and call.name == "run"


#: Bits of the transport and the rings. Virtio 1.3, section 6.
RESERVED_FEATURES = ((1 << 42) - 1) & ~((1 << 24) - 1)
