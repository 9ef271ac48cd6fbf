"""A conformance suite for vhost-user back-ends: ``vhost-user check SOCKET``.

One function is one check, in the module of its group; it opens connections of its own and says what is wrong. What is
reported as FAIL is wrong by the text; where the text leaves room and implementations differ, it says so.

    with contextlib.closing(Target("/tmp/disk.sock")) as target:
        suite = Suite(target, features.by_name("blk"))
        for result in suite.run(selected(["framing", "ring.*"])):
            print(result.verdict.value, result.check.name, result.reason)
"""

# In this order.
from . import framing, features, memory, ring, packed, notification, in_band  # noqa: F401, I001
from . import config, inflight, log, state, errors, robustness  # noqa: F401
from . import reports
from .harness import CHECKS, TIMEOUT, Case, Check, Result, Suite, Target, TargetError, Verdict, check, selected

__all__ = [
    "CHECKS",
    "TIMEOUT",
    "Case",
    "Check",
    "Result",
    "Suite",
    "Target",
    "TargetError",
    "Verdict",
    "check",
    "reports",
    "selected",
]
