"""QEMU's vhost-user disk, which nobody here wrote: to look at, and to judge."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from specimens import is_listening


def arguments(folder: Path, path: Path | str, queues: int = 1) -> list[str]:
    """The command that serves a disk of a mebibyte at `path`."""
    disk = folder / "storage.img"
    with disk.open("wb") as file:
        file.truncate(1 << 20)
    export = f"vhost-user-blk,id=export,node-name=disk,writable=on,num-queues={queues},addr.type=unix,addr.path={path}"
    return ["qemu-storage-daemon", "--blockdev", f"file,node-name=disk,filename={disk}", "--export", export]


@contextlib.contextmanager
def storage_daemon(folder: Path, queues: int = 1) -> Iterator[Path]:
    """Serve a disk of a mebibyte, in the block. Gives the path of its socket."""
    path = folder / "storage.sock"
    with subprocess.Popen(arguments(folder, path, queues), stderr=subprocess.DEVNULL) as daemon:
        try:
            deadline = time.monotonic() + 30
            while not is_listening(path):
                assert daemon.poll() is None, "qemu-storage-daemon ended"
                assert time.monotonic() < deadline, "qemu-storage-daemon does not listen"
                time.sleep(0.005)
            yield path
        finally:
            daemon.terminate()
