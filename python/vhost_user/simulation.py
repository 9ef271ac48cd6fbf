"""A guest kernel and Python devices in virtual time: an hour of sleep takes a moment, and two runs are alike.

    with Simulation() as simulation:
        sensor = simulation.add(Sensor())
        guest = simulation.boot_uml()
        guest.run("sleep 3600; cat /sys/class/hwmon/hwmon0/temp1_input")

There is one clock, and it stands still while anybody works: it goes on to the next thing that somebody has planned when
the guest and every device are idle. It moves only while somebody waits for the guest (`run`, and the like), or in
`Simulation.run_for`. User-Mode Linux calls this ``time-travel=ext``; the simulation is what its documentation calls the
calendar, and the devices get their kicks and give their calls in-band, so that nothing happens behind its back.

The guest gets no random numbers from this machine, and makes the same ones in every run: keep no secrets in it.

Everything runs on the thread that uses the simulation. vhost-user specification, "In-band notifications".
"""

from __future__ import annotations

import contextlib
import enum
import heapq
import math
import os
import select
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

from ._core import Backend, Request
from .device import Device
from .errors import StateError, VhostUserError
from .guest import Result, StrPath, Uml, _Machine
from .ids import DeviceId
from .loop import HasFileno, Loop, Timer, Watch, _late_bound
from .queues import Queue
from .server import Endpoint

__all__ = ["Event", "SimulatedUml", "Simulation", "SimulationError"]

AnyDevice = TypeVar("AnyDevice", bound=Device)

#: Seconds of real time that the guest may work without being done.
PATIENCE = 60.0

#: When the guest believes that it was booted, in seconds since 1970.
BOOT_TIME = 1_000_000_000

NANOSECONDS = 1_000_000_000

#: How often a real deadline is looked at.
SLICE_MS = 100


class SimulationError(VhostUserError):
    """Virtual time cannot go on. The message says why."""


class Event(NamedTuple):
    """One thing that happened."""

    time: float
    """Virtual time, in seconds since the start of the simulation."""
    who: str
    """``guest``, ``simulation``, or the class of the device."""
    what: str
    """The queue whose requests the device took, ``timer``, ``call``, or a command of the guest after a ``$``."""


class _Operation(enum.IntEnum):
    """Of ``struct um_timetravel_msg``."""

    ACK = 0
    START = 1
    REQUEST = 2
    WAIT = 3
    GET = 4
    UPDATE = 5
    RUN = 6
    FREE_UNTIL = 7
    GET_TOD = 8
    BROADCAST = 9


_MESSAGE = struct.Struct("=IIQ")


class _Planned(NamedTuple):
    """What is going to happen: in the order of time, and at one time in the order in which it was planned."""

    time: int
    number: int
    who: str
    what: str
    action: Callable[[], object]


class Simulation:
    """The clock of a guest and its devices. Use it in a ``with``: everything in it ends with the block.

    `patience` is how many seconds of real time the guest may work without a pause before it counts as hanging.
    """

    def __init__(self, *, patience: float = PATIENCE) -> None:
        self.patience = patience
        self.trace: list[Event] = []
        """What devices and commands have done so far. Two runs of the same program have equal traces."""
        self._now = 0
        self._planned: list[_Planned] = []
        self._cancelled: set[int] = set()
        self._count = 0
        self._participants: list[_Participant] = []
        self._guest: SimulatedUml | None = None
        self._owned = contextlib.ExitStack()
        self._folder: Path | None = None

    def __enter__(self) -> Self:
        folder = self._owned.enter_context(tempfile.TemporaryDirectory(prefix="vhost-user-simulation-"))
        self._folder = Path(folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder = None
        self._owned.close()

    @property
    def now(self) -> float:
        """Virtual time, in seconds since the start of the simulation."""
        return self._now / NANOSECONDS

    def add(self, device: AnyDevice) -> AnyDevice:
        """Let `device` take part. The next guest that is booted has it. Returns the device.

        Its ``loop`` counts virtual time from now on. It cannot watch descriptors, which know nothing of that.

        Raises:
            StateError: the simulation is not in its ``with`` block, or its guest is booted already.
            SimulationError: the device has coroutines for handlers; asyncio counts real time.
        """
        if self._guest is not None:
            raise StateError("the guest is booted already: add its devices before")
        if device._runtime.has_coroutines:
            raise SimulationError(
                f"{type(device).__name__} has async handlers, and asyncio counts real time: use loop.call_later"
            )
        participant = _Participant(self, device, self._path(f"{len(self._participants)}.sock"))
        self._owned.enter_context(participant.served())
        self._participants.append(participant)
        return device

    def boot_uml(
        self,
        *,
        memory: str = "128M",
        kernel: StrPath | None = None,
        root: StrPath = "/",
        extra_args: Sequence[str] = (),
        boot_timeout: float = PATIENCE,
    ) -> SimulatedUml:
        """Boot a guest with the devices that were added, and return once it takes commands.

        The arguments are those of :class:`vhost_user.guest.Uml`; `boot_timeout` is in real seconds.

        Raises:
            SimulationError: the kernel does not know of virtual time.
            GuestError: it did not boot.
        """
        line = self.add(_Line())
        guest = SimulatedUml(
            self, line, memory=memory, kernel=kernel, root=root, extra_args=extra_args, boot_timeout=boot_timeout
        )
        self._guest = guest
        return self._owned.enter_context(guest)

    def call_at(self, when: float, callback: Callable[[], object]) -> None:
        """Call `callback()` at the virtual time `when`, in seconds; at once if that is past."""
        self._plan(round(when * NANOSECONDS), "simulation", "call", callback)

    def run_for(self, seconds: float) -> None:
        """Let so much virtual time go by."""
        end = self._now + round(seconds * NANOSECONDS)
        over = False

        def stop() -> None:
            nonlocal over
            over = True

        self._plan(end, "", "pause", stop)
        self._go_on(lambda: over, math.inf)

    # --- The clock --------------------------------------------------------------------------------------------------

    def _path(self, name: str) -> Path:
        if self._folder is None:
            raise StateError("a simulation is used in its `with` block")
        return self._folder / name

    def _plan(self, when: int, who: str, what: str, action: Callable[[], object]) -> int:
        """Do something at `when`, in nanoseconds. Returns its number."""
        self._count += 1
        heapq.heappush(self._planned, _Planned(max(when, self._now), self._count, who, what, action))
        return self._count

    def _record(self, who: str, what: str) -> None:
        self.trace.append(Event(self.now, who, what))

    def _go_on(self, done: Callable[[], bool], deadline: float) -> bool:
        """Let time go on until `done`. False: the guest ended, or works beyond the real `deadline` or our patience."""
        while self._let_guest_work(min(deadline, time.monotonic() + self.patience)):
            if done():
                return True
            while self._planned and self._planned[0].number in self._cancelled:
                self._cancelled.discard(heapq.heappop(self._planned).number)
            if not self._planned:
                raise SimulationError("nothing will ever happen again: nobody has planned anything")
            planned = heapq.heappop(self._planned)
            self._now = planned.time
            if planned.who:
                self._record(planned.who, planned.what)
            planned.action()
        return False

    def _let_guest_work(self, deadline: float) -> bool:
        """Serve whoever has something to say until the guest waits for its turn. False: it will not."""
        guest = self._guest
        while guest is not None and not guest.is_idle:
            if not guest.is_alive or time.monotonic() > deadline:
                return False
            self._serve_once()
        return guest is None or guest.is_alive

    def _settle(self) -> None:
        """Wait until the guest has taken note of all that the devices have told it."""
        deadline = time.monotonic() + self.patience
        while not all(participant.settled for participant in self._participants):
            if self._guest is None or not self._guest.is_alive:
                return
            if time.monotonic() > deadline:
                raise SimulationError(f"the guest has not acknowledged a notification for {self.patience} s")
            self._serve_once()

    def _serve_once(self) -> None:
        """Handle what devices and the guest have to say, and wait for it a little."""
        sources: dict[int, Callable[[], object]] = {
            participant.fileno: participant.dispatch for participant in self._participants
        }
        if self._guest is not None:
            sources |= self._guest.sources()
        waiting = select.poll()
        for descriptor in sources:
            waiting.register(descriptor, select.POLLIN)
        for descriptor, _ in sorted(waiting.poll(SLICE_MS)):
            sources[descriptor]()


class _Participant:
    """A device that takes part: it answers messages at once, and looks at its queues in its turn."""

    def __init__(self, simulation: Simulation, device: Device, path: Path) -> None:
        self.simulation = simulation
        self.device = device
        self.path = path
        # The guest's shell is not of interest: nor is its line.
        self.name = "" if isinstance(device, _Line) else type(device).__name__
        self._backend: Backend | None = None
        self._in_turn = False
        self._deaf = False
        self._has_turn = False
        device.in_band = True
        device._runtime.conductor = self

    @contextlib.contextmanager
    def served(self) -> Any:
        runtime = self.device._runtime
        try:
            with runtime._served(Endpoint(path=self.path), False) as backend:
                self._backend = backend
                backend.set_handlers([None] * len(runtime.queues))
                try:
                    yield
                finally:
                    self._deaf = True
                    backend.stop()
                    backend.run()
        finally:
            self._backend = None
            runtime.conductor = None
            self.device.in_band = type(self.device).in_band

    @property
    def backend(self) -> Backend:
        assert self._backend is not None, "a participant is served as long as the simulation lasts"
        return self._backend

    @property
    def fileno(self) -> int:
        return self.backend.fileno()

    @property
    def settled(self) -> bool:
        return self.backend.settled

    def dispatch(self) -> None:
        self.backend.dispatch(0)
        while self.backend.busy:
            self.backend.dispatch(0)

    def loop(self, backend: Backend) -> Loop:
        return VirtualLoop(self, backend)

    def postpones(self, index: int) -> bool:
        if self._in_turn:
            return False
        if not self._deaf and not self._has_turn:
            self._has_turn = True
            queue = self.device._runtime.queues[index]
            self.simulation._plan(self.simulation._now, self.name, queue.name, self._take_turn)
        return True

    def call(self, callback: Callable[[], object]) -> None:
        """Do something of the device's own, and wait until the guest has taken note of it."""
        try:
            callback()
        except Exception as error:
            self.device._runtime.callback_failed("a timer", error)
        self.dispatch()
        self.simulation._settle()

    def _take_turn(self) -> None:
        runtime = self.device._runtime
        self._has_turn = False
        self._in_turn = True
        try:
            self.backend.set_handlers(runtime._bound_handlers())
            self.dispatch()
        finally:
            self._in_turn = False
            # Setting handlers makes every queue be looked at; there is nothing new in them.
            self._deaf = True
            self.backend.set_handlers([None] * len(runtime.queues))
            self.dispatch()
            self._deaf = False
        self.simulation._settle()


class VirtualLoop(Loop):
    """What `Device.loop` is in a simulation."""

    def __init__(self, participant: _Participant, backend: Backend) -> None:
        super().__init__(backend)
        self._participant = participant

    def time(self) -> float:
        return self._participant.simulation.now

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        return VirtualTimer(self._participant, self._backend, delay, callback)

    def call_soon(self, callback: Callable[[], object]) -> None:
        self.call_later(0, callback)

    def watch(
        self, file: int | HasFileno, callback: Callable[[], object], *, read: bool = True, write: bool = False
    ) -> Watch:
        raise SimulationError(
            f"{self._participant.name} watches a descriptor, and those know nothing of virtual time: use call_later"
        )


class VirtualTimer(Timer):
    """A call at a virtual time."""

    def __init__(
        self, participant: _Participant, backend: Backend, delay: float, callback: Callable[[], object]
    ) -> None:
        self._backend = backend
        self._simulation = participant.simulation
        current = _late_bound(callback)
        when = self._simulation._now + round(max(delay, 0) * NANOSECONDS)
        self._fired = False

        def fire() -> None:
            self._fired = True
            participant.call(current)

        self._id = self._simulation._plan(when, participant.name, "timer", fire)

    def cancel(self) -> None:
        if not self._fired:
            self._simulation._cancelled.add(self._id)


class _Line(Device, device_id=DeviceId.CONSOLE):
    """The terminal of the guest's shell: a serial line would know nothing of virtual time."""

    receiveq = Queue(backlog=1 << 16)
    transmitq = Queue()

    def __init__(self) -> None:
        self.socket: socket.socket | None = None

    @transmitq.handler
    def _print(self, request: Request) -> None:
        data = request.read()
        if self.socket is not None:
            self.socket.sendall(data)

    def take_input(self) -> bytes:
        if self.socket is None:
            return b""
        try:
            return self.socket.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return b""

    def type(self, data: bytes) -> None:
        for start in range(0, len(data), 1024):
            self.receiveq.push(data[start : start + 1024])

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()
            self.socket = None


class SimulatedUml(Uml):
    """A guest in virtual time, from :meth:`Simulation.boot_uml`. Deadlines of commands are virtual, too."""

    _LINE: ClassVar = "/dev/hvc0"

    def __init__(self, simulation: Simulation, line: _Line, **options: Any) -> None:
        super().__init__(**options)
        self._simulation = simulation
        self._line = line
        self._listener: socket.socket | None = None
        self._calendar: socket.socket | None = None
        self._running = True
        self._request: int | None = None
        self._sequence = 0
        self._pidfd = -1
        self._died = False

    def run(self, command: str, *, timeout: float | None = None, check: bool = True) -> Result:
        """As :meth:`vhost_user.guest.Guest.run`, but `timeout` is in virtual seconds, and there is none by default."""
        self._simulation._record("guest", f"$ {command}")
        return super().run(command, timeout=timeout, check=check)

    def kill(self) -> None:
        try:
            super().kill()
        finally:
            self._died = True
            self._line.close()
            for end in (self._listener, self._calendar):
                if end is not None:
                    end.close()
            self._listener = self._calendar = None
            if self._pidfd >= 0:
                os.close(self._pidfd)
                self._pidfd = -1
            if self._simulation._guest is self:
                self._simulation._guest = None

    def _command_line(self, channel: int, directory: Path) -> list[str]:
        path = self._simulation._path("calendar.sock")
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._line.socket = socket.socket(fileno=os.dup(channel))
        self._line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        # The line comes first: whatever consoles there are beside it, it is hvc0.
        first = sorted(self._simulation._participants, key=lambda other: other.device is not self._line)
        self.devices = [(other.path, other.device.device_id) for other in first]
        # The kernel makes random numbers of its command line, too, and sets timers by them: a path that is another one
        # in each run may not be in it. So they are relative to the simulation's folder.
        kernel, *parameters = super()._command_line(channel, Path("uml"))
        launcher = Path(__file__).with_name("_predictable.py")
        return [sys.executable, "-I", "-S", str(launcher), str(path.parent), os.path.abspath(kernel), *parameters]

    def _channel_parameters(self, channel: int) -> list[str]:
        # Without a console of its own, the kernel would write its messages to the line.
        return ["time-travel=ext:calendar.sock", "norandmaps", "console=tty0"]

    @staticmethod
    def _parameter(path: StrPath, device_id: int, platform_id: int | None = None) -> str:
        return Uml._parameter(Path(path), device_id, platform_id).replace(f"{Path(path).parent}/", "")

    def _now(self) -> float:
        return self._simulation.now

    def _wait(self, machine: _Machine, descriptor: int, deadline: float) -> None:
        if self._pidfd < 0:
            self._pidfd = os.pidfd_open(machine.process.pid)
        typed = self._line.take_input()
        if typed:
            self._simulation._plan(
                self._simulation._now, "", "input", lambda: self._participant.call(lambda: self._line.type(typed))
            )
        readable = select.poll()
        readable.register(descriptor, select.POLLIN)
        if not self._simulation._go_on(lambda: bool(readable.poll(0)), deadline):
            # What it has not said by now it will not say.
            machine.lose_patience()

    @property
    def _participant(self) -> _Participant:
        return next(other for other in self._simulation._participants if other.device is self._line)

    # --- For the simulation -----------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether it waits for its turn."""
        return not self._running

    @property
    def is_alive(self) -> bool:
        return not self._died

    def sources(self) -> dict[int, Callable[[], object]]:
        """What to look at while it works."""
        sources: dict[int, Callable[[], object]] = {}
        if self._pidfd >= 0:
            sources[self._pidfd] = self._on_death
        if self._calendar is not None:
            sources[self._calendar.fileno()] = self._on_message
        elif self._listener is not None:
            sources[self._listener.fileno()] = self._on_connection
            if any(other.backend.connected for other in self._simulation._participants):
                raise SimulationError(
                    "the guest's kernel does not know of virtual time: it needs CONFIG_UML_TIME_TRAVEL_SUPPORT"
                )
        return sources

    def _on_death(self) -> None:
        self._died = True
        self._line.close()

    def _on_connection(self) -> None:
        assert self._listener is not None
        self._calendar, _ = self._listener.accept()

    def _on_message(self) -> None:
        assert self._calendar is not None
        try:
            data = self._calendar.recv(_MESSAGE.size, socket.MSG_WAITALL)
        except ConnectionError:
            data = b""
        if len(data) < _MESSAGE.size:
            # Its end is seen by its process's descriptor; until then there is nothing more to hear.
            self._calendar.close()
            self._calendar = None
            if self._listener is not None:
                self._listener.close()
                self._listener = None
            return
        number, sequence, when = _MESSAGE.unpack(data)
        answer = self._handle(_Operation(number), when)
        if answer is not None:
            self._calendar.sendall(_MESSAGE.pack(_Operation.ACK, sequence, answer))

    def _handle(self, operation: _Operation, when: int) -> int | None:
        simulation = self._simulation
        if operation is _Operation.ACK:
            return None
        if operation is _Operation.REQUEST:
            self._withdraw()
            self._request = simulation._plan(when, "", "run", self._let_run)
        elif operation is _Operation.WAIT:
            self._running = False
        elif operation is _Operation.GET:
            return simulation._now
        elif operation is _Operation.UPDATE:
            simulation._now = max(simulation._now, when)
        elif operation is _Operation.GET_TOD:
            return BOOT_TIME * NANOSECONDS
        return 0

    def _withdraw(self) -> None:
        if self._request is not None:
            self._simulation._cancelled.add(self._request)
            self._request = None

    def _let_run(self) -> None:
        self._request = None
        self._running = True
        if self._calendar is not None:
            self._sequence += 1
            with contextlib.suppress(BrokenPipeError):
                self._calendar.sendall(_MESSAGE.pack(_Operation.RUN, self._sequence, self._simulation._now))
