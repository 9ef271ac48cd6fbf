"""From ``module:Class`` on the command line to the class."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

from .command import UsageError

T = TypeVar("T")


def load(target: str, base: type[T]) -> type[T]:
    """The class that `target` names: ``module:Class``, ``path/to/file.py:Class``, or either without ``:Class`` if the
    module defines one class only that is derived from `base`. Modules are looked for in the current folder first.

    Raises:
        UsageError: there is no such module or class, or it is not derived from `base`.
    """
    place, _, name = target.partition(":")
    module = _module(place)
    if not name:
        return _only_class(module, place, base)
    try:
        found: Any = functools.reduce(getattr, name.split("."), cast(Any, module))
    except AttributeError:
        raise UsageError(f"{place} has no class {name}; {_choices(module, base)}") from None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UsageError(f"{target} is not a class derived from {base.__name__}; {_choices(module, base)}")
    return found


def _module(place: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())
    if place.endswith(".py") or "/" in place:
        return _file(Path(place))
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        # A module that the wanted one imports is its own problem.
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise
        raise UsageError(
            f"there is no module {place} here or installed; name a file as path/to/file.py:Class"
        ) from None
    except (TypeError, ValueError):
        raise UsageError(f"expected module:Class or path/to/file.py:Class, not {place!r}") from None


def _file(path: Path) -> ModuleType:
    # As the interpreter does for a script: what is next to it can be imported.
    sys.path.insert(0, str(path.parent.absolute()))
    name = path.stem if path.stem not in sys.modules else f"_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is not a Python file")
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _only_class(module: ModuleType, place: str, base: type[T]) -> type[T]:
    classes = _classes(module, base)
    if len(classes) != 1:
        raise UsageError(f"say which class of {place}, as in {place}:Class; {_choices(module, base)}")
    return classes[0]


def _choices(module: ModuleType, base: type[T]) -> str:
    names = ", ".join(found.__name__ for found in _classes(module, base))
    return f"derived from {base.__name__} there: {names or 'no class'}"


def _classes(module: ModuleType, base: type[T]) -> list[type[T]]:
    own = [found for found in vars(module).values() if getattr(found, "__module__", None) == module.__name__]
    return [found for found in own if isinstance(found, type) and issubclass(found, base)]
