"""Results for people and for programs: text, JSON, TAP and JUnit XML."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from xml.etree import ElementTree

from .harness import Check, Result, Verdict

#: What is not told in detail.
_PLAIN = {Verdict.PASS, Verdict.SKIP}


def lines(result: Result) -> Iterator[str]:
    """One line; with details if it is not a pass."""
    skipped = f"  ({result.reason})" if result.verdict is Verdict.SKIP else ""
    yield f"{result.verdict.value:7}  {result.check.name}{skipped}"
    if result.verdict not in _PLAIN:
        yield from (f"           {line}" for line in details(result))


def details(result: Result) -> Iterator[str]:
    """What was checked, expected and seen, and what was said last on the connection."""
    yield result.check.sentence
    yield f"seen      {result.reason}"
    if result.expected:
        yield f"expected  {result.expected}"
    if result.verdict is Verdict.FAIL and result.log:
        yield "said      " + result.log[0]
        yield from (f"          {line}" for line in result.log[1:])
    yield f"see       {result.check.section}"


def summary(results: Sequence[Result]) -> str:
    """How many there are of each verdict."""
    counts = Counter(result.verdict for result in results)
    number = "1 check" if len(results) == 1 else f"{len(results)} checks"
    return f"{number}: " + ", ".join(f"{counts[each]} {each.value}" for each in Verdict if counts[each])


def catalogue(checks: Iterable[Check]) -> Iterator[str]:
    """Every check, and where the text says so."""
    for each in checks:
        yield f"{each.name}\n    {each.sentence}\n    {each.section}"


def as_json(results: Sequence[Result]) -> str:
    """A list of objects."""
    rows = [
        {
            "name": result.check.name,
            "verdict": result.verdict.value.lower(),
            "sentence": result.check.sentence,
            "section": result.check.section,
            "seen": result.reason,
            "expected": result.expected,
            "messages": list(result.log) if result.verdict is not Verdict.PASS else [],
            "seconds": round(result.seconds, 3),
        }
        for result in results
    ]
    return json.dumps(rows, indent=2)


def tap(results: Iterable[Result]) -> Iterator[str]:
    """The Test Anything Protocol, version 14. What differs is a test to do."""
    results = list(results)
    yield "TAP version 14"
    yield f"1..{len(results)}"
    for number, result in enumerate(results, 1):
        ok = "ok" if result.verdict in _PLAIN else "not ok"
        note = {Verdict.SKIP: f" # SKIP {result.reason}", Verdict.DIFFERS: f" # TODO differs: {result.reason}"}
        yield f"{ok} {number} - {result.check.name}{note.get(result.verdict, '').replace(chr(10), ' ')}"
        if ok != "ok":
            yield from (f"# {line}" for line in details(result))


def junit(results: Sequence[Result]) -> bytes:
    """A JUnit XML file: a test suite with a test case for each check."""
    counts = Counter(result.verdict for result in results)
    suite = ElementTree.Element(
        "testsuite",
        name="vhost-user check",
        tests=str(len(results)),
        failures=str(counts[Verdict.FAIL]),
        errors=str(counts[Verdict.ERROR]),
        skipped=str(counts[Verdict.SKIP]),
        time=f"{sum(result.seconds for result in results):.3f}",
    )
    tags = {Verdict.FAIL: "failure", Verdict.ERROR: "error", Verdict.SKIP: "skipped", Verdict.DIFFERS: "system-out"}
    for result in results:
        group, _, name = result.check.name.partition(".")
        case = ElementTree.SubElement(suite, "testcase", classname=group, name=name, time=f"{result.seconds:.3f}")
        if result.verdict in tags:
            element = ElementTree.SubElement(case, tags[result.verdict])
            element.text = _printable("\n".join(details(result)))
            if result.verdict is not Verdict.DIFFERS:
                element.set("message", _printable(result.reason))
    ElementTree.indent(suite)
    document: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
    return document


def _printable(text: str) -> str:
    """Without what XML cannot have."""
    return "".join(letter if letter == "\n" or letter.isprintable() else "?" for letter in text)
