"""Virtual machine monitors that run a guest without an operating system, see `bare/guest.c`.

QEMU is always one of them. Others need KVM, and have to be named, each by a variable of the environment with the path
of its program: VHOST_USER_CLOUD_HYPERVISOR, VHOST_USER_CROSVM, VHOST_USER_FIRECRACKER.
"""

from __future__ import annotations

import json
import os
import shlex
import struct
import subprocess
import time
from pathlib import Path
from typing import Self

import pytest

from devices.running import wait_for
from vhost_user.guest import _newest_build

BARE = Path(__file__).parent / "bare"
BLOCK = 4096

#: So that it runs wherever it is loaded, and needs nothing that KVM may not emulate.
FLAGS = """
    -m64 -O1 -Wall -Wextra -Werror -ffreestanding -fno-pic -no-pie -static -nostdlib -mno-red-zone -mgeneral-regs-only
    -fno-stack-protector -fcf-protection=none -Wl,--build-id=none -Wl,--no-warn-rwx-segments
"""


def compile_guest(folder: Path) -> Path:
    """The guest, in `folder`."""
    path = folder / "guest"
    sources = [BARE / "start.S", BARE / "guest.c"]
    command = ["cc", *shlex.split(FLAGS), f"-Wl,-T,{BARE / 'guest.ld'}", "-o", str(path), *map(str, sources)]
    subprocess.run(command, check=True, timeout=60)
    return path


class Orders:
    """The last two blocks of a disk: what the guest is told, and tells."""

    def __init__(self, image: Path) -> None:
        self.image = image

    def give(self, rounds: int, lives: int = 1, *, entropy: bool = False) -> None:
        with self.image.open("r+b") as file:
            file.seek(-BLOCK, os.SEEK_END)
            file.write(struct.pack("<QQQ", rounds, lives, entropy))

    @property
    def rounds(self) -> int:
        """How many the guest has done of its life, or a few less."""
        with self.image.open("rb") as file:
            file.seek(-2 * BLOCK + 8, os.SEEK_END)
            return int.from_bytes(file.read(8), "little")

    def wait_for_rounds(self, number: int) -> None:
        enough = self.rounds + number
        wait_for(lambda: self.rounds >= enough, 120)


class Monitor:
    """A virtual machine monitor that runs the guest. What the guest says is in a file."""

    name = ""
    #: Where to look for the program.
    variable = ""
    #: Whether it resets its devices when the driver does.
    resets = True
    #: Whether a queue may have interrupts, by MSI-X.
    interrupts = True

    def __init__(self, folder: Path, guest: Path, disk: Path, entropy: Path | None) -> None:
        self.folder = folder
        folder.mkdir()
        self.said, self.log = folder / "said", folder / "log"
        self.guest, self.disk, self.entropy = guest, disk, entropy
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def program(cls) -> str:
        """Its path; empty if nobody has named it."""
        return os.environ.get(cls.variable, "")

    def command(self) -> list[str]:
        """What it is started with."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [self.program(), *self.command()], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        for left in ("api", "machine"):
            (self.folder / left).unlink(missing_ok=True)

    def wait_for(self, text: str) -> str:
        """What the guest has said, with `text` in it."""

        def said() -> str:
            return self.said.read_text(errors="replace") if self.said.exists() else ""

        deadline = time.monotonic() + 120
        while True:
            assert self._process is not None
            is_over = self._process.poll() is not None or time.monotonic() > deadline
            if text in said():
                return said()
            assert not is_over, said() + self.log.read_text(errors="replace")[-2000:]
            assert not {"wrong", "page", "refused"} & set(said().split()), said()
            time.sleep(0.05)


class Qemu(Monitor):
    name = "QEMU"

    @classmethod
    def program(cls) -> str:
        return str(_newest_build("qemu-*/qemu-system-x86_64"))

    def command(self) -> list[str]:
        devices = ["-chardev", f"socket,id=disk,path={self.disk},reconnect-ms=100"]
        devices += ["-device", "vhost-user-blk-pci-non-transitional,chardev=disk"]
        if self.entropy:
            devices += ["-chardev", f"socket,id=entropy,path={self.entropy}"]
            devices += ["-device", "vhost-user-rng-pci,chardev=entropy"]
        return [
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            # For the second processor see vhost_user.guest.Qemu.
            *("-machine", "q35", "-accel", "tcg", "-smp", "1,maxcpus=2"),
            *("-m", "256M", "-numa", "node,memdev=memory"),
            *("-object", "memory-backend-memfd,id=memory,size=256M,share=on"),
            *("-kernel", str(self.guest), "-serial", f"file:{self.said}"),
            *devices,
        ]


class CloudHypervisor(Monitor):
    name = "cloud-hypervisor"
    variable = "VHOST_USER_CLOUD_HYPERVISOR"

    def command(self) -> list[str]:
        command = ["--kernel", str(self.guest), "--memory", "size=256M,shared=on", "--cpus", "boot=1,nested=off"]
        command += ["--serial", f"file={self.said}", "--console", "off", *self.api()]
        command += ["--disk", f"vhost_user=true,socket={self.disk}"]
        if self.entropy:
            entropy = f"socket={self.entropy},device_type=4,queue_sizes=[64],pci_device_id=30"
            command += ["--generic-vhost-user", entropy]
        return command

    def api(self) -> list[str]:
        # Its own filter of system calls would end the thread that migrates.
        return ["--api-socket", str(self.folder / "api"), "--seccomp", "false"]


class Crosvm(Monitor):
    name = "crosvm"
    variable = "VHOST_USER_CROSVM"

    def command(self) -> list[str]:
        return [
            *("run", "--disable-sandbox", "--mem", "256", "--cpus", "1", "--no-rng"),
            *("--serial", f"type=file,path={self.said},hardware=serial,num=1"),
            *("--vhost-user", f"type=block,socket={self.disk}"),
            *(["--vhost-user", f"type=rng,socket={self.entropy}"] if self.entropy else []),
            str(self.guest),
        ]


class Firecracker(Monitor):
    """It has no other vhost-user devices than disks."""

    name = "Firecracker"
    variable = "VHOST_USER_FIRECRACKER"
    resets = False
    interrupts = False
    options: tuple[str, ...] = ()

    def command(self) -> list[str]:
        self.said = self.log
        disk = {"drive_id": "disk", "is_root_device": False, "cache_type": "Unsafe", "socket": str(self.disk)}
        machine = {
            "boot-source": {"kernel_image_path": str(self.guest)},
            "drives": [disk],
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 256},
        }
        config = self.folder / "machine.json"
        config.write_text(json.dumps(machine))
        return ["--no-api", "--config-file", str(config), *self.options]


class FirecrackerPci(Firecracker):
    interrupts = True
    options = ("--enable-pci",)


def monitors(*kinds: type[Monitor]) -> pytest.MarkDecorator:
    """For each of them that there is."""
    return pytest.mark.parametrize(
        "kind",
        [
            pytest.param(
                kind,
                marks=pytest.mark.skipif(
                    kind is not Qemu and not kind.program(), reason=f"{kind.variable} names no program"
                ),
            )
            for kind in kinds
        ],
        ids=[kind.__name__ for kind in kinds],
    )
