"""A check that no wrong back-end fails is not a check."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from check.backend import Broken, Server, Session
from check.wrong import WRONG
from vhost_user.check import CHECKS, Result, Suite, Target, Verdict, selected
from vhost_user.features import by_name

Judge = Callable[..., list[Result]]

#: Seconds that a wrong back-end gets to answer.
IMPATIENT = 0.2


@pytest.fixture
def judge(tmp_path: Path) -> Judge:
    """Check a back-end of a kind, in this process."""

    def run(kind: type[Session], *names: str, timeout: float = IMPATIENT, forced: bool = False) -> list[Result]:
        path = tmp_path / f"{kind.__name__}.sock"
        with contextlib.closing(Server(path, kind)), contextlib.closing(Target(str(path), timeout=timeout)) as target:
            return list(Suite(target, by_name("blk")).run(names or selected([]), forced=forced))

    return run


#: What not even a right back-end survives, if it is as simple as ours.
FATAL = "robustness.file-truncated"


def test_a_right_back_end_passes_every_check(judge: Judge) -> None:
    results = judge(Session, timeout=10.0)
    not_passed = {result.check.name: result.verdict for result in results if result.verdict is not Verdict.PASS}
    assert not_passed == {name: Verdict.SKIP for name, check in CHECKS.items() if check.may_kill}


class BelongsToItsOwner(Session):
    """Takes features from its owner only, as crosvm's devices do."""

    owned = False

    def set_owner(self, payload: bytes, descriptors: list[int]) -> None:
        self.owned = True

    def set_features(self, payload: bytes, descriptors: list[int]) -> None:
        if not self.owned:
            raise Broken("features without an owner")
        super().set_features(payload, descriptors)


def test_a_back_end_may_want_an_owner_before_features(judge: Judge) -> None:
    results = judge(BelongsToItsOwner, timeout=10.0)
    assert {result.check.name for result in results if result.verdict not in (Verdict.PASS, Verdict.SKIP)} == set()


def test_a_right_back_end_survives_what_kills_others(judge: Judge) -> None:
    deadly = [name for name, check in CHECKS.items() if check.may_kill and name != FATAL]
    results = judge(Session, *deadly, timeout=10.0, forced=True)
    assert {result.check.name: result.verdict for result in results} == dict.fromkeys(deadly, Verdict.PASS)


@pytest.mark.parametrize(
    ("kind", "name"),
    [pytest.param(kind, name, id=f"{kind.__name__}-{name}") for kind, names in WRONG for name in names],
)
def test_a_wrong_back_end_fails(judge: Judge, kind: type[Session], name: str) -> None:
    (result,) = judge(kind, name, forced=True)
    assert result.verdict is Verdict.FAIL, result.reason
    assert result.reason
    assert result.expected


def test_every_check_is_failed_by_a_wrong_back_end() -> None:
    assert {name for _, names in WRONG for name in names} == {*CHECKS}
