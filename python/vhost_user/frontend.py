"""The driver's half: connect to any vhost-user back-end, and be its driver.

    with vu.Frontend.connect("/tmp/rng.sock") as frontend:
        queue = frontend.negotiate().queue(0)
        print(queue.submit(writable=16).wait())

Nothing that the back-end does makes a call wait beyond its deadline, or reads outside the memory that it was given.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

from . import _core
from ._core import DirtyLog, InflightRecord, Memory, ProtocolFeature, TransportFeature
from ._state_stream import CHUNK, StateStream
from .errors import PeerClosed, PeerTimeout, ProtocolError, StateError, StateTooLong, VhostUserError
from .loop import HasFileno
from .postcopy import Postcopy
from .queues import Buffer
from .server import Endpoint, PathLike

if TYPE_CHECKING:
    from uuid import UUID

    from _typeshed import SupportsWrite

    from .extensions.crypto import AsymmetricSession, SymmetricSession
    from .extensions.gpu import ScreenServer

#: Seconds that an answer may take, and a request, unless somebody says otherwise.
TIMEOUT = 5.0

#: Bytes of guest memory, unless somebody says otherwise.
MEMORY_SIZE = 16 << 20

#: Bytes of a device's own state that are taken, unless somebody says otherwise.
STATE_LIMIT = 64 << 20

#: Feature bits of the transport and the rings, and those of them that this driver implements.
TRANSPORT_FEATURES = (1 << 42) - (1 << 24)
RING_FEATURES = int(
    TransportFeature.VERSION_1
    | TransportFeature.INDIRECT_DESC
    | TransportFeature.EVENT_IDX
    | TransportFeature.RING_PACKED
    | TransportFeature.IN_ORDER
)

#: How long a thread that runs callbacks is kept for more of them.
LINGER = 1.0
SLICE = 0.1

logger = logging.getLogger(__name__)


class Event(NamedTuple):
    """What a back-end said unasked, on the channel that it has for that."""

    kind: Literal["config_changed", "host_notifier", "shared_object", "shared_memory", "refused", "channel_closed"]
    """The configuration space has changed; or a host notifier, the shared objects, or what is mapped in shared memory;
    or a request could not be served; or there will be no more of them."""
    detail: str
    """Which of them; or why."""


class Frontend:
    """The driver's end of a connection to a back-end.

    Takes over `connection`, a connected AF_UNIX stream socket. `timeout` is how many seconds the answer to a message
    may take, and a request, unless one says otherwise. Every method may be called from any thread. Leaving its ``with``
    block closes it.

    Every method that exchanges messages may raise:
        PeerTimeout: the answer is late. The session is over: what comes next could not be told apart from it.
        PeerClosed: the back-end closed the connection.
        ProtocolError: the answer makes no sense, which ends the session; or the back-end refused the message.
        StateError: the session is over, or the message needs a feature that was not negotiated.
    """

    def __init__(self, connection: socket.socket, *, timeout: float = TIMEOUT) -> None:
        self.timeout = timeout
        self.offered_features = 0
        """What the device offers, from :meth:`negotiate` on."""
        self.offered_protocol = ProtocolFeature(0)
        """What the back-end offers of the protocol's own features, likewise."""
        self.queue_count: int | None = None
        """How many queues the back-end has, if it tells; network devices may count pairs."""
        self._reopen: Callable[[], socket.socket] | None = None
        self._open_session: _core.Frontend | None = None
        self._agreed: tuple[int, ProtocolFeature] | None = None
        self._inflight: InflightRecord | None = None
        self._memories: tuple[Memory, ...] = ()
        #: The device's own mapping keeps a log that was forgotten here.
        self._log: DirtyLog | None = None
        self._log_all = False
        self._postcopy: Postcopy | None = None
        self._queues: dict[int, DriverQueue] = {}
        self._ready = False
        self._open_session = _core.Frontend(connection.detach(), timeout)

    @classmethod
    def connect(cls, path: PathLike, *, timeout: float = TIMEOUT) -> Self:
        """Connect to a back-end that listens at `path`.

        Raises:
            OSError: nobody listens there.
            PeerTimeout: as many others as may wait there already, and none was accepted within `timeout` seconds.
        """

        def open_socket() -> socket.socket:
            deadline = time.monotonic() + timeout
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(timeout)
            while True:
                try:
                    connection.connect(str(path))
                except BlockingIOError:
                    # Nothing can be polled for until there is room.
                    if time.monotonic() < deadline:
                        time.sleep(0.005)
                        continue
                    connection.close()
                    raise PeerTimeout(
                        f"{path}: the back-end accepted no connection within {timeout} s; is it busy with others?"
                    ) from None
                except OSError as error:
                    connection.close()
                    raise type(error)(error.errno, error.strerror, str(path)) from None
                return connection

        return cls._opened(open_socket, timeout)

    @classmethod
    def listen(cls, path: PathLike, *, timeout: float = TIMEOUT) -> Self:
        """Listen at `path` until a back-end connects, for up to `timeout` seconds.

        Raises:
            PeerTimeout: none did.
            AddressInUse: somebody else listens there, or it is not a socket.
        """

        def open_socket() -> socket.socket:
            with Endpoint(path=path).open() as (listener, _, _):
                assert listener is not None
                listener.settimeout(timeout)
                try:
                    return listener.accept()[0]
                except TimeoutError:
                    raise PeerTimeout(f"{path}: no back-end connected within {timeout} s") from None

        return cls._opened(open_socket, timeout)

    @classmethod
    def _opened(cls, open_socket: Callable[[], socket.socket], timeout: float) -> Self:
        frontend = cls(open_socket(), timeout=timeout)
        frontend._reopen = open_socket
        return frontend

    # --- The session ------------------------------------------------------------------------------------------------

    def negotiate(
        self, features: int | None = None, protocol: ProtocolFeature | None = None, *, iommu: bool = False
    ) -> Self:
        """Everything up to where queues can be made: agree on features, and open the back-end's channel.

        `features` are those of the device and of the rings, `protocol` those of the protocol: exactly these are
        accepted, and PROTOCOL_FEATURES where it is offered. By default it is everything that both sides know, and of
        the features of the device type all that are offered; but INBAND_NOTIFICATIONS, which makes every kick wait for
        the back-end, GPA_ADDRESSES and PAGEFAULT only when asked for. With `iommu`, ACCESS_PLATFORM is accepted as
        well: the device gets I/O addresses, see :meth:`io_address`. vhost-user specification, "Communication".

        Raises:
            StateError: something was asked for that is not offered.
        """
        session = self._session
        # With GPA_ADDRESSES a back-end that takes one kind of address for the other gets away with it.
        unasked = ProtocolFeature.INBAND_NOTIFICATIONS | ProtocolFeature.GPA_ADDRESSES | ProtocolFeature.PAGEFAULT
        by_default = ~unasked & (1 << 64) - 1
        offer = session.handshake(by_default if protocol is None else protocol)
        self.offered_features, self.queue_count = offer[0], offer[2]
        self.offered_protocol = ProtocolFeature(offer[1])
        missing = ProtocolFeature(0 if protocol is None else int(protocol) & ~session.protocol_features)
        if missing:
            raise StateError(
                f"{missing!r} is not offered, or not implemented here; {self.offered_protocol!r} is offered"
            )
        known = ~TRANSPORT_FEATURES | RING_FEATURES
        chosen = self.offered_features & known if features is None else int(features)
        chosen |= TransportFeature.ACCESS_PLATFORM if iommu else 0
        if chosen & ~self.offered_features:
            raise StateError(
                f"the features {chosen & ~self.offered_features:#x} are not offered; {self.offered_features:#x} are"
            )
        session.set_features(chosen | self.offered_features & TransportFeature.PROTOCOL_FEATURES)
        self._agreed = self.features, self.protocol
        return self

    @property
    def features(self) -> int:
        """The feature bits that were negotiated."""
        return self._session.features

    @property
    def protocol(self) -> ProtocolFeature:
        """The protocol features that were negotiated."""
        return ProtocolFeature(self._session.protocol_features)

    def status(self) -> int:
        """The device status. Virtio 1.3, section 2.1. Needs the protocol feature STATUS."""
        return self._session.status()

    def set_status(self, status: int) -> None:
        """Set the device status. :meth:`negotiate` and :meth:`queue` do what a driver usually does."""
        self._session.set_status(status)

    def reset(self) -> None:
        """Bring the device back to its initial state, and agree on the same features again.

        Its queues are gone, and requests on them fail: make new ones. Virtio 1.3, section 2.4.
        """
        features = self.features
        self._session.reset()
        self._end_queues("the device was reset")
        self._session.set_features(features)

    def reconnect(self, *, keep_queues: bool = False) -> None:
        """Close the connection, open another one in the same way, and agree on the same features.

        Guest memory is shared again, with what is in it. Queues are gone, and requests on them fail: make new ones.

        With `keep_queues` they go on: those that ran are started again, and requests that are under way complete. That
        is for a back-end that died. The in-flight record tells the next one what it had begun, see
        :meth:`set_inflight`; without it the next one begins where the used ring ends, which loses requests, or does
        them twice, unless they are completed in order. vhost-user specification, "Inflight I/O tracking".

        Raises:
            StateError: the front-end was made from a socket.
            OSError: nobody listens there now. With `keep_queues`, try again later.
            PeerClosed: the back-end died again; likewise.
        """
        if self._reopen is None:
            raise StateError("a front-end that was given its socket cannot open another one")
        if keep_queues:
            for queue in self.queues:
                queue._survives = True
            self._session.close()
        features, protocol = self._agreed or (self.features & ~TransportFeature.LOG_ALL, self.protocol)
        self._log, self._log_all = None, False
        if not keep_queues:
            self.close()
            self._inflight = None
        self._open_session = _core.Frontend(self._reopen().detach(), self.timeout)
        self._ready = False
        self.negotiate(features, protocol)
        if self._memories:
            self.share(*self._memories)
        if self._inflight is not None:
            self._session.set_inflight(self._inflight)
        for queue in self.queues:
            queue._move_to(self._session)
        if any(queue.running for queue in self.queues):
            self._set_ready()

    def exchange(self, request: str, payload: Buffer = b"", descriptors: Sequence[int] = ()) -> bytes | None:
        """Send any message at any time, as in ``exchange("SET_VRING_NUM", struct.pack("=II", 0, 256))``.

        Returns the payload of the answer, None if the protocol asks for none. Nothing is checked, and what the other
        methods know of the session does not change. vhost-user specification, "Front-end message types".

        Raises:
            ValueError: there is no request of this name.
        """
        return self._session.exchange(request, bytes(payload), descriptors)

    def close(self) -> None:
        """Close the connection. Whoever waits for a request gets a StateError, for a message PeerClosed.

        In a child that was forked the connection is only let go of: it stays the parent's.
        """
        session, self._open_session = self._open_session, None
        if session is not None and session.forked:
            self._postcopy, self._queues = None, {}
            return
        if self._postcopy is not None:
            self._postcopy._stop()
            self._postcopy = None
        queues = self._end_queues("the front-end was closed")
        if session is not None:
            session.close()
        for queue in queues:
            queue._quit_watcher()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._open_session is None

    def fileno(self) -> int:
        """The descriptor of the connection."""
        return self._session.fileno()

    @property
    def _session(self) -> _core.Frontend:
        if self._open_session is None:
            raise StateError("the front-end was closed")
        return self._open_session

    # --- Configuration space ----------------------------------------------------------------------------------------

    def read_config(self, size: int, offset: int = 0) -> bytes:
        """Read `size` bytes of the configuration space, at most 4084. Virtio 1.3, section 2.5."""
        return self._session.get_config(offset, size)

    def write_config(self, data: Buffer, offset: int = 0) -> None:
        """Write to the configuration space."""
        self._session.set_config(offset, bytes(data))

    def next_event(self, timeout: float | None = None) -> Event | None:
        """What the back-end says unasked: the next of it, or None if there is nothing for `timeout` seconds.

        The back-end's channel is served while somebody waits here, for an answer, or for a request.
        """
        event = self._session.next_event(self.timeout if timeout is None else timeout)
        return Event(*event) if event else None  # type: ignore[arg-type]

    def wait_config_change(self, timeout: float | None = None) -> None:
        """Wait until the back-end says that the configuration space has changed; other events are passed over.

        A back-end says so only while one of its queues runs.

        Raises:
            PeerTimeout: it did not say so for `timeout` seconds.
        """
        wanted = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + wanted
        while event := self.next_event(max(0.0, deadline - time.monotonic())):
            if event.kind == "config_changed":
                return
        raise PeerTimeout(f"the back-end announced no change of the configuration within {wanted} s")

    # --- What only some devices have --------------------------------------------------------------------------------

    def send_rarp(self, mac: bytes) -> None:
        """Let a network device announce the guest's address, of 6 bytes, to the network. Needs RARP."""
        self._session.send_rarp(mac)

    def set_mtu(self, mtu: int) -> None:
        """Tell a network device how many bytes its packets have. Needs NET_MTU, and F_MTU of the device."""
        self._session.set_mtu(mtu)

    def create_crypto_session(self, session: SymmetricSession | AsymmetricSession) -> int:
        """Create a session of a crypto device. Returns its number. Needs CRYPTO_SESSION.

        Raises:
            ValueError: a key is too long.
        """
        return self._session.create_crypto_session(session.operation, session.pack())

    def close_crypto_session(self, number: int) -> None:
        """Close a session of a crypto device. Needs CRYPTO_SESSION."""
        self._session.close_crypto_session(number)

    @property
    def shared_memory(self) -> dict[int, int]:
        """Bytes of each shared memory region of the device, by its index. Virtio 1.3, section 2.10. Needs SHMEM."""
        return self._session.shared_memory()

    def mappings(self, region: int) -> list[tuple[int, int, bool]]:
        """Where the back-end has mapped something in a shared memory region: offset, size, and whether it is writable.

        Needs SHMEM.
        """
        return self._session.mappings(region)

    def read_shared_memory(self, region: int, offset: int, size: int) -> bytes:
        """Read from a shared memory region.

        Raises:
            StateError: not all of it is in one mapping.
        """
        return self._session.read_shared_memory(region, offset, size)

    def write_shared_memory(self, region: int, offset: int, data: Buffer) -> None:
        """Write to a shared memory region.

        Raises:
            StateError: not all of it is in one mapping, or that is not writable.
        """
        self._session.write_shared_memory(region, offset, bytes(data))

    @property
    def host_notifiers(self) -> list[int]:
        """The queues that the back-end has given a page for, to be notified by. Needs HOST_NOTIFIER."""
        return self._session.host_notifiers()

    def notify_host(self, queue: int) -> None:
        """Notify a queue by the page that the back-end has given for it.

        Raises:
            StateError: it has given none.
        """
        self._session.notify_host(queue)

    @property
    def shared_objects(self) -> set[UUID]:
        """The objects that the back-end shares. Needs SHARED_OBJECT."""
        from uuid import UUID

        return {UUID(bytes=uuid) for uuid in self._session.shared_objects()}

    def get_shared_object(self, uuid: UUID) -> int | None:
        """The file of an object of the back-end, as a descriptor that the caller owns; None if it does not have it."""
        return self._session.get_shared_object(uuid.bytes)

    def provide_shared_object(self, uuid: UUID, file: int | HasFileno) -> None:
        """Let the back-end look up an object of somebody else, by a copy of the descriptor of `file`.

        Raises:
            StateError: the back-end itself shares an object of this name.
        """
        self._session.provide_shared_object(uuid.bytes, file if isinstance(file, int) else file.fileno())

    def open_screen(self) -> ScreenServer:
        """Give a device that draws a socket to draw on, and return its other end. vhost-user-gpu specification."""
        from .extensions.gpu import ScreenServer

        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._session.set_gpu_socket(theirs.fileno())
            except BaseException:
                ours.close()
                raise
        return ScreenServer(ours, timeout=self.timeout)

    # --- Memory -----------------------------------------------------------------------------------------------------

    def share(self, *memories: Memory) -> None:
        """Share these memories with the back-end, and no others any more. Queues are put into the first.

        Without a call, 16 MiB are shared with the first queue. With the protocol feature CONFIGURE_MEM_SLOTS only what
        changed is said, by ADD_MEM_REG and REM_MEM_REG; otherwise it is SET_MEM_TABLE. A queue whose memory is not
        shared any more breaks: stop it before.

        Raises:
            StateError: the back-end does not take so many regions.
        """
        self._session.share(memories)
        self._memories = memories

    @property
    def memory(self) -> Memory:
        """The memory that queues are put into."""
        if not self._memories:
            self.share(Memory(MEMORY_SIZE))
        return self._memories[0]

    def postcopy(self, *memories: Memory, page: Callable[[int], Buffer]) -> Postcopy:
        """Share memories of which the back-end has nothing yet: it gets each page of 4096 bytes when it touches it.

        `page` is called with the guest address of each page that is missing, in a thread, and returns its bytes. If it
        raises, the connection is closed, and requests fail with StateError. What this side has read or written is not
        missing. To be called before any memory is shared, with PAGEFAULT and REPLY_ACK negotiated and
        CONFIGURE_MEM_SLOTS not. The back-end has to be another process: while it waits for a page, nothing else goes
        on in its interpreter.

            with frontend.postcopy(after, page=lambda address: before.read(address, 4096)):
                frontend.queue(0).request(writable=16)

        vhost-user specification, "Migration".

        Raises:
            StateError: it cannot be done now, as above.
        """
        late = self._session.share_late(memories)
        self._memories = memories
        self._postcopy = Postcopy(self, late, page)
        self._session.begin_postcopy()
        return self._postcopy

    # --- The in-flight record ---------------------------------------------------------------------------------------

    def get_inflight(self, queues: int, queue_size: int = 256) -> InflightRecord:
        """Have the back-end make a record of what is in flight, for `queues` queues of up to `queue_size` entries.

        It is shared memory, and this side keeps it. :meth:`set_inflight` puts it to use.

        Raises:
            StateError: the protocol feature INFLIGHT_SHMFD was not negotiated.
        """
        return self._session.get_inflight(queues, queue_size)

    def set_inflight(self, record: InflightRecord) -> None:
        """Have the back-end note in `record` which requests it has begun, and begin with those that it finds there.

        To be called before queues are started. From then on requests survive the back-end: when it dies, whoever waits
        for them gets PeerClosed, and ``reconnect(keep_queues=True)`` lets the next back-end complete them.

            frontend.set_inflight(frontend.get_inflight(queues=1))

        A record made for one driver is of no use to another: ask for a new one when queues are made anew.

        Raises:
            StateError: the protocol feature INFLIGHT_SHMFD was not negotiated.
            ProtocolError: the back-end refused it: a queue runs, or the record is for other queues.
        """
        self._session.set_inflight(record)
        self._inflight = record
        for queue in self.queues:
            queue._survives = True

    # --- The IOMMU --------------------------------------------------------------------------------------------------

    # Behind an IOMMU all shared memory is mapped, for reading and writing, where io_address() says. The device is told
    # of it page by page, when it asks, while somebody waits for the back-end.

    def io_address(self, guest_address: int) -> int:
        """By which address the device knows a byte of shared memory: not its guest address, if there is an IOMMU."""
        behind = self.features & TransportFeature.ACCESS_PLATFORM
        return guest_address + _core.IO_OFFSET if behind else guest_address

    def map_io(
        self, io_address: int, guest_address: int, size: int, permission: Literal["r", "w", "rw"] = "rw"
    ) -> None:
        """Map `size` I/O addresses to guest memory, instead of whatever was there, for what the device may do.

        The device is told when it asks. If it may know what was there before, call :meth:`invalidate_io` then.

        Raises:
            StateError: there is no IOMMU, or the addresses are none or wrap around.
        """
        self._session.map(io_address, guest_address, size, {"r": 1, "w": 2, "rw": 3}[permission])

    def unmap_io(self, io_address: int, size: int) -> None:
        """Take `size` I/O addresses back. Returns when no request uses them any more, as the device says.

        Raises:
            StateError: there is no IOMMU, or the addresses are none or wrap around.
        """
        self._session.unmap(io_address, size)

    def invalidate_io(self, io_address: int, size: int) -> None:
        """Make the device forget `size` I/O addresses, and ask again when it needs them.

        Raises:
            StateError: there is no IOMMU, or the addresses are none or wrap around.
        """
        self._session.invalidate(io_address, size)

    @property
    def iotlb_misses(self) -> int:
        """How often the device has asked where an I/O address is."""
        return self._session.iotlb_misses

    # --- Migration --------------------------------------------------------------------------------------------------

    def set_log(self, log: DirtyLog) -> None:
        """Let the device mark the pages that it writes to in `log`, once :meth:`log_all` says so, and in no other.

        When this returns, what was marked in the log of before is final. It may be swapped while queues run. Needs the
        protocol feature LOG_SHMFD. vhost-user specification, "Migration".
        """
        self._session.set_log(log)
        self._log = log

    def log_all(self, on: bool = True) -> None:
        """Let the device mark the pages that it answers requests in, and those of its used rings; or not any more.

        Queues may run meanwhile. A request that is under way is marked when it is completed.
        """
        self._session.log_buffers(on)
        self._log_all = on
        for queue in self.queues:
            if queue.running:
                queue._ring.log_used(on)

    def set_log_fd(self, fd: int) -> None:
        """Let the device write to an eventfd after it has marked something."""
        self._session.set_log_fd(fd)

    def save_state(self, *, limit: int = STATE_LIMIT) -> bytes:
        """The device's own state, for :meth:`load_state` of a front-end elsewhere. Stop every queue before.

        At most `limit` bytes of it. :meth:`save_state_to` does not need them in memory.
        Needs the protocol feature DEVICE_STATE. vhost-user specification, "Migrating back-end state".

        Raises:
            ProtocolError: the device could not save it.
            PeerTimeout: nothing came for :attr:`timeout` seconds. The session goes on.
            StateTooLong: there is more of it. The session goes on.
            StateError: the back-end wants a descriptor to be used that can carry no state.
        """
        state = io.BytesIO()
        self.save_state_to(state, limit=limit)
        return state.getvalue()

    def save_state_to(self, file: SupportsWrite[bytes], *, limit: int = STATE_LIMIT) -> int:
        """Like :meth:`save_state`, but write it to `file` as it comes. Returns how many bytes it has.

        `file` takes all of what it is given, as buffered files do. What it raises ends the transfer, and not the
        session. After any exception a part of the state may have been written.
        """
        if limit < 0:
            raise ValueError(f"the limit of a state is 0 bytes or more, not {limit}")
        size = 0
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            with self._state_stream(ours, theirs, saves=True) as stream:
                while data := stream.read(min(CHUNK, limit - size + 1)):
                    size += len(data)
                    if size > limit:
                        raise StateTooLong(
                            f"the device's state is longer than {limit} bytes; if that is right, give save_state() a"
                            " larger limit, or save_state_to() a file"
                        )
                    file.write(data)
        except (PeerTimeout, ProtocolError, StateError):
            raise
        except Exception:
            # The device noticed that nobody reads: it has to be asked before another transfer can begin.
            with contextlib.suppress(VhostUserError):
                self._session.check_state()
            raise
        self._session.check_state()
        return size

    def load_state(self, state: Buffer) -> None:
        """Give the device a state that :meth:`save_state` returned. Stop every queue before.

        Raises:
            ProtocolError: the device does not take it.
            PeerTimeout: the device read nothing for :attr:`timeout` seconds. The session goes on.
            StateError: the back-end wants a descriptor to be used that can carry no state.
        """
        theirs, ours = os.pipe2(os.O_CLOEXEC)
        # A device that closes its end early says why when it is asked.
        with self._state_stream(ours, theirs, saves=False) as stream, contextlib.suppress(BrokenPipeError):
            left = memoryview(state).cast("B")
            while left:
                left = left[stream.write(left[:CHUNK]) :]
        self._session.check_state()

    def _state_stream(self, ours: int, theirs: int, saves: bool) -> StateStream:
        """Begin a transfer through a pipe, or through what the back-end wants to be used instead."""
        try:
            own = self._session.transfer_state(saves, theirs)
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        if own is not None:
            os.close(ours)
            ours = own
        return StateStream(ours, not saves, timeout=self.timeout)

    # --- Queues -----------------------------------------------------------------------------------------------------

    def queue(
        self,
        index: int,
        size: int = 256,
        *,
        base: int = 0,
        indirect: bool = True,
        byteorder: Literal["little", "big"] = "little",
        start: bool = True,
    ) -> DriverQueue:
        """Make the queue `index`, with `size` descriptors, and start it.

        `size` is a power of two up to 32768, or with RING_PACKED any number up to that. The queue begins at `base`, the
        word that SET_VRING_BASE tells the device: an available index, or where both sides are in a packed ring, for
        which 0 is that of a new one, 0x80008000. With `indirect`, requests of several parts are put into indirect
        tables if INDIRECT_DESC was negotiated. vhost-user specification, "A vring state description".

        The ring is little-endian, or, with `byteorder` "big", that of a legacy driver on a big-endian machine: the
        device has to offer CROSS_ENDIAN (:attr:`Device.cross_endian`), and ``negotiate`` has to be given features
        without VERSION_1. What is in requests is the caller's to swap. vhost-user specification,
        VHOST_USER_SET_VRING_ENDIAN.

        Raises:
            StateError: the queue is there and runs, the size cannot be, memory is too small, or the queue cannot be
                big-endian with what was negotiated.
            ValueError: `byteorder` is neither "little" nor "big".
        """
        queue = self._make_queue(index, size, base, indirect, byteorder)
        if start:
            self._start(queue)
            self._set_ready()
        return queue

    def start_queues(self, count: int, size: int = 256) -> list[DriverQueue]:
        """Make and start the queues 0 to `count` - 1."""
        queues = [self._make_queue(index, size, 0, True) for index in range(count)]
        for queue in queues:
            self._start(queue)
        self._set_ready()
        return queues

    @property
    def queues(self) -> list[DriverQueue]:
        """The queues that were made, by index."""
        return [self._queues[index] for index in sorted(self._queues)]

    def _make_queue(
        self, index: int, size: int, base: int, indirect: bool, byteorder: Literal["little", "big"] = "little"
    ) -> DriverQueue:
        if byteorder not in ("little", "big"):
            raise ValueError(f'a ring is "little" or "big" endian, not {byteorder!r}')
        if not 0 <= index < 256:
            raise StateError(f"vhost-user can name the queues 0 to 255, not {index}")
        if not 0 < size <= 1 << 15:
            raise StateError(f"queue {index} cannot have {size} entries; a ring has 1 to 32768")
        old = self._queues.get(index)
        if old is not None:
            if old.running:
                raise StateError(f"queue {index} is running; stop it first")
            old._end(StateError(f"queue {index}: it was made anew"))
        core = _core.FrontendQueue(self._session, self.memory, index, size, base, indirect, byteorder == "big")
        queue = self._queues[index] = DriverQueue(core, index, size, self.timeout)
        queue._survives = self._inflight is not None
        return queue

    def _start(self, queue: DriverQueue) -> None:
        queue.start()
        if self._log_all:
            queue._ring.log_used(True)

    def _set_ready(self) -> None:
        if not self._ready:
            self._session.set_driver_ok()
            self._ready = True

    def _end_queues(self, why: str) -> list[DriverQueue]:
        queues = self.queues
        self._queues = {}
        self._ready = False
        for queue in queues:
            queue._end(StateError(f"queue {queue.index}: {why}"))
        return queues

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_open_session", None) is not None:
            warnings.warn(f"{self!r} was not closed", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self._queues)} queues"
        return f"<{type(self).__name__}, {state}>"


class DriverQueue:
    """The driver's end of a queue: what :meth:`Frontend.queue` makes. Every method may be called from any thread.

    Methods that work on a queue that broke raise the ProtocolError that says why. Virtio 1.3, sections 2.7 and 2.8.
    """

    def __init__(self, core: _core.FrontendQueue, index: int, size: int, timeout: float) -> None:
        self.index = index
        self.size = size
        self.running = False
        """Whether it was started, and not stopped since."""
        self.timeout = timeout
        """Seconds that a request may take, unless :meth:`Completion.wait` says otherwise."""
        self._open_core: _core.FrontendQueue | None = core
        self._end_reason = StateError(f"queue {index}: it is gone")
        #: Guards what follows. It is notified when requests have settled, and when nobody leads any more.
        self._changed = threading.Condition()
        self._pending: dict[int, Completion] = {}
        #: Whether requests outlive the back-end, why it is gone, and how many were there before.
        self._survives = False
        self._lost: PeerClosed | None = None
        self._moves = 0
        #: One thread takes in what the device has done; the others wait for it.
        self._led = False
        #: Pending requests with callbacks, and the thread that takes in completions for them.
        self._watched = 0
        self._watcher: threading.Thread | None = None
        #: The process that it runs in.
        self._watched_by = 0
        self._quit = False

    def submit(self, readable: Buffer | Sequence[Buffer] = (), writable: int | Sequence[int] = ()) -> Completion:
        """Submit a request, and notify the device if it wants that.

        `readable` is what the device may read, `writable` how many bytes it may write: one part each, or several. Each
        part is one descriptor; parts of no bytes are left out. They are aligned to their size, up to a page.

        Raises:
            StateError: the request does not fit into the queue or into memory now, or has no bytes at all.
            VhostUserError: in-band, the device could not be notified. It may find the request all the same.
        """
        sources = [readable] if isinstance(readable, Buffer) else readable
        sizes = [writable] if isinstance(writable, int) else writable
        completion = Completion(self)
        with self._changed:
            token = self._ring.submit([bytes(part) for part in sources], sizes)
            self._pending[token] = completion
        return completion

    def request(
        self,
        readable: Buffer | Sequence[Buffer] = (),
        writable: int | Sequence[int] = (),
        timeout: float | None = None,
    ) -> bytes:
        """Submit a request, wait until the device has completed it, and return what it wrote."""
        return self.submit(readable, writable).wait(timeout)

    def start(self) -> None:
        """Set the queue up, and let the device work on it: from where it stopped, or from its base."""
        self._ring.start()
        self.running = True

    def stop(self) -> int:
        """Take the queue away from the device, which completes what it has begun.

        Returns the base: where it would go on, and where :meth:`start` lets it.
        """
        base = self._ring.stop()
        self.running = False
        return base

    def suspend(self) -> int:
        """Take the queue away from the device at once. What it has begun stays in the in-flight record.

        It takes that again, first, when :meth:`start` lets it go on. Needs the protocol feature
        GET_VRING_BASE_SKIP_DRAIN. vhost-user specification, VHOST_USER_GET_VRING_BASE_SKIP_DRAIN.

        Returns the base, as :meth:`stop` does.
        """
        base = self._ring.suspend()
        self.running = False
        return base

    def enable(self, enable: bool = True) -> None:
        """Let the device work on the queue, or not, without taking it away."""
        self._ring.enable(enable)

    def kick(self) -> None:
        """Notify the device, whether it wants that or not."""
        self._ring.kick()

    @property
    def outstanding(self) -> int:
        """Requests that the device has not completed, or that nobody has looked at since."""
        self._wait(lambda: False, 0)
        return len(self._pending)

    @property
    def addresses(self) -> tuple[int, int, int]:
        """User addresses of the descriptor table, the available ring and the used ring."""
        return self._ring.addresses

    @property
    def _ring(self) -> _core.FrontendQueue:
        if self._open_core is None:
            raise self._end_reason
        return self._open_core

    def _wait(self, settled: Callable[[], bool], timeout: float) -> bool:
        """Wait until `settled()`, taking in what the device has done. Returns whether it is."""
        deadline = time.monotonic() + timeout
        while True:
            with self._changed:
                if settled():
                    return True
                left = max(0.0, deadline - time.monotonic())
                if self._open_core is None or self._lost is not None:
                    return False
                if self._led:
                    if not left:
                        return False
                    self._changed.wait(left)
                    continue
                self._led = True
                core, moves = self._open_core, self._moves
            self._lead(core, moves, left)
            if not left:
                return settled()

    def _lead(self, core: _core.FrontendQueue, moves: int, timeout: float) -> None:
        """Take in what the device does next, and tell everybody."""
        done: list[tuple[int, bytes]] = []
        failure: Exception | None = None
        try:
            done = core.wait(timeout)
        except (VhostUserError, OSError) as error:
            failure = error
        finally:
            with self._changed:
                self._led = False
                settled = [self._pending.pop(token)._settle(data) for token, data in done if token in self._pending]
                if isinstance(failure, PeerClosed) and (self._survives or moves != self._moves):
                    # The requests are still in the ring. A failure of the last connection says nothing of this one.
                    if moves == self._moves:
                        self._lost = failure
                elif failure is not None:
                    settled += self._fail(failure)
                self._changed.notify_all()
        for completion in settled:
            completion._call_back()

    def _move_to(self, session: _core.Frontend) -> None:
        """Go on in another session, where everything but the queues is as it was."""
        self._ring.move_to(session)
        if self.running:
            self._ring.start()
        with self._changed:
            self._moves += 1
            self._lost = None
            self._changed.notify_all()

    def _fail(self, error: Exception) -> list[Completion]:
        """Nothing that is pending will be completed any more."""
        pending, self._pending = self._pending, {}
        return [completion._settle(error) for completion in pending.values()]

    def _end(self, reason: StateError) -> None:
        """The queue is gone."""
        with self._changed:
            self._open_core = None
            self._end_reason = reason
            self.running = False
            self._quit = True
            failed = self._fail(reason)
            self._changed.notify_all()
        for completion in failed:
            completion._call_back()

    def _watch(self) -> None:
        """There is a pending request with a callback, and maybe nobody who waits. Called with the lock."""
        self._watched += 1
        if self._watcher is None:
            name = f"vhost-user queue {self.index}"
            self._watcher = threading.Thread(target=self._run_watcher, name=name, daemon=True)
            self._watcher.start()
            self._watched_by = os.getpid()
            # A daemon thread must not be caught inside the core when the interpreter goes away.
            atexit.register(self._quit_watcher)
        self._changed.notify_all()

    def _run_watcher(self) -> None:
        while True:
            self._wait(lambda: self._watched == 0 or self._quit, SLICE)
            with self._changed:
                self._changed.wait_for(lambda: (self._watched and not self._lost) or self._quit, LINGER)
                if self._quit:
                    # Whoever wants that waits for this thread.
                    break
                if not self._watched:
                    self._watcher = None
                    break
        atexit.unregister(self._quit_watcher)

    def _quit_watcher(self) -> None:
        if self._watched_by != os.getpid():
            # There is none; or this was forked, and the lock may be held by nobody who is there.
            return
        with self._changed:
            self._quit = True
            self._changed.notify_all()
            watcher = self._watcher
        if watcher is not None and watcher is not threading.current_thread():
            watcher.join()

    def __repr__(self) -> str:
        state = "running" if self.running else "stopped"
        return f"<queue {self.index} of a driver, {state}, {len(self._pending)} requests under way>"


class Completion:
    """A request under way, and what became of it: what :meth:`DriverQueue.submit` returns.

    It can be waited for, awaited, and asked. Those who do so raise what made the request fail:
        ProtocolError: the device broke the queue.
        PeerClosed: the back-end closed the connection. With an in-flight record the request is still under way.
        StateError: the queue is gone.
    """

    __slots__ = ("_callbacks", "_outcome", "_queue")

    def __init__(self, queue: DriverQueue) -> None:
        self._queue = queue
        self._outcome: bytes | Exception | None = None
        self._callbacks: list[Callable[[Completion], object]] = []

    def wait(self, timeout: float | None = None) -> bytes:
        """Wait until the device has completed the request, and return what it wrote.

        Raises:
            PeerTimeout: it has not, within `timeout` seconds (None: those of the queue). It still may.
        """
        queue = self._queue
        wanted = queue.timeout if timeout is None else timeout
        if not queue._wait(self._is_settled, wanted) and not self._is_settled():
            if (lost := queue._lost) is not None:
                raise PeerClosed(f"{lost}; the request survives it: reconnect(keep_queues=True)")
            raise PeerTimeout(f"queue {queue.index}: the device did not complete the request within {wanted} s")
        return self.data

    @property
    def done(self) -> bool:
        """Whether the device has completed the request, or never will."""
        return self._is_settled() or self._queue._wait(self._is_settled, 0)

    @property
    def data(self) -> bytes:
        """What the device wrote, which is as long as it says.

        Raises:
            StateError: it has not completed the request.
        """
        if isinstance(self._outcome, Exception):
            raise self._outcome
        if self._outcome is None:
            raise StateError(f"queue {self._queue.index}: the request is not completed; wait() for it")
        return self._outcome

    @property
    def error(self) -> Exception | None:
        """Why the request failed, if it did."""
        return self._outcome if isinstance(self._outcome, Exception) else None

    def add_done_callback(self, callback: Callable[[Completion], object]) -> None:
        """Call `callback(completion)` when the request is done, or at once if it is.

        It is called by the thread that notices, which is one of the queue's own unless somebody waits. What it raises
        is logged.
        """
        queue = self._queue
        with queue._changed:
            waits = not self._is_settled()
            if waits:
                self._callbacks.append(callback)
                if len(self._callbacks) == 1:
                    queue._watch()
        if not waits:
            self._call(callback)

    def __await__(self) -> Generator[None, None, bytes]:
        if not self.done:
            yield from self._until_done().__await__()
        return self.data

    async def _until_done(self) -> None:
        import asyncio

        loop = asyncio.get_running_loop()
        woken = asyncio.Event()

        def wake(_: Completion) -> None:
            # The loop may be closed by now.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(woken.set)

        self.add_done_callback(wake)
        timeout = self._queue.timeout
        try:
            async with asyncio.timeout(timeout):
                await woken.wait()
        except TimeoutError:
            # A loop that was busy for so long hears of both at once.
            if not self._is_settled():
                index = self._queue.index
                late = f"queue {index}: the device did not complete the request within {timeout} s"
                raise PeerTimeout(late) from None

    def _is_settled(self) -> bool:
        return self._outcome is not None

    def _settle(self, outcome: bytes | Exception) -> Completion:
        """Called with the queue's lock."""
        self._outcome = outcome
        if self._callbacks:
            self._queue._watched -= 1
        return self

    def _call_back(self) -> None:
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            self._call(callback)

    def _call(self, callback: Callable[[Completion], object]) -> None:
        try:
            callback(self)
        except Exception:
            logger.exception("queue %d: the callback %r failed", self._queue.index, callback)

    def __repr__(self) -> str:
        match self._outcome:
            case None:
                state = "under way"
            case bytes(data):
                state = f"{len(data)} bytes written"
            case error:
                state = f"failed: {error}"
        return f"<Completion on queue {self._queue.index}: {state}>"
