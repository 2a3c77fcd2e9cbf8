"""What the grid's cells gave, a line each in the file that MCORE_GRID names.

A line is {"cell": [recipe, architecture, layout], "state": ..., "passed": ..., "seconds": ...}; the
state is a hash of the sources that a result hangs on, so that a run can go on where it was stopped.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = (
    "mcore_core/**/*.py",
    "plugins/**/*.py",
    "tests/parity/*_case*.py",
    "tests/parity/grid_*.py",
)

type Cell = tuple[str, str, str]


@cache
def state() -> str:
    """Return the hash of the sources."""
    found = hashlib.sha256()
    for pattern in SOURCES:
        for file in sorted(ROOT.glob(pattern)):
            found.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return found.hexdigest()[:12]


def lines(file: Path) -> Iterator[dict]:
    """Yield what was written, in order."""
    if file.exists():
        yield from map(json.loads, file.read_text(encoding="utf-8").splitlines())


def passed(file: Path) -> dict[Cell, str]:
    """Return the state of the sources with which each cell passed last; failed ones left out."""
    found: dict[Cell, str] = {}
    for line in lines(file):
        cell = tuple(line["cell"])
        found.pop(cell, None)
        if line["passed"]:
            found[cell] = line["state"]
    return found


def failed(file: Path) -> set[Cell]:
    """Return the cells that did not pass when they last ran."""
    good = passed(file)
    return {cell for line in lines(file) if (cell := tuple(line["cell"])) not in good}


def to_run(cells: list[Cell]) -> list[Cell]:
    """Return what this process is to run of the cells.

    MCORE_GRID_RESUME=1 leaves out what passed with the sources as they are; MCORE_GRID_PART=i/n
    takes the i-th of n parts, counted from 1.
    """
    file = os.environ.get("MCORE_GRID")
    if file and os.environ.get("MCORE_GRID_RESUME") == "1":
        done = passed(Path(file))
        cells = [c for c in cells if done.get(c) != state()]
    if part := os.environ.get("MCORE_GRID_PART"):
        number, of = map(int, part.split("/"))
        size = -(-len(cells) // of)
        cells = cells[(number - 1) * size : number * size]
    return cells


def record(cell: Cell, *, passed: bool, seconds: float, message: str = "") -> None:
    """Write a line."""
    if file := os.environ.get("MCORE_GRID"):
        line = {"cell": cell, "state": state(), "passed": passed, "seconds": round(seconds, 1)}
        if message:
            line["message"] = message
        with Path(file).open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
