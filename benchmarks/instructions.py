"""Count the instructions of a ring and of requests, and compare them with what is recorded.

Called by `make instructions`. A count is the same however busy the machine is; one that has grown by more than 5 %
fails. Counts of another compiler, interpreter or processor are shown and not judged: `--record` writes those of this
one down.

What starts and ends a program is counted too, and taken off again: each is run with little to do, and with more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
RECORD = HERE / "instructions.json"
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))

#: How much more a count may be than the recorded one.
TOLERANCE = 0.05

FEW, MANY = 16, 80
BATCH = 256


def ring(form: str, descriptors: int) -> float:
    """Of a chain: taken, checked and given back."""
    programs = [path for path in (TARGET / "release" / "deps").glob("instructions-*") if not path.suffix]
    if not programs:
        sys.exit("benchmarks/instructions.py: build it first: cargo bench --no-run --bench instructions")
    program = str(max(programs, key=lambda path: path.stat().st_mtime))
    serve = "--toggle-collect=instructions::serve*"
    few, many = (_count([program, form, str(batches), str(descriptors)], serve) for batches in (FEW, MANY))
    return (many - few) / ((MANY - FEW) * BATCH)


def request(kind: str) -> float:
    """Of a request to a device in Python, but for the driver's part."""
    program = [sys.executable, str(HERE / "counted.py"), kind]
    few, many = (_count([*program, str(batches)]) for batches in (FEW, MANY))
    return (many - few) / ((MANY - FEW) * BATCH)


def _count(program: list[str], *options: str) -> int:
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", *options, *program]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True, env=environment)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or not found:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return int(found[1])


RINGS: dict[str, Callable[[], float]] = {
    "split ring, 1 descriptor": lambda: ring("split", 1),
    "split ring, 3 descriptors": lambda: ring("split", 3),
    "packed ring, 1 descriptor": lambda: ring("packed", 1),
    "packed ring, 3 descriptors": lambda: ring("packed", 3),
}
REQUESTS: dict[str, Callable[[], float]] = {
    "empty request": lambda: request("empty"),
    "header and status": lambda: request("header"),
    "header and status, by batch": lambda: request("headers"),
    "disk read, 4 KiB": lambda: request("read"),
}


#: What counts depend on beside the code: those of rings, and those of requests.
RING_DEPENDS = ("rustc", "machine")
REQUEST_DEPENDS = (*RING_DEPENDS, "python", "libc")


def toolchain() -> dict[str, str]:
    rustc = subprocess.run(["rustc", "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    # The C library copies memory in another way if there are wider registers.
    wide = " with AVX2" if " avx2 " in Path("/proc/cpuinfo").read_text() else ""
    return {
        "rustc": rustc,
        "machine": platform.machine() + wide,
        "python": f"{platform.python_version()}, {platform.python_compiler()}",
        "libc": " ".join(platform.libc_ver()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="write down what is counted")
    options = parser.parse_args()
    if shutil.which("valgrind") is None:
        sys.exit("benchmarks/instructions.py: valgrind is not installed: apt-get install valgrind")
    here = toolchain()
    counts = {name: round(count(), 1) for name, count in (RINGS | REQUESTS).items()}
    if options.record:
        RECORD.write_text(json.dumps({"toolchain": here, "instructions": counts}, indent=1) + "\n")
    if not RECORD.exists():
        print(json.dumps(counts, indent=1))
        sys.exit(f"{RECORD} is missing: write it with --record")
    record = json.loads(RECORD.read_text())
    if missing := counts.keys() - record["instructions"].keys():
        sys.exit(f"{RECORD} has no {', '.join(sorted(missing))}: write them with --record")
    grown = []
    for names, depends in ((RINGS, RING_DEPENDS), (REQUESTS, REQUEST_DEPENDS)):
        other = {key: record["toolchain"][key] for key in depends if here[key] != record["toolchain"][key]}
        if other:
            print(f"recorded with {other}, which is not what is here ({here}): shown, not judged")
        for name in names:
            before = record["instructions"][name]
            growth = counts[name] / before - 1
            if growth > TOLERANCE and not other:
                grown.append(name)
            print(f"{name:30}{counts[name]:10.1f}   recorded {before:10.1f}   {growth:+.1%}")
    if grown:
        sys.exit(
            f"{', '.join(grown)}: more by over {TOLERANCE:.0%}; find out why, and if it has to be, record it (--record)"
        )


if __name__ == "__main__":
    main()
