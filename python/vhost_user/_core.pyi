"""The extension module: the protocol, guest memory, rings and the event loop, in Rust."""

import enum
from collections.abc import Callable, Mapping, Sequence
from struct import Struct
from typing import Any, Protocol, final

from typing_extensions import Buffer

from .queues import Batch

class _HasFileno(Protocol):
    def fileno(self) -> int: ...

@final
class Request:
    """One request of a driver: what it sent, and room for the answer. Virtio 1.3, section 2.6.

    It reads and writes like a file: what was read or written moves a position of its own for each. A request is
    completed when its handler returns, or by :meth:`complete` if it was detached. A request that is dropped without
    that is answered as it is, with a warning.

    Every method that works on a request raises :exc:`RequestCompleted` once it was completed, and
    :exc:`RequestRevoked` once the driver that made it is gone.
    """

    @property
    def queue(self) -> int:
        """Index of the queue that the request came on."""
    @property
    def readable(self) -> int:
        """Bytes that are left to read."""
    @property
    def writable(self) -> int:
        """Bytes of room that are left to write."""
    @property
    def written(self) -> int:
        """Bytes written so far: the length that the driver will be told."""
    @property
    def resubmitted(self) -> bool:
        """Whether a device before this one had taken the request and was killed: it may have done a part, or all of it.

        False on every request unless the front-end keeps an in-flight record. Do the work again; where doing it twice
        would be wrong, ask here. vhost-user specification, "Inflight I/O tracking".
        """
    @property
    def completed(self) -> bool:
        """Whether the request was completed, or its driver is gone."""
    def read(self, size: int = -1, /) -> bytes:
        """Read up to `size` bytes of what the driver sent, or all that is left."""
    def readinto(self, buffer: Buffer) -> int:
        """Read into `buffer` as much as fits. Returns how many bytes that were."""
    def write(self, data: Buffer, /) -> int:
        """Copy `data` into the driver's writable buffers, after what was written before.

        Returns the number of bytes copied, always the length of `data`.

        Raises:
            RequestOverflow: `data` is longer than `writable` bytes; nothing was copied.
        """
    def write_tail(self, data: bytes, /) -> None:
        """Write `data` into the last bytes of the writable buffers, where many device types have their status.

        Everything up to there counts as written.

        Raises:
            RequestOverflow: the bytes before were written already; nothing was copied.
        """
    def unpack(self, format: str | Struct, /) -> tuple[Any, ...]:
        """Read and unpack as :mod:`struct` does. Virtio is little-endian: begin formats with ``<``.

        Raises:
            RequestUnderflow: the driver sent fewer bytes; nothing was read.
        """
    def skip(self, count: int) -> None:
        """Pass over `count` bytes of what the driver sent.

        Raises:
            RequestUnderflow: the driver sent fewer bytes; nothing was skipped.
        """
    def readable_buffers(self) -> list[memoryview]:
        """What is left to read, where it is: read-only views of guest memory, for os.pwritev, hashlib or numpy.

        The driver may change what they show, and owns it again once the request completes; views that are still alive
        then are safe, but reported by a ResourceWarning.
        """
    def writable_buffers(self) -> list[memoryview]:
        """The room that is left, where it is: writable views of guest memory. Tell :meth:`commit` what was filled."""
    def commit(self, count: int) -> None:
        """Count `count` more bytes as written, which were written through :meth:`writable_buffers`.

        Raises:
            RequestOverflow: there is less room than that.
        """
    def copy_from_file(self, file: int | _HasFileno, offset: int, count: int | None = None) -> int:
        """Write `count` bytes (all the room that is left) from `offset` of a file, without the GIL and without a copy.

        Returns how many bytes that were: fewer only at the end of the file.

        Raises:
            RequestOverflow: there is less room than `count`; nothing was read.
            OSError: the file could not be read.
        """
    def copy_to_file(self, file: int | _HasFileno, offset: int, count: int | None = None) -> int:
        """Read `count` bytes (all that are left) into a file at `offset`, without the GIL and without a copy.

        Raises:
            RequestUnderflow: the driver sent fewer bytes; nothing was written.
            OSError: the file could not be written.
        """
    def detach(self) -> Request:
        """Keep the request after its handler returns; complete it later, from any thread. Returns the request."""
    def complete(self) -> None:
        """Give the request back to the driver, with what was written, and notify the driver if it wants that."""

@final
class GuestBuffer:
    """A contiguous piece of guest memory, which it keeps mapped. What `Request.readable_buffers` makes views of."""

    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __release_buffer__(self, buffer: memoryview, /) -> None: ...

class _Offer(Protocol):
    """What a device offers to a front-end: `vhost_user._runtime.Offer`."""

    @property
    def features(self) -> int: ...
    @property
    def transport(self) -> int: ...
    @property
    def protocol(self) -> int: ...
    @property
    def gpu_socket(self) -> bool: ...
    @property
    def shared_memory(self) -> Mapping[int, int]: ...

@final
class BatchHandler:
    """Who takes the requests of a queue together, and who takes those one by one that are left then; before them,
    `blocks()` may say what is done without them."""

    def __new__(
        cls,
        together: Callable[[Batch], list[Request] | None] | None,
        each: Callable[[Request], object] | None,
        blocks: Callable[[], Blocks | None] | None,
    ) -> BatchHandler: ...

@final
class Complaints:
    """Lets the first lines of one kind into a log, and then one in a second."""

    def __new__(cls) -> Complaints: ...
    def due(self) -> int | None:
        """How many lines were left out since the last one, if there may be another now; None if there may not, and this
        one is left out as well."""

@final
class Blocks:
    """A disk of so many sectors of 512 bytes in `file`, which has to stay open: reads, and with `writes` writes, are
    answered without the interpreter. What :meth:`Queue.blocks` returns. Virtio 1.3, section 5.2.6.

    With `lasting`, names of attributes of the device and what they are, the method is not called again while each of
    them is that very object, the configuration space stays what it is, and the device hears nothing else of the driver.
    """

    def __new__(
        cls,
        file: int | _HasFileno,
        sectors: int,
        writes: bool,
        *,
        lasting: list[tuple[str, object]] | None = None,
    ) -> Blocks: ...

@final
class Backend:
    """A device being served: its queues, its configuration space, its session, and the loop that drives them."""

    def __new__(
        cls,
        runtime: object,
        queue_sizes: list[int],
        max_requests: list[int],
        handlers: list[Callable[[Request], object] | BatchHandler | None],
        offer: _Offer,
        config: bytes,
        workers: int = 0,
    ) -> Backend: ...
    def set_handlers(self, handlers: list[Callable[[Request], object] | BatchHandler | None]) -> None:
        """Other handlers, from the next batch of requests on. What is available gets a look from them.

        Only on the loop's thread.
        """
    def connect(self, fd: int) -> None:
        """Serve the front-end at the other end of `fd`, which is owned from now on. Only on the loop's thread."""
    def dispatch(self, timeout: float | None = None) -> bool:
        """Handle what has happened, waiting for it up to `timeout` seconds (None: as long as it takes).

        Returns whether the loop goes on.
        """
    def run(self) -> None:
        """Run the loop until :meth:`stop`."""
    @property
    def busy(self) -> bool:
        """Whether :meth:`dispatch` would find something to do that :meth:`fileno` does not tell of."""
    @property
    def settled(self) -> bool: ...
    @property
    def forked(self) -> bool:
        """Whether this is a child that was forked from the process that serves the device. It leaves it alone."""
    def fileno(self) -> int:
        """The loop's own descriptor: readable while :meth:`dispatch` has something to do."""
    def stop(self) -> None:
        """End the loop, after requests in flight are done. From any thread."""
    def work(self, index: int) -> None:
        """Be the worker `index` of the device, on this thread, until :meth:`stop_workers`.

        What goes wrong ends the loop.
        """
    def stop_workers(self) -> None:
        """End the workers, each after the requests that it has begun with. From any thread."""
    @property
    def connected(self) -> bool:
        """Whether a front-end is connected."""
    def watch(self, fd: int, callback: Callable[[bool, bool], object], readable: bool, writable: bool) -> int:
        """Call `callback(readable, writable)` while `fd` is ready. Returns what :meth:`unwatch` takes."""
    def unwatch(self, id: int, fd: int) -> None:
        """Stop watching `fd`, before it is closed."""
    def call_later(self, delay: float, callback: Callable[[], object]) -> int:
        """Call `callback()` in `delay` seconds. Returns what :meth:`cancel` takes."""
    def cancel(self, id: int) -> None:
        """Forget a call."""
    def call_soon(self, callback: Callable[[], object]) -> None:
        """Call `callback()` on the loop's thread, soon."""
    def config_read(self, offset: int, length: int) -> bytes:
        """Bytes of the configuration space."""
    def config_write(self, offset: int, data: bytes) -> None:
        """Replace bytes of the configuration space."""
    def config_changed(self) -> None:
        """Tell the driver that the configuration space changed."""
    def set_patience(self, seconds: float) -> None:
        """Let requests that are done wait for others of their batch, for so many seconds."""
    def set_busy_poll(self, seconds: float) -> None:
        """Look for requests for up to so many seconds before going to sleep, as long as it was worth it lately."""
    def ask(
        self,
        name: str,
        payload: bytes,
        descriptors: Sequence[int],
        then: Callable[[int | None, Exception | None], object],
    ) -> None:
        """Ask the front-end for something.

        `then(descriptor, error)` is called on the loop's thread, with a descriptor that belongs to it, or with what
        went wrong.
        """
    @property
    def is_this_thread(self) -> bool:
        """Whether the calling thread is the loop's."""
    def take(self, queue: int) -> Request | None:
        """The next request of a queue that has no handler, or None. From any thread."""
    def push(self, queue: int, data: Buffer) -> bool:
        """Fill the next request of a queue with `data` and complete it. False if there is none now."""
    def push_many(self, queue: int, data: list[Buffer]) -> int:
        """Fill the next requests of a queue, one with each of `data`, and complete them together.

        Returns how many there were.
        """
    def available(self, queue: int) -> int:
        """Requests that a driver has made available on a queue and nobody has taken."""
    def in_flight(self, queue: int) -> int:
        """Requests that the device has taken from a queue and not completed."""
    def status(self, queue: int) -> str:
        """ "stopped", "disabled", "running" or "broken"."""
    def is_big_endian(self, queue: int) -> bool:
        """Whether a queue has the rings of a legacy driver on a big-endian machine."""
    def statistics(self, queue: int) -> dict[str, int]:
        """Counters of a queue, by name."""

class ProtocolFeature(enum.IntFlag):
    """What GET_PROTOCOL_FEATURES and SET_PROTOCOL_FEATURES exchange."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    NET_MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    GET_VRING_BASE_INFLIGHT = 1 << 20
    GPA_ADDRESSES = 1 << 21
    SHMEM = 1 << 22
    GET_VRING_BASE_SKIP_DRAIN = 1 << 23

class TransportFeature(enum.IntFlag):
    """Feature bits that are not a device type's. Virtio 1.3, section 6."""

    NOTIFY_ON_EMPTY = 1 << 24
    LOG_ALL = 1 << 26
    ANY_LAYOUT = 1 << 27
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    SR_IOV = 1 << 37
    NOTIFICATION_DATA = 1 << 38
    NOTIF_CONFIG_DATA = 1 << 39
    RING_RESET = 1 << 40
    ADMIN_VQ = 1 << 41

#: What the I/O address of a byte has more than its guest address, unless it is mapped elsewhere.
IO_OFFSET: int

#: The requests of a front-end, by name.
REQUESTS: dict[str, int]

@final
class Memory:
    """Guest memory that this process makes, in sealed files, to be shared with a back-end.

    Either one region of `size` bytes, or several `regions`, each a guest address and a size in bytes. Addresses and
    sizes are multiples of 4096. vhost-user specification, "Memory region description".

    Raises:
        ValueError: neither a size nor regions, or both.
        StateError: an address or a size is not a multiple of 4096.
        ProtocolError: regions overlap.
    """

    def __new__(cls, size: int | None = None, *, regions: Sequence[tuple[int, int]] | None = None) -> Memory: ...
    @property
    def regions(self) -> list[tuple[int, int]]:
        """Guest address and size of every region."""
    def read(self, address: int, size: int) -> bytes:
        """Copy `size` bytes from a guest address.

        Raises:
            ProtocolError: they are not all in one of the regions, or in adjacent ones.
        """
    def write(self, address: int, data: bytes | bytearray) -> None:
        """Copy `data` to a guest address.

        Raises:
            ProtocolError: it does not fit in the regions there.
        """
    def allocate(self, size: int, alignment: int = 16) -> int:
        """Take `size` bytes out of what queues and requests use. Returns their guest address.

        They are never given back.

        Raises:
            StateError: there are no `size` bytes in one piece.
        """
    @staticmethod
    def user_address(address: int) -> int:
        """By which user address the back-end is told of a guest address: that is what SET_VRING_ADDR takes."""

@final
class DirtyLog:
    """Which pages of guest memory a device wrote to: a log for :meth:`Frontend.set_log`.

    It reaches to the end of `memories`, or has at least as many `pages` of 4096 bytes, from guest address 0 on.
    vhost-user specification, "Migration".
    """

    def __new__(cls, *memories: Memory, pages: int | None = None) -> DirtyLog: ...
    def take(self) -> list[int]:
        """Clear the log. Returns the pages that were marked, by number, in order.

        A page that is written to meanwhile is in this answer or in the next one.
        """
    @property
    def pages(self) -> int:
        """How many pages it has marks for."""

@final
class Frontend:
    """The driver's end of a session. What is behind `vhost_user.Frontend`."""

    def __new__(cls, fd: int, timeout: float) -> Frontend: ...
    def handshake(self, protocol: int) -> tuple[int, int, int | None]:
        """Everything up to where the device's features are chosen.

        Returns what the back-end offers: its features, its protocol features, and how many queues it has, if it tells.
        """
    def set_features(self, features: int) -> None:
        """Choose the device's features."""
    @property
    def features(self) -> int:
        """The chosen ones."""
    @property
    def protocol_features(self) -> int:
        """The negotiated ones."""
    def set_log(self, log: DirtyLog) -> None:
        """Mark what is written in `log`, and in no other any more."""
    def set_log_fd(self, fd: int) -> None: ...
    def log_buffers(self, on: bool) -> None:
        """Switch LOG_ALL."""
    def transfer_state(self, save: bool, fd: int) -> int | None:
        """Returns the descriptor that the back-end wants to use instead, which is the caller's to close."""
    def check_state(self) -> None:
        """Wait until the back-end is done with the device's state."""
    def set_driver_ok(self) -> None:
        """Tell the device that the driver is ready, if the back-end wants to know."""
    def set_status(self, status: int) -> None: ...
    def status(self) -> int: ...
    def reset(self) -> None: ...
    def get_config(self, offset: int, size: int) -> bytes: ...
    def set_config(self, offset: int, data: bytes | bytearray) -> None: ...
    def send_rarp(self, mac: bytes) -> None: ...
    def set_mtu(self, mtu: int) -> None: ...
    def create_crypto_session(self, operation: int, parameters: bytes) -> int: ...
    def close_crypto_session(self, session: int) -> None: ...
    def set_gpu_socket(self, fd: int) -> None: ...
    def get_shared_object(self, uuid: bytes) -> int | None:
        """Returns a descriptor that the caller owns."""
    def shared_memory(self) -> dict[int, int]:
        """Bytes of each shared memory region, by its index."""
    def mappings(self, region: int) -> list[tuple[int, int, bool]]:
        """Where something is mapped in a shared memory region: offset, size, and whether it may be written to."""
    def read_shared_memory(self, region: int, offset: int, size: int) -> bytes: ...
    def write_shared_memory(self, region: int, offset: int, data: bytes | bytearray) -> None: ...
    def host_notifiers(self) -> list[int]:
        """The queues that the back-end gave a page for."""
    def notify_host(self, queue: int) -> None: ...
    def shared_objects(self) -> list[bytes]:
        """The objects that the back-end shares."""
    def provide_shared_object(self, uuid: bytes, fd: int) -> None: ...
    def share(self, memories: Sequence[Memory]) -> None:
        """Share these memories, and no others any more."""
    def share_late(self, memories: Sequence[Memory]) -> LatePages:
        """Share memory of which pages are missing: they are provided by what this returns."""
    def begin_postcopy(self) -> None: ...
    def end_postcopy(self) -> None: ...
    def get_inflight(self, queues: int, queue_size: int) -> InflightRecord:
        """Have the back-end make a record of what is in flight."""
    def set_inflight(self, record: InflightRecord) -> None:
        """Have the back-end use a record from now on."""
    def map(self, iova: int, guest_address: int, size: int, permission: int) -> None:
        """Map I/O addresses: the device is told when it asks. `permission` is 1 (read), 2 (write) or 3 (both)."""
    def unmap(self, iova: int, size: int) -> None:
        """Take I/O addresses back."""
    def invalidate(self, iova: int, size: int) -> None:
        """Make the device forget I/O addresses, which stay mapped."""
    @property
    def iotlb_misses(self) -> int:
        """How often the device has asked where an I/O address is."""
    def next_event(self, timeout: float) -> tuple[str, str] | None:
        """What the back-end says unasked, as its kind and its text. None if it says nothing for `timeout` seconds."""
    def exchange(self, name: str, payload: bytes | bytearray, descriptors: Sequence[int]) -> bytes | None:
        """Send any request with any payload at any time. Returns the payload of the answer, None if there is none."""
    def close(self) -> None:
        """End the session: whoever waits is told."""
    @property
    def forked(self) -> bool:
        """Whether this is a child that was forked from the process that drives the device. It leaves it alone."""
    def fileno(self) -> int:
        """The socket to the back-end."""

@final
class InflightRecord:
    """Memory in which a back-end notes which requests it has begun, so that the next one finds them if it dies.

    What :meth:`vhost_user.Frontend.get_inflight` returns. vhost-user specification, "Inflight I/O tracking".
    """

    @property
    def queues(self) -> int:
        """How many queues it is for."""
    @property
    def queue_size(self) -> int:
        """Entries of the largest queue that it is for."""
    @property
    def size(self) -> int:
        """Bytes."""
    @property
    def offset(self) -> int:
        """Where it begins in its file."""
    def fileno(self) -> int:
        """The descriptor of its file."""

@final
class LatePages:
    """Guest memory of a back-end that waits for each page that is missing."""

    def fileno(self) -> int:
        """Readable when there may be a page that is wanted."""
    def wanted(self) -> int | None:
        """The guest address of a page that the back-end waits for."""
    def provide(self, guest_address: int, data: bytes) -> bool:
        """Provide whole pages. Returns false if the first one is there already."""

@final
class FrontendQueue:
    """The driver's end of one queue. What is behind `vhost_user.DriverQueue`."""

    def __new__(
        cls,
        frontend: Frontend,
        memory: Memory,
        index: int,
        size: int,
        base: int,
        indirect: bool,
        big_endian: bool,
    ) -> FrontendQueue: ...
    def start(self) -> None: ...
    def log_used(self, on: bool) -> None:
        """Have writes to the used ring logged, or not; it may run."""
    def enable(self, enable: bool) -> None: ...
    def stop(self) -> int:
        """Take the queue away from the device. Returns the base."""
    def suspend(self) -> int:
        """The same at once: what the device has taken stays in the in-flight record."""
    def move_to(self, frontend: Frontend) -> None:
        """Go on in another session, with the requests that are under way."""
    def kick(self) -> None: ...
    def submit(self, readable: Sequence[bytes | bytearray], writable: Sequence[int]) -> int:
        """Returns the number by which :meth:`wait` will name the request."""
    def wait(self, timeout: float) -> list[tuple[int, bytes]]:
        """Requests that are done, by number, with what the device wrote.

        At least one, waiting for it up to `timeout` seconds; none if there is none then. Each is returned once.
        """
    @property
    def outstanding(self) -> int:
        """Requests that the device has and that `wait` has not returned."""
    @property
    def addresses(self) -> tuple[int, int, int]:
        """User addresses, or I/O addresses, of the descriptor table, the available ring and the used ring."""

@final
class Load:
    """The same requests again and again on some queues, which nobody else uses. What is behind `vhost_user.bench`."""

    @staticmethod
    def chains(queues: Sequence[FrontendQueue], depth: int, readable: Sequence[int], writable: Sequence[int]) -> Load:
        """Requests with parts of these sizes, `depth` at a time on each queue. What the device may read is zero."""
    @staticmethod
    def disk(
        queues: Sequence[FrontendQueue], depth: int, reads: bool, writes: bool, random: bool, block: int, blocks: int
    ) -> Load:
        """Requests for blocks of as many bytes, of the `blocks` that a disk begins with."""
    def run(self, seconds: float, timeout: float, poll: bool) -> LoadResult:
        """Go on for so many seconds, or until :meth:`stop`, with a thread for each queue.

        Raises:
            PeerTimeout: the device completed nothing for `timeout` seconds.
        """
    def stop(self) -> None:
        """Submit nothing more: :meth:`run` returns when the device has completed what it has."""
    @property
    def requests(self) -> int:
        """Those that were completed so far."""

@final
class LoadResult:
    """What a load has seen."""

    @property
    def seconds(self) -> float: ...
    @property
    def requests(self) -> int:
        """Completed ones, whatever their status."""
    @property
    def sent(self) -> int:
        """Bytes that the device took; of a disk, blocks of requests that succeeded."""
    @property
    def received(self) -> int:
        """Bytes that the device gave, likewise."""
    @property
    def errors(self) -> dict[int, int]:
        """How often a disk answered with each status but 0."""
    def percentile(self, percent: float) -> int | None:
        """Of the latencies, in nanoseconds: the value that `percent` of them are not above, or up to a 64th more."""
    @property
    def mean(self) -> float | None: ...
    @property
    def least(self) -> int | None: ...

#: A field of a payload: its name, where it begins and how many bytes it has (0: the rest), what it holds, and the parts
#: of what it holds. The shapes are unsigned, signed, bytes, words, bits (parts: name and mask of each), structure and
#: structures (parts: their fields), and padding.
_PayloadField = tuple[str, int, int, str, list[Any]]

@final
class MessageInfo:
    """A row of the message tables: what a message is like. vhost-user specification, "Message types"."""

    @property
    def channel(self) -> str:
        """ "main" for a request of the front-end, "back-end" for one of the back-end."""
    @property
    def id(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def payload(self) -> str:
        """Which of :func:`payloads` it has."""
    @property
    def descriptors(self) -> str:
        """ "none", "one", "at most one", or "as described" by the payload."""
    @property
    def gate(self) -> str:
        """The feature that permits it, "always", or "device type"."""
    @property
    def answer(self) -> str:
        """Which of :func:`payloads` the answer has."""
    @property
    def answered(self) -> str:
        """ "always"; "asked": if NEED_REPLY asks for it; or the feature that turns an acknowledgement to `answer`."""
    @property
    def rings(self) -> str:
        """Which rings it is about: "none", "one" or "all"."""
    @property
    def bits(self) -> list[tuple[int, str]] | None:
        """Names of bits, for a message that is about features: of its answer if it is always answered."""

@final
class DecodedMessage:
    """What :func:`decode` made of a message."""

    @property
    def name(self) -> str: ...
    @property
    def answer(self) -> bool:
        """Whether it answers a request."""
    @property
    def acknowledgement(self) -> bool:
        """Whether it is an answer that only tells success, 0, from failure."""
    @property
    def fields(self) -> dict[str, Any]:
        """The values that are there, by name: numbers, bytes, lists, and dictionaries of such. A word of features has
        the names of its bits beside it, as "names"; bytes that nobody asked for are the "rest"."""
    @property
    def problem(self) -> str | None:
        """What is wrong with it: what was expected, and what came."""

def messages() -> list[MessageInfo]:
    """Both message tables."""

def payloads() -> list[tuple[str, int | None, list[_PayloadField]]]:
    """Every payload: its name, the only size that it has (None: any), and its fields."""

def read_each(requests: list[Request], size: int) -> list[bytes]:
    """As `Request.read`, of each of `requests`."""

def unpack_each(requests: list[Request], format: str | Struct) -> list[tuple[Any, ...]]:
    """As `Request.unpack`, of each of `requests`."""

def write_each(requests: list[Request], data: Buffer | list[Any]) -> None:
    """As `Request.write`, to each of `requests`: the same bytes, or those of a list that has some for each."""

def write_tail_each(requests: list[Request], data: bytes | list[bytes]) -> None:
    """As `Request.write_tail`, likewise."""

def decode(channel: str, sender: str, request: int, flags: int, payload: bytes, descriptors: int) -> DecodedMessage:
    """Decode a message that the `sender`, "front-end" or "back-end", sent on a `channel`, "main" or "back-end".

    It never fails, whatever the bytes are.

    Raises:
        ValueError: there is no such channel or sender.
    """
