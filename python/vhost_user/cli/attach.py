"""What to paste into the command line of a virtual machine, so that it uses a device."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ..ids import DeviceId

if TYPE_CHECKING:
    from ..device import Device

#: QEMU's model of a device type. Every other type gets the generic one.
MODELS = {
    DeviceId.BLOCK: "vhost-user-blk-pci",
    DeviceId.RNG: "vhost-user-rng-pci",
    DeviceId.SCSI: "vhost-user-scsi-pci",
    DeviceId.GPU: "vhost-user-gpu-pci",
    DeviceId.RTC: "vhost-user-rtc-pci",
    DeviceId.INPUT: "vhost-user-input-pci",
    DeviceId.VSOCK: "vhost-user-vsock-pci",
    DeviceId.SOUND: "vhost-user-snd-pci",
    DeviceId.FS: "vhost-user-fs-pci",
    DeviceId.I2C_ADAPTER: "vhost-user-i2c-pci",
    DeviceId.GPIO: "vhost-user-gpio-pci",
    DeviceId.SPI: "vhost-user-spi-pci",
}
GENERIC = "vhost-user-test-device-pci"

#: The device types that QEMU 11.1 has heard of. With any other, it aborts as soon as it makes the device.
KNOWN = {*range(1, 14), *range(16, 42), DeviceId.SPI}

#: What crosvm calls the device types that it has heard of.
CROSVM = {
    DeviceId.NET: "net",
    DeviceId.BLOCK: "block",
    DeviceId.CONSOLE: "console",
    DeviceId.RNG: "rng",
    DeviceId.SCSI: "scsi",
    DeviceId.GPU: "gpu",
    DeviceId.INPUT: "input",
    DeviceId.VSOCK: "vsock",
    DeviceId.SOUND: "sound",
    DeviceId.FS: "fs",
}

#: What the memory of a QEMU guest has to be for any vhost-user device: a file that another process can map.
MEMORY = ["-m", "1G", "-object", "memory-backend-memfd,id=mem,size=1G,share=on", "-numa", "node,memdev=mem"]


def instructions(device: Device, *, listening: Path | None = None, connecting: Path | None = None) -> str:
    """How a front-end gets to `device`, which listens at a path, or connects to one, or has a socket without a name."""
    name = type(device).__name__
    if listening is not None:
        return (
            f"{name} is served at {listening}; Ctrl-C ends it. To attach it:\n"
            f"  QEMU             {qemu(device, listening)}\n"
            f"  cloud-hypervisor {cloud_hypervisor(device, listening)}\n"
            f"  crosvm           {crosvm(device, listening)}\n"
            f"  User-Mode Linux  {user_mode_linux(device, listening)}"
        )
    if connecting is not None:
        return (
            f"{name} is connected at {connecting}; Ctrl-C ends it. The front-end there may be:\n"
            f"  QEMU             {qemu(device, connecting, server=True)}"
        )
    return f"{name} is served at the inherited socket; Ctrl-C ends it."


def qemu(device: Device, path: Path, *, server: bool = False) -> str:
    """The arguments of QEMU, for a shell: shared memory, the socket, and the device model; or why there are none."""
    if device.device_id not in KNOWN:
        return f"(has no name for devices of type {int(device.device_id)}, and refuses them)"
    chardev = type(device).__name__.lower()
    # QEMU splits at commas, and takes a doubled one for itself.
    socket = f"socket,id={chardev},path={_absolute(path).replace(',', ',,')}" + (",server=on" * server)
    if device.device_id == DeviceId.NET:
        model = ["-netdev", f"vhost-user,id=net0,chardev={chardev}", "-device", "virtio-net-pci,netdev=net0"]
    elif device.device_id == DeviceId.CRYPTO:
        half = f"cryptodev-vhost-user,id=crypto0,chardev={chardev}"
        # It would not tell the device what its driver does with the ring.
        model = ["-object", half, "-device", "virtio-crypto-pci,cryptodev=crypto0,event_idx=off,indirect_desc=off"]
    else:
        model = ["-device", f"{_model(device)},chardev={chardev}"]
    return shlex.join([*MEMORY, "-chardev", socket, *model])


def cloud_hypervisor(device: Device, path: Path) -> str:
    """The arguments of cloud-hypervisor, for a shell: shared memory, and the device."""
    socket, queues = f"socket={_quoted(path)}", len(device.queues)
    processors = 1
    match device.device_id:
        case DeviceId.NET:
            processors = queues // 2
            option = ["--net", f"vhost_user=true,num_queues={2 * processors},{socket}"]
        case DeviceId.BLOCK:
            processors = queues
            option = ["--disk", f"vhost_user=true,num_queues={queues},{socket}"]
        case DeviceId.FS:
            processors = queues - 1
            option = ["--fs", f"tag=shared,num_queues={queues - 1},{socket}"]
        case number:
            sizes = ",".join(["256"] * queues)
            option = ["--generic-vhost-user", f"device_type={int(number)},queue_sizes=[{sizes}],{socket}"]
    # It refuses queues that no processor would use.
    cpus = ["--cpus", f"boot={processors}"] if processors > 1 else []
    return shlex.join([*cpus, "--memory", "size=1G,shared=on", *option])


def crosvm(device: Device, path: Path) -> str:
    """The arguments of crosvm, for a shell; or why there are none."""
    if device.device_id not in CROSVM:
        return f"(has no name for devices of type {int(device.device_id)})"
    return shlex.join(["--vhost-user", f"type={CROSVM[DeviceId(device.device_id)]},socket={_quoted(path)}"])


def user_mode_linux(device: Device, path: Path) -> str:
    """The kernel parameter of User-Mode Linux, or why there is none."""
    socket = _absolute(path)
    if any(character in ': "' for character in socket):
        return "(its kernel parameter has no way to write a colon, blank or quote: choose another path)"
    return f"virtio_uml.device={socket}:{int(device.device_id)}"


def _model(device: Device) -> str:
    """The model with the properties that it cannot find out from the device."""
    if device.device_id not in MODELS:
        model = f"{GENERIC},virtio-id={int(device.device_id)},num_vqs={len(device.queues)}"
        return f"{model},config_size={device._layout.size}" if device._layout.size else model
    model = MODELS[DeviceId(device.device_id)]
    match device.device_id:
        case DeviceId.BLOCK:
            # Otherwise it wants as many as the guest has processors, and fails if the device has fewer.
            return f"{model},num-queues={len(device.queues)}"
        case DeviceId.SCSI:
            return f"{model},num_queues={len(device.queues) - 2}"
        case DeviceId.FS:
            return f"{model},tag=shared,num-request-queues={len(device.queues) - 1}"
    return model


def _quoted(path: Path) -> str:
    """As the value of one of several options between commas."""
    absolute = _absolute(path)
    return f'"{absolute}"' if "," in absolute else absolute


def _absolute(path: Path) -> str:
    return os.path.abspath(path)
