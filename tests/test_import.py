"""What `import vhost_user` brings: every public name, and nothing that a device class can be declared without."""

from __future__ import annotations

import subprocess
import sys

import pytest

import vhost_user as vu

#: What is imported anyway, with whatever that needs in this version of Python.
NEEDED = "contextlib, enum, struct, threading, typing" + (", annotationlib" if sys.version_info >= (3, 14) else "")


def imported_by(code: str) -> set[str]:
    """The modules that `code` imports in a new interpreter, beside what everything needs."""
    program = f"import sys, {NEEDED}\nbefore = {{*sys.modules}}\n{code}\nprint(*({{*sys.modules}} - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {*done.stdout.split()}


def test_the_package_imports_little_of_the_standard_library() -> None:
    assert {name for name in imported_by("import vhost_user") if not name.startswith("vhost_user")} <= {"__future__"}


def test_what_serves_a_device_and_what_drives_one_are_imported_when_they_are_used() -> None:
    later = {"vhost_user._runtime", "vhost_user.frontend", "vhost_user.server", "logging", "socket"}
    declaration = "import vhost_user as vu\nclass Rng(vu.Device, device_id=4):\n    requestq = vu.Queue()\n"
    assert not later & imported_by(declaration)
    assert later <= imported_by(declaration + "Rng(), vu.Frontend, vu.Server")


def test_public_names_are_listed_and_can_be_imported_by_name_and_all_at_once() -> None:
    imported_by("import vhost_user\nassert {*vhost_user.__all__} <= {*dir(vhost_user)}")
    imported_by(f"from vhost_user import {', '.join(vu.__all__)}")
    imported_by(f"from vhost_user import *\n{', '.join(vu.__all__)}")


def test_a_name_that_the_package_has_not_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'vhost_user' has no attribute 'Fronted'"):
        _ = vu.Fronted  # type: ignore[attr-defined]
