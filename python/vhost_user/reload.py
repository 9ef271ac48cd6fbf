"""New code for a device while a driver uses it.

    with rng.start("/tmp/rng.sock"), Reloader(rng, report=print):
        ...  # edit the file that the class of rng is in

`swap` makes a device an instance of another class; `Reloader` does so whenever its source file changes.

The device stays the same object: its attributes, its configuration space and the driver's requests are kept, and
``__init__`` is not called again. The swap happens between two requests: those that were begun are finished with the old
code, those that wait get the new one. Methods that the loop of the device calls (watches, timers) are new from then on;
functions and objects that the device keeps are not: :meth:`Device.on_reload` is the place to bring them up to date.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from functools import reduce
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self, cast

from .device import Device
from .errors import DeclarationError, StateError

__all__ = ["Reloader", "swap"]

#: Seconds between two looks at a file. It is loaded once two of them saw the same.
INTERVAL = 0.1


def swap(device: Device, new_class: type[Device]) -> Future[None]:
    """Make `device` an instance of `new_class`, from any thread.

    Returns a future that is done when the new code is in charge: at once if the device is not served, else after the
    request that is being handled; coroutines that are under way get a second to finish. It fails, and the device keeps
    its old class, with:

        DeclarationError: the class differs in what a driver that is running was told already: device id, features,
            queues, fields of the configuration space.
        Exception: whatever :meth:`Device.on_reload` raised.
    """
    changed: Future[None] = Future()
    device._runtime.change_class(new_class, changed)
    return changed


class Reloader:
    """Loads the classes of `devices` anew when their source files change, and swaps them, within a ``with`` block.

    A file that fails to load, or a class that cannot be swapped, leaves the old one in charge. `report` gets a line
    that says so, or that the new code is there; it is called on a thread of its own.

    Raises:
        StateError: the source file of a class cannot be found.
    """

    def __init__(self, *devices: Device, report: Callable[[str], object]) -> None:
        self._report = report
        self._devices: dict[Path, list[Device]] = {}
        for device in devices:
            self._devices.setdefault(_source(type(device)), []).append(device)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vhost-user reload", daemon=True)

    def __enter__(self) -> Self:
        self._loaded = {path: _identity(path) for path in self._devices}
        self._seen = dict(self._loaded)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        # Not for ever: the file may be one that does not come to an end.
        self._thread.join(1)

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL):
            for path in self._devices:
                now, before = _identity(path), self._seen[path]
                self._seen[path] = now
                # Editors truncate a file, or have none for a moment, before they write what is new.
                if now is not None and now == before and now != self._loaded[path]:
                    self._loaded[path] = now
                    self._report(self._reload(path))

    def _reload(self, path: Path) -> str:
        """Load the file, and swap the classes of its devices. Returns what came of it."""
        devices = self._devices[path]
        names = " and ".join(dict.fromkeys(type(device).__qualname__ for device in devices))
        name = type(devices[0]).__module__
        old = sys.modules.get(name)
        try:
            module = _execute(path, name, old)
            for device in devices:
                self._swap(device, _class_of(module, type(device).__qualname__))
        except (Exception, SystemExit) as error:
            if old is not None:
                sys.modules[name] = old
            return f"{_where(error, path)}; {names} keeps its old code"
        return f"{path.name}: {names} has new code"

    def _swap(self, device: Device, new_class: type[Device]) -> None:
        changed = swap(device, new_class)
        while not self._ended.is_set():
            try:
                return changed.result(INTERVAL)
            except TimeoutError:
                if changed.done():
                    raise
        raise CancelledError


def _source(cls: type[Device]) -> Path:
    try:
        found = inspect.getsourcefile(cls)
    except TypeError:
        found = None
    if found is None:
        raise StateError(f"{cls.__module__}.{cls.__qualname__} has no source file that could change")
    return Path(found).absolute()


def _identity(path: Path) -> tuple[int, ...] | None:
    """What changes when the file is written, or replaced by another one."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _execute(path: Path, name: str, old: ModuleType | None) -> ModuleType:
    """The file as a new module, in the place of the one that it was."""
    module = ModuleType(name)
    for attribute in ("__file__", "__loader__", "__package__", "__path__", "__spec__"):
        if hasattr(old, attribute):
            setattr(module, attribute, getattr(old, attribute))
    # Not by its loader, which may take what was compiled before for it: it looks at the second of the last change.
    code = compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
    sys.modules[name] = module
    exec(code, vars(module))
    return module


def _class_of(module: ModuleType, name: str) -> type[Device]:
    try:
        found = reduce(getattr, name.split("."), cast(Any, module))
    except AttributeError:
        raise DeclarationError(f"there is no class {name} any more") from None
    if not (isinstance(found, type) and issubclass(found, Device)):
        raise DeclarationError(f"{name} is not a class derived from Device any more")
    return found


def _where(error: BaseException, path: Path) -> str:
    """A line that says what is wrong, and in which line of the file."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path.name}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    text = str(error).splitlines()[0] if str(error) else ""
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"{path.name}, line {lines[-1]}: {what}" if lines else f"{path.name}: {what}"
