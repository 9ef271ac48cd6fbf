"""What was measured, as a table, as a picture, and as the generated part of the performance page.

`python benchmarks/report.py` writes the figures of benchmarks/results.json into docs/performance.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->\n"

Row = dict[str, Any]
Results = dict[str, Any]


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def figure(row: Row) -> str:
    if "median" not in row:
        return "-"
    text = f"{number(row['median'])} {row['unit']}"
    return text if row["min"] == row["max"] else f"{text} [{number(row['min'])}..{number(row['max'])}]"


def target(row: Row) -> str:
    if row["target"] is None:
        return ""
    return f"{'at least' if row['at_least'] else 'at most'} {row['target']:g}"


def verdict(row: Row) -> str:
    if row["missing"]:
        return f"not measured: {row['missing']}"
    return {None: "", True: "reached", False: "FALLS SHORT"}[row["reached"]]


def line(row: Row) -> str:
    return "  ".join(part for part in (row["name"], figure(row), target(row), verdict(row)) if part)


def table(results: Results) -> str:
    rows = [(row["name"], figure(row), target(row), verdict(row)) for row in results["rows"]]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def markdown(results: Results) -> Iterator[str]:
    machine = results["machine"]
    yield f"Measured on {machine['processors']} processors of a {machine['processor']}, Linux {machine['kernel']}, "
    yield f"Python {machine['python']}: the median of {results['runs']} runs, and the least and the most.\n\n"
    yield "| what | figure | target | |\n|---|---|---|---|\n"
    for row in results["rows"]:
        yield f"| {row['name']} | {figure(row)} | {target(row)} | {verdict(row)} |\n"


def picture(results: Results) -> str:
    """The ratios against their targets: a bar of 1 is the target, and longer is better."""
    rows = [row for row in results["rows"] if row["target"] and "median" in row]
    height, top, left, width, bar = 22, 46, 430, 330, 14
    total = top + height * len(rows) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 {total}" font-family="sans-serif" font-size="12">',
        f'<rect width="960" height="{total}" fill="#ffffff"/>',
        '<text x="12" y="20" font-size="14" font-weight="bold">How it compares with what it must reach</text>',
        f'<text x="{left + width / 3:.0f}" y="38" text-anchor="middle" fill="#57606a">target</text>',
    ]
    for at, row in enumerate(rows):
        y = top + height * at
        share = row["median"] / row["target"] if row["at_least"] else row["target"] / max(row["median"], 1e-9)
        length = width * min(share, 3.0) / 3
        color = "#2da44e" if row["reached"] else "#cf222e"
        group = row["group"]
        label = row["name"] if not row["name"].startswith("…") else f"{group} {row['name']}"
        parts += [
            f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(shorten(label))}</text>',
            f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{bar}" fill="{color}"/>',
            f'<text x="{left + length + 6:.1f}" y="{y + 12}">{escape(figure(row))}</text>',
        ]
    x = left + width / 3
    parts += [
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4}" y2="{total - 8}" stroke="#57606a" stroke-dasharray="3 3"/>'
    ]
    return "\n".join([*parts, "</svg>\n"])


def shorten(text: str, most: int = 66) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def update_page(results: Results) -> None:
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + "".join(markdown(results)) + END + after)


if __name__ == "__main__":
    update_page(json.loads((HERE / "results.json").read_text()))
