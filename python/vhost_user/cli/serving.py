"""Serving a device as a program of its own, by QEMU's conventions for back-end programs.

QEMU, docs/interop/vhost-user.rst, "Backend program conventions".
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..ids import DeviceId
from . import attach
from .command import ENDING, FAILURE, UsageError, ended_by_signals

if TYPE_CHECKING:
    from ..device import Device
    from ..server import Server

logger = logging.getLogger(__name__)

#: Seconds that a device has to finish what it is doing once the process was told to end.
PATIENCE = 1.0

#: Device types that the description files of QEMU call otherwise than Virtio (vhost-user.json, `VHostUserBackendType`).
#: It has no name for the newer ones: those are named alike.
TYPES = {DeviceId.NINE_P: "9p", DeviceId.I2C_ADAPTER: "i2c"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to serve, and what a management program asks."""
    group = parser.add_argument_group("where front-ends connect")
    where = group.add_mutually_exclusive_group()
    where.add_argument("--socket-path", metavar="PATH", type=Path, help="listen at PATH, one front-end after another")
    where.add_argument("--fd", metavar="FDNUM", type=int, help="use an inherited socket, which listens or is connected")
    where.add_argument("--connect", metavar="PATH", type=Path, help="connect to a front-end that listens at PATH")
    group.add_argument("--once", action="store_true", help="end when the first front-end is gone")
    group.add_argument("--mode", type=_mode, default=0o600, help="permissions of the socket, in octal (default: 600)")
    rings = parser.add_argument_group("what is offered to the driver")
    rings.add_argument("--packed-rings", action="store_true", help="packed rings, which User-Mode Linux takes unasked")
    rings.add_argument("--in-order", action="store_true", help="requests are completed in the order of the driver")
    rings.add_argument("--iommu", action="store_true", help="a place behind an IOMMU, which User-Mode Linux has not")
    parser.add_argument("--print-capabilities", action="store_true", help="print the type of device as JSON and exit")


def capabilities(device_id: int, *features: str) -> dict[str, object]:
    """What ``--print-capabilities`` tells (vhost-user.json, `VHostUserBackendCapabilities`)."""
    try:
        known = DeviceId(device_id)
    except ValueError:
        return {"type": f"virtio-{device_id}", "features": list(features)}
    return {"type": TYPES.get(known, known.name.lower().replace("_", "-")), "features": list(features)}


def serve(make: Callable[[], Device], arguments: argparse.Namespace) -> int:
    """Serve the device that `make` makes until the end of the only front-end, or a signal, or Ctrl-C."""
    path, fd, connect = arguments.socket_path, arguments.fd, arguments.connect
    if path is fd is connect is None and "LISTEN_FDS" not in os.environ:
        raise UsageError("say where to serve the device: --socket-path, --fd or --connect")
    with ended_by_signals(status=0):
        device = make()
        device.packed_rings |= arguments.packed_rings
        device.in_order |= arguments.in_order
        device.iommu |= arguments.iommu
        # The device has a thread of its own, so that signals are looked at whatever a handler is doing.
        server = device.start(path, fd=fd, connect=connect, once=arguments.once, mode=arguments.mode)
        try:
            print(attach.instructions(device, listening=path, connecting=connect), file=sys.stderr, flush=True)
            server.wait()
        finally:
            stop(server)
    return 0


def stop(server: Server) -> None:
    """Stop, within a second: a device that hangs ends the process."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    deadline = time.monotonic() + PATIENCE
    while True:
        server.device.stop()
        if server.wait(0.05):
            return
        if time.monotonic() > deadline:
            logger.error("the device did not end within %g s: a handler hangs, or it holds requests", PATIENCE)
            logging.shutdown()
            # An exit in good order would wait for the thread.
            os._exit(FAILURE)


def _mode(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise argparse.ArgumentTypeError(f"expected permissions in octal, from 0 to 777, not {text!r}")
    return mode
