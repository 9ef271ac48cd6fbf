"""What a check is, what it can say, and how it is run."""

from __future__ import annotations

import contextlib
import enum
import fnmatch
import os
import select
import shlex
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar
from typing import Protocol as Structure

from ..errors import VhostUserError
from ..features import UNKNOWN, DeviceType
from ..frontend import Frontend
from ..info import inspect
from .exercises import Exercise, exercise_for
from .wire import (
    IDS,
    NEED_REPLY,
    VERSION,
    Closed,
    Feature,
    Memory,
    PackedRing,
    Protocol,
    Ring,
    Silent,
    SplitRing,
    Wire,
    u64,
    vring_state,
    wait_until,
)

#: Seconds after which something that should not come did not.
QUIET = 0.04

#: Seconds after which a back-end that accepts no connection is gone, and not about to listen again.
PATIENCE = 1.0

#: Seconds that an answer or a request may take, unless somebody says otherwise.
TIMEOUT = 2.0


class Verdict(enum.Enum):
    """What becomes of a check."""

    PASS = "pass"
    FAIL = "FAIL"
    """Wrong by the text."""
    DIFFERS = "differs"
    """The text leaves room, and implementations differ."""
    SKIP = "skip"
    ERROR = "error"
    """The check could not be made."""


class Outcome(Exception):
    """Ends a check. What is not said by `reason` is in what was sent and what came."""

    verdict = Verdict.ERROR

    def __init__(self, reason: str, expected: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.expected = expected


class Failed(Outcome):
    """Wrong by the text: `reason` is what was seen."""

    verdict = Verdict.FAIL


class Differs(Outcome):
    """What was seen, and who else does it."""

    verdict = Verdict.DIFFERS


class Skipped(Outcome):
    """Why there is nothing to check."""

    verdict = Verdict.SKIP


class TargetError(VhostUserError):
    """There is no back-end to check, or it goes away before it can be."""


Function = TypeVar("Function", bound="Callable[[Case], object]")


class HasClose(Structure):
    """What a check leaves behind, if nobody closes it."""

    def close(self) -> None: ...


Owned = TypeVar("Owned", bound=HasClose)


@dataclass(frozen=True)
class Check:
    """A sentence about back-ends that can be tried."""

    name: str
    """Group and name, as in "framing.reply-id"."""
    section: str
    """Where the text says so."""
    needs: tuple[str, ...]
    """Features without which there is nothing to check; "request": one that the device completes."""
    device: str
    """The device type that it is for, if it is for one."""
    may_kill: bool
    """Whether back-ends are known that do not survive it."""
    run: Callable[[Case], object] = field(repr=False)

    @property
    def sentence(self) -> str:
        """What is checked."""
        return " ".join((self.run.__doc__ or "").split())


#: Every check, by name, in the order in which they are run.
CHECKS: dict[str, Check] = {}


def check(
    name: str, section: str, *, needs: str = "", device: str = "", may_kill: bool = False
) -> Callable[[Function], Function]:
    """Register a function as a check. Its docstring is the sentence that it checks."""

    def register(function: Function) -> Function:
        assert name not in CHECKS, f"there are two checks {name}"
        CHECKS[name] = Check(name, section, tuple(needs.split()), device, may_kill, function)
        return function

    return register


@dataclass(frozen=True)
class Result:
    """What became of a check."""

    check: Check
    verdict: Verdict
    reason: str = ""
    expected: str = ""
    log: tuple[str, ...] = ()
    """The last messages of the connection."""
    seconds: float = 0.0


@dataclass
class Facts:
    """What the back-end offers, which decides what can be checked."""

    features: int
    protocol: int
    queues: int | None

    def has(self, name: str) -> bool:
        """Whether it offers a feature of the ring or of the protocol."""
        if name in Feature.__members__:
            return bool(self.features & Feature[name])
        return bool(self.protocol & Protocol[name])


# --- The back-end -----------------------------------------------------------------------------------------------------


class Target:
    """How to reach the back-end, which listens at `path`; with `command` it is started there, anew when it is gone.

    `{socket}` in the command is its socket.
    """

    def __init__(self, path: str | None, *, command: str | None = None, timeout: float = TIMEOUT) -> None:
        self.timeout = timeout
        self.command = command
        self.serves_once = False
        """Whether it ends, or refuses others, after its first connection."""
        self._folder = tempfile.TemporaryDirectory(prefix="vhost-user-check-") if path is None else None
        self.path = path or os.path.join(self._folder.name if self._folder else "", "backend.sock")
        self._process: subprocess.Popen[bytes] | None = None
        self.listens_anew = False
        """Whether it makes its socket anew for each connection."""
        self._was_there = False
        self._last_identity: tuple[int, int] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._heard = 0

    def connect(self) -> Wire:
        """Connect, which has to be possible.

        Raises:
            TargetError: it is not.
        """
        is_running = self._process is not None and self._process.poll() is None
        if self.command is not None and (self.serves_once or not is_running):
            self.start()
        try:
            return self._open()
        except OSError as error:
            raise TargetError(f"{self.path}: {error.strerror or 'nobody accepts the connection'}") from None

    def _open(self) -> Wire:
        """Connect, with patience for those who make their socket anew for each front-end."""
        patience = min(self.timeout, PATIENCE) if self._was_there or self.command else 0.0
        begin = time.monotonic()
        if self.listens_anew:
            # A connection to the socket before would be cut off.
            wait_until(lambda: self.identity() not in {None, self._last_identity}, patience)
        while True:
            self._last_identity = self.identity()
            try:
                wire = Wire.connect(self.path, self.timeout)
            except (ConnectionRefusedError, FileNotFoundError, BlockingIOError) as error:
                # The last of them comes from one that is there, where as many wait to be accepted as may.
                most = self.timeout if isinstance(error, BlockingIOError) else patience
                is_dead = self._process is not None and self._process.poll() is not None
                if is_dead or time.monotonic() > begin + most:
                    raise
                time.sleep(0.005)
            else:
                self._was_there = True
                return wire

    def identity(self) -> tuple[int, int] | None:
        """What tells a socket from another one at the same path."""
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_ino, found.st_ctime_ns

    def start(self) -> None:
        """Start the command anew.

        Raises:
            TargetError: it does not listen.
        """
        assert self.command is not None
        self.stop()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        words = [word.replace("{socket}", self.path) for word in shlex.split(self.command)]
        try:
            self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=self._errors, stderr=self._errors)
        except OSError as error:
            raise TargetError(f"{words[0]}: {error.strerror}") from None
        deadline = time.monotonic() + max(10.0, self.timeout)
        while not os.path.exists(self.path):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise TargetError(f"{words[0]} does not listen at {self.path}: {self._said() or 'it says nothing'}")
            time.sleep(0.005)

    def fate(self) -> str:
        """What became of the process, if it ended with a failure."""
        if self._process is None:
            return ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            # A program that dies may tell of it at length.
            self._process.wait(min(self.timeout, PATIENCE))
        status = self._process.poll()
        if status is None or status == 0:
            return ""
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        said = self._said()
        return f"the back-end {how}{f': {said}' if said else ''}"

    def why_dead(self) -> str:
        """Why it does not serve another connection; empty if it does."""
        if self.serves_once:
            # It may well end with a failure after nonsense; a signal is another matter.
            fate = self.fate()
            return fate if "was killed" in fate else ""
        if self._process is not None and self._process.poll() is not None:
            return self.fate() or "the back-end ended"
        deadline = time.monotonic() + min(self.timeout, PATIENCE)
        while True:
            wire: Wire | None = None
            try:
                wire = self._open()
                wire.ask("GET_FEATURES")
            except OSError as error:
                return self.fate() or f"afterwards the back-end accepts no connection ({error.strerror or error})"
            except (Closed, Silent) as error:
                # The connection may have been waiting at a socket that was given up.
                if isinstance(error, Silent) or time.monotonic() > deadline:
                    return self.fate() or f"on the next connection GET_FEATURES is not answered: {error}"
            else:
                return ""
            finally:
                if wire is not None:
                    wire.close()
            time.sleep(0.005)

    def _said(self) -> str:
        # Not by seeking: the process writes where we read.
        output = os.pread(self._errors.fileno(), 1 << 16, self._heard)
        lines = output.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def forget_what_was_said(self) -> None:
        """What the process has printed so far is not about what comes."""
        self._heard = os.fstat(self._errors.fileno()).st_size

    def stop(self) -> None:
        """End the process that was started."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def close(self) -> None:
        """End everything."""
        self.stop()
        self._errors.close()
        if self._folder is not None:
            self._folder.cleanup()


# --- One run of a check -----------------------------------------------------------------------------------------------


class Case:
    """What a check has: connections, memory and rings, all of which are gone when it ends."""

    def __init__(self, target: Target, facts: Facts, device: DeviceType) -> None:
        self.facts = facts
        self.device = device
        self.exercise: Exercise = exercise_for(device)
        self.timeout = target.timeout
        self.last: Wire | None = None
        self.expects_death = False
        """Whether it is not this check's finding that the back-end is dead."""
        self._target = target
        self._connections = 0
        self._accompanied: set[Wire] = set()
        self._owned = contextlib.ExitStack()

    def close(self) -> None:
        """Close everything."""
        self._owned.close()

    def died(self) -> str:
        """What became of the back-end, if it is dead, and may be."""
        dead = self._target.why_dead()
        if dead:
            self.expects_death = True
        return dead

    def connect(self) -> Wire:
        """A new connection on which nothing was said."""
        if self._connections and self._target.serves_once:
            raise Skipped("the back-end serves one connection only")
        self._connections += 1
        self.last = self.own(self._target.connect())
        return self.last

    def own(self, thing: Owned) -> Owned:
        """Close `thing` when the check ends."""
        self._owned.callback(thing.close)
        return thing

    def memory(self, **where: int) -> Memory:
        """Guest memory, not shared yet."""
        return self.own(Memory(**where))

    def negotiated(self, *extra: Feature | Protocol, without: int = 0) -> Wire:
        """A connection with the features of the device type, VERSION_1, acknowledgements, and `extra`."""
        wire = self.connect()
        protocol = self.facts.protocol & (Protocol.MQ | Protocol.REPLY_ACK | Protocol.CONFIG)
        features = self.device_features | self.facts.features & (Feature.VERSION_1 | Feature.PROTOCOL_FEATURES)
        for flag in extra:
            if isinstance(flag, Protocol):
                protocol |= flag
            else:
                features |= flag
        # Known from another connection; but rust-vmm's crates acknowledge nothing before they are asked.
        wire.ask("GET_FEATURES")
        wire.send("SET_OWNER")
        if self.facts.has("PROTOCOL_FEATURES"):
            wire.ask("GET_PROTOCOL_FEATURES")
            wire.protocol = protocol
            self.tell(wire, "SET_PROTOCOL_FEATURES", u64(protocol))
        self.tell(wire, "SET_FEATURES", u64(features & ~without))
        return wire

    @property
    def device_features(self) -> int:
        """What is offered of the device type."""
        return self.facts.features & ~sum(1 << bit for bit in range(24, 42))

    def tell(self, wire: Wire, request: str, payload: bytes = b"", descriptors: Sequence[int] = ()) -> None:
        """A request that must be accepted."""
        if wire.protocol & Protocol.REPLY_ACK:
            answer = wire.ask(request, payload, descriptors, flags=VERSION | NEED_REPLY)
            if answer.request != IDS[request] or answer.u64:
                raise Failed(f"the back-end answered {answer}", f"{request} is accepted with an acknowledgement of 0")
        else:
            # What comes next may be a kick, which does not wait for messages that came before.
            wire.send(request, payload, descriptors)
            wire.ask("GET_FEATURES")

    def outcome(self, wire: Wire, request: str | int, payload: bytes = b"", descriptors: Sequence[int] = ()) -> str:
        """What becomes of a request that is not one: "refused", "closed" or "accepted".

        Raises:
            Failed: it was not answered at all, though that was asked for.
        """
        try:
            if wire.acknowledged(request, payload, descriptors):
                return "refused"
            # Some acknowledge what they did not do, and end the connection then: nobody is deceived for long.
            wire.ask("GET_FEATURES")
            return "accepted"
        except Closed:
            return "closed"
        except Silent:
            raise Failed("the back-end neither answers nor closes the connection", "a refusal in time") from None

    def is_closed(self, wire: Wire, send: Callable[[list[int]], object]) -> bool:
        """Whether a descriptor that `send` sends is closed in the back-end when the connection has ended."""
        reading, writing = os.pipe()
        with open(reading, "rb", buffering=0) as ends:
            try:
                send([writing])
            finally:
                os.close(writing)
                wire.close()
            return bool(select.select([ends], [], [], min(self.timeout, 10 * QUIET))[0])

    def must_refuse(
        self, wire: Wire, why: str, request: str, payload: bytes = b"", descriptors: Sequence[int] = ()
    ) -> None:
        """An acknowledgement of 0 is a lie: `why`."""
        if self.outcome(wire, request, payload, descriptors) == "accepted":
            raise Failed(
                f"the back-end acknowledged {request} with 0, success, but {why}",
                "an acknowledgement other than 0, or the end of the connection",
            )

    def should_refuse(
        self, wire: Wire, why: str, who: str, request: str, payload: bytes = b"", descriptors: Sequence[int] = ()
    ) -> None:
        """The text does not say what becomes of it, and `who` accept it as well."""
        if self.outcome(wire, request, payload, descriptors) == "accepted":
            raise Differs(f"accepted, though {why}; {who}", "a refusal, or the end of the connection")

    def share(self, wire: Wire, *memories: Memory) -> None:
        """SET_MEM_TABLE."""
        table = struct.pack("=II", len(memories), 0) + b"".join(memory.region() for memory in memories)
        self.tell(wire, "SET_MEM_TABLE", table, [memory.descriptor for memory in memories])

    def place(self, wire: Wire, ring: Ring, base: int | None = None) -> None:
        """Everything about a ring that is not a descriptor."""
        self.tell(wire, "SET_VRING_NUM", vring_state(ring.index, ring.size))
        self.tell(wire, "SET_VRING_BASE", vring_state(ring.index, ring.fresh if base is None else base))
        self.tell(wire, "SET_VRING_ADDR", ring.address_payload())

    def new_ring(self, memory: Memory, *, index: int | None = None, size: int = 16, base: int = 0) -> SplitRing:
        """A split ring in memory that nobody was told of."""
        return self.own(SplitRing(memory, self.exercise.queue if index is None else index, size, base))

    def new_packed_ring(
        self, memory: Memory, *, index: int | None = None, size: int = 16, base: int = PackedRing.fresh
    ) -> PackedRing:
        """A packed ring in memory that nobody was told of."""
        return self.own(PackedRing(memory, self.exercise.queue if index is None else index, size, base))

    def start(self, wire: Wire, ring: Ring, base: int | None = None, *, enable: bool = True) -> None:
        """Set a ring up, kick it, and enable it."""
        self.start_companions(wire, ring.memory, enable=enable, packed=isinstance(ring, PackedRing))
        self.place(wire, ring, base)
        self.tell(wire, "SET_VRING_CALL", u64(ring.index), [ring.call.descriptor])
        self.tell(wire, "SET_VRING_ERR", u64(ring.index), [ring.error.descriptor])
        self.tell(wire, "SET_VRING_KICK", u64(ring.index), [ring.kick.descriptor])
        if enable:
            self.enable(wire, ring)

    def start_companions(self, wire: Wire, memory: Memory, *, enable: bool = True, packed: bool = False) -> None:
        """Start the queues before that of the exercise, once: DPDK works on a pair of queues when both are there."""
        if wire in self._accompanied:
            return
        self._accompanied.add(wire)
        new_ring = self.new_packed_ring if packed else self.new_ring
        for index in range(self.exercise.queue):
            self.start(wire, new_ring(memory, index=index), enable=enable)

    def stop_companions(self, wire: Wire) -> None:
        """Stop the queues before that of the exercise."""
        for index in range(self.exercise.queue):
            wire.ask("GET_VRING_BASE", vring_state(index))

    def enable(self, wire: Wire, ring: Ring, on: bool = True) -> None:
        """SET_VRING_ENABLE, where there is that."""
        if self.facts.has("PROTOCOL_FEATURES"):
            self.tell(wire, "SET_VRING_ENABLE", vring_state(ring.index, int(on)))

    def running(
        self, *extra: Feature | Protocol, size: int = 16, base: int = 0, without: int = 0
    ) -> tuple[Wire, SplitRing]:
        """A connection with one split ring that runs."""
        wire = self.negotiated(*extra, without=without)
        memory = self.memory()
        self.share(wire, memory)
        ring = self.new_ring(memory, size=size, base=base)
        self.start(wire, ring, base)
        return wire, ring

    def running_packed(
        self, *extra: Feature | Protocol, size: int = 16, base: int = PackedRing.fresh
    ) -> tuple[Wire, PackedRing]:
        """A connection with one packed ring that runs."""
        wire = self.negotiated(Feature.RING_PACKED, *extra)
        memory = self.memory()
        self.share(wire, memory)
        ring = self.new_packed_ring(memory, size=size, base=base)
        self.start(wire, ring, base)
        return wire, ring

    def stop(self, wire: Wire, ring: Ring) -> int:
        """GET_VRING_BASE. Returns the base."""
        answer = wire.ask("GET_VRING_BASE", vring_state(ring.index))
        if len(answer.payload) != 8 or answer.payload[:4] != struct.pack("=I", ring.index):
            raise Failed(f"the back-end answered {answer}", f"index {ring.index} and a base, in 8 bytes")
        return int(struct.unpack_from("=I", answer.payload, 4)[0])

    def perform(self, ring: Ring, count: int = 1, *, indirect: bool = False, memory: Memory | None = None) -> bytes:
        """Requests that the device has to complete, one after the other. Returns what is in the room of the last."""
        data = b""
        for _ in range(count):
            chain = ring.add(self.exercise.readable, self.exercise.writable, indirect=indirect, memory=memory)
            ring.kick.signal()
            entries = ring.wait(1, self.timeout)
            if not entries:
                raise Failed(
                    f"queue {ring.index}: the request was not completed within {self.timeout:g} s", "a used entry"
                )
            room = (memory or ring.memory).read
            data = b"".join(room(address, size) for address, size in chain.writable)
            self.judge(ring, [(chain.head, data)], entries)
        return data

    def perform_together(self, ring: Ring) -> None:
        """As many requests as fit in the ring, made available with one kick."""
        count = ring.size // max(1, len(self.exercise.readable) + len(self.exercise.writable))
        chains = [ring.add(self.exercise.readable, self.exercise.writable) for _ in range(count)]
        ring.kick.signal()
        entries = ring.wait(count, self.timeout)
        if len(entries) < count:
            raise Failed(f"{len(entries)} of {count} requests were completed within {self.timeout:g} s", "all of them")
        self.judge(ring, [(chain.head, ring.data(chain)) for chain in chains], entries)

    def judge(self, ring: Ring, chains: Sequence[tuple[int, bytes]], entries: Sequence[tuple[int, int]]) -> None:
        """Used entries against the heads that were offered, and what is in their room."""
        data = dict(chains)
        if sorted(head for head, _ in entries) != sorted(data):
            raise Failed(f"used entries {entries} (head, length)", f"one for each of the heads {sorted(data)}")
        for head, length in entries:
            if length > len(data[head]):
                raise Failed(
                    f"head {head}: {length} bytes written to room of {len(data[head])}", "no more than there is room"
                )
            problem = self.exercise.problem(data[head], length)
            if problem:
                raise Failed(f"head {head}: {problem}", "what the device type asks for")

    def alive(self, wire: Wire) -> str:
        """After nonsense in a ring: "answers" or "closed".

        Raises:
            Failed: neither.
        """
        try:
            wire.ask("GET_FEATURES")
        except Closed:
            return "closed"
        except Silent:
            raise Failed(
                "the back-end does not answer GET_FEATURES any more, nor does it close the connection",
                "the main channel is served, whatever is in a ring",
            ) from None
        return "answers"


# --- All of them ------------------------------------------------------------------------------------------------------


class Suite:
    """Runs checks against a back-end.

    Raises:
        TargetError: there is no back-end at the other end.
    """

    def __init__(self, target: Target, device: DeviceType | None = None) -> None:
        self.target = target
        self.facts = self._learn()
        self.device, self.reason = (device, "by --device") if device else self._guess()
        self._gone = ""
        self._works: str | None = None

    def run(self, names: Sequence[str], *, forced: bool = False) -> Iterator[Result]:
        """The results of these checks, one after the other; `forced`: also of those that may kill."""
        for name in names:
            yield self.run_one(CHECKS[name], forced)

    def run_one(self, chosen: Check, forced: bool = False) -> Result:
        """The result of one check."""
        if self._gone:
            return Result(chosen, Verdict.ERROR, f"the back-end is gone since {self._gone}")
        began = time.monotonic()
        self.target.forget_what_was_said()
        case = Case(self.target, self.facts, self.device)
        verdict, reason, expected = Verdict.PASS, "", ""
        try:
            self._require(chosen, forced)
            chosen.run(case)
        except Outcome as outcome:
            verdict, reason, expected = outcome.verdict, outcome.reason, outcome.expected
        except (Closed, Silent) as error:
            verdict, reason, expected = Verdict.FAIL, str(error), "an answer"
        except TargetError as error:
            verdict, reason = Verdict.ERROR, str(error)
        finally:
            log = tuple(case.last.log) if case.last else ()
            case.close()
        if verdict is not Verdict.SKIP:
            dead = self.target.why_dead()
            if dead and not case.expects_death:
                verdict = Verdict.FAIL
                reason = f"{reason}; {dead}" if reason else dead
                expected = expected or "the back-end lives, and serves the next connection"
            if dead:
                if self.target.command is None:
                    self._gone = chosen.name
                else:
                    self.target.stop()
            elif self.target.serves_once:
                self.target.stop()
        return Result(chosen, verdict, reason, expected, log, time.monotonic() - began)

    def _require(self, chosen: Check, forced: bool) -> None:
        if chosen.may_kill and not forced and self.target.command is None:
            raise Skipped("it kills some back-ends: name it with --only, or let --command start them anew")
        if chosen.device and chosen.device != self.device.name:
            raise Skipped(f"for --device {chosen.device}")
        for need in chosen.needs:
            if need == "request":
                if self._why_no_request():
                    raise Skipped(self._why_no_request())
            elif not self.facts.has(need):
                raise Skipped(f"{need} is not offered")

    def _why_no_request(self) -> str:
        """Why there is no request that the device completes; empty if there is."""
        if self._works is None:
            self._works = ""
            case = Case(self.target, self.facts, self.device)
            try:
                _, ring = case.running()
                ring.add(case.exercise.readable, case.exercise.writable)
                ring.kick.signal()
                if not ring.wait(1, case.timeout):
                    raise Failed(f"not within {case.timeout:g} s")
            except (Outcome, Closed, Silent, TargetError) as error:
                known = "see ring.completes-a-request" if case.exercise.is_certain else "say what it is: --device"
                self._works = f"the device completes no request ({error}); {known}"
            finally:
                case.close()
            if self.target.why_dead() and self.target.command is None:
                self._gone = "its first request"
            if self.target.serves_once:
                self.target.stop()
        return self._works

    def _guess(self) -> tuple[DeviceType, str]:
        """What the device is by its looks. A mistake here must not end everything."""
        unknown = UNKNOWN, "a back-end does not tell; --device lets more be checked"
        with contextlib.suppress(VhostUserError, OSError):
            wire = self.target.connect()
            # The front-end owns the socket from now on.
            with Frontend(wire.socket, timeout=self.target.timeout) as frontend:
                info = inspect(frontend)
            return (info.device, info.reason) if info.device is not UNKNOWN else unknown
        return unknown

    def _learn(self) -> Facts:
        """What is offered, by a connection of its own; and whether there can be another."""
        wire = self.target.connect()
        identity = self.target.identity()
        try:
            features = wire.ask("GET_FEATURES").u64
            if features < 0:
                raise TargetError("GET_FEATURES was not answered with eight bytes: no vhost-user back-end?")
            protocol, queues = 0, None
            if features & Feature.PROTOCOL_FEATURES:
                protocol = max(0, wire.ask("GET_PROTOCOL_FEATURES").u64)
                wire.send("SET_PROTOCOL_FEATURES", u64(protocol & (Protocol.MQ | Protocol.REPLY_ACK)))
                queues = max(0, wire.ask("GET_QUEUE_NUM").u64) if protocol & Protocol.MQ else None
        except (Closed, Silent) as error:
            raise TargetError(f"{self.target.path}: {error}; no vhost-user back-end?") from None
        finally:
            wire.close()
        facts = Facts(features, protocol, queues)
        dead = self.target.why_dead()
        self.target.listens_anew = not dead and self.target.identity() != identity
        if dead:
            if self.target.command is None:
                raise TargetError(
                    "the back-end serves one connection only, but every check needs its own; "
                    'let it be started for each: --command "PROGRAM {socket}"'
                )
            self.target.serves_once = True
            self.target.stop()
        return facts


def selected(patterns: Sequence[str]) -> list[str]:
    """The names of checks that match any of `patterns`, in order; all without patterns. A group is a pattern, too."""
    if not patterns:
        return list(CHECKS)
    wanted = [*patterns, *(f"{pattern}.*" for pattern in patterns)]
    return [name for name in CHECKS if any(fnmatch.fnmatch(name, pattern) for pattern in wanted)]


def fail(reason: str, expected: str) -> NoReturn:
    """Wrong by the text."""
    raise Failed(reason, expected)
