"""The device's own state: saved by one back-end, loaded by another. vhost-user, "Migrating back-end state"."""

from __future__ import annotations

import os
import select
import struct
import time

from .harness import Case, check, fail
from .wire import Closed, Protocol, Wire

_TRANSFER = "vhost-user: VHOST_USER_SET_DEVICE_STATE_FD"
_SAVE, _LOAD = 0, 1
#: In the answer: the back-end has no descriptor of its own for it.
_NO_DESCRIPTOR = 1 << 8
#: More is no state of a device that was not used.
_MOST = 1 << 26


@check("state.saves", _TRANSFER, needs="DEVICE_STATE")
def saves(case: Case) -> None:
    """The back-end writes its state, all of it, to the pipe that it is given, closes that, and says that it did."""
    _save(case, case.negotiated(Protocol.DEVICE_STATE))


@check("state.loads", _TRANSFER, needs="DEVICE_STATE")
def loads(case: Case) -> None:
    """A back-end loads what it saved, up to the end, and says that it did."""
    first = case.negotiated(Protocol.DEVICE_STATE)
    state = _save(case, first)
    first.close()
    wire = case.negotiated(Protocol.DEVICE_STATE)
    reader, writer = os.pipe()
    ours = _transfer(case, wire, _LOAD, reader, writer)
    try:
        os.set_blocking(ours, False)
        deadline = time.monotonic() + case.timeout
        while state:
            if not select.select([], [ours], [], max(0.0, deadline - time.monotonic()))[1]:
                fail(f"{len(state)} bytes of its state are not read within {case.timeout:g} s", "all of it is read")
            try:
                state = state[os.write(ours, state) :]
            except BrokenPipeError:
                fail(f"it does not read the last {len(state)} bytes of its own state", "all of it is read")
    finally:
        os.close(ours)
    _finish(wire)


@check("state.goes-on-after-saving", "vhost-user: Suspended device state", needs="DEVICE_STATE request")
def goes_on_after_saving(case: Case) -> None:
    """A device that was stopped and saved works when its rings are started again: the migration may have failed."""
    wire, ring = case.running(Protocol.DEVICE_STATE)
    case.perform(ring)
    base = case.stop(wire, ring)
    case.stop_companions(wire)
    _save(case, wire)
    case.start(wire, ring, base)
    case.perform(ring)


@check("state.unknown-direction", _TRANSFER, needs="DEVICE_STATE")
def unknown_direction(case: Case) -> None:
    """A transfer that is neither saving nor loading is refused."""
    wire = case.negotiated(Protocol.DEVICE_STATE)
    reader, writer = os.pipe()
    try:
        answer = wire.ask("SET_DEVICE_STATE_FD", struct.pack("=II", 7, 0), [writer]).u64
    except Closed:
        return
    finally:
        os.close(reader)
        os.close(writer)
    if not answer & 0xFF:
        fail(f"direction 7 is answered with {answer:#x}, success", "an error in the lowest byte")


def _save(case: Case, wire: Wire) -> bytes:
    reader, writer = os.pipe()
    ours = _transfer(case, wire, _SAVE, writer, reader)
    state = bytearray()
    deadline = time.monotonic() + case.timeout
    try:
        while True:
            if not select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0]:
                fail(f"after {len(state)} bytes nothing came for {case.timeout:g} s, not even the end", "the end")
            piece = os.read(ours, 1 << 16)
            if not piece:
                break
            state += piece
            if len(state) > _MOST:
                fail(f"more than {_MOST >> 20} MiB of state", "the end of it")
    finally:
        os.close(ours)
    _finish(wire)
    return bytes(state)


def _transfer(case: Case, wire: Wire, direction: int, theirs: int, ours: int) -> int:
    """Begin a transfer through a pipe. Returns the end that is ours, or that which the back-end wants to be used."""
    try:
        wire.send("SET_DEVICE_STATE_FD", struct.pack("=II", direction, 0), [theirs])
        answer, descriptors = wire.receive_with_descriptors()
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    if answer.u64 == 0 and len(descriptors) == 1:
        os.close(ours)
        return descriptors[0]
    for descriptor in descriptors:
        os.close(descriptor)
    if answer.u64 != _NO_DESCRIPTOR or descriptors:
        os.close(ours)
        fail(f"the back-end answered {answer}", f"{_NO_DESCRIPTOR:#x}, or 0 and a descriptor of its own")
    return ours


def _finish(wire: Wire) -> None:
    """CHECK_DEVICE_STATE."""
    status = wire.ask("CHECK_DEVICE_STATE").u64
    if status:
        fail(f"CHECK_DEVICE_STATE is answered with {status:#x}", "0: the transfer succeeded")
