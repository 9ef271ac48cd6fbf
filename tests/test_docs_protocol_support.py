"""The page on what of the protocol is supported says what is there."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from vhost_user._core import messages

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """What writes the page."""
    spec = importlib.util.spec_from_file_location("protocol_support", ROOT / "docs" / "protocol_support.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks itself up there.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "protocol_support", module)
        spec.loader.exec_module(module)
    return module


def test_the_page_is_what_its_generator_writes(generator: ModuleType) -> None:
    assert generator.PAGE.read_text() == generator.page(), "run python docs/protocol_support.py"


def test_every_message_has_its_row_and_nothing_else_does(generator: ModuleType) -> None:
    assert set(generator.SUPPORT) == {row.name for row in messages()}


def test_every_test_that_the_page_names_is_there(generator: ModuleType) -> None:
    for test in generator.named_tests():
        file, name = test.split("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


def test_every_peer_is_told_where_it_was_seen(generator: ModuleType) -> None:
    for support in generator.SUPPORT.values():
        for peer in generator.PEERS:
            assert support.peers in ("", "QEMU, UML") or support.peers in generator.PEERS, peer
