"""Tables of a run: summed over an interval, written a line each, drawn against an even share."""

import json
import re

import pytest

from mcore_core.protocols import StepResult
from mcore_core.report import jsonl
from mcore_core.report.heatmap import heat_maps, kind_of
from mcore_core.report.meters import Interval


def result(*rows, name="moe/load"):
    tables = {name: {f"layer {i}": row for i, row in enumerate(rows)}}
    return StepResult(1.0, 1.0, 0.1, 10, 1.0, {}, tables)


def test_an_interval_sums_tables():
    interval = Interval()
    interval.add(result([1, 2], [3, 4]), {})
    interval.add(result([10, 20], [30, 40]), {})
    means = interval.take()
    assert (means.steps, means.tables) == (
        2,
        {"moe/load": {"layer 0": [11, 22], "layer 1": [33, 44]}},
    )
    interval.add(result([1, 1]), {})
    assert interval.take().tables == {"moe/load": {"layer 0": [1, 1]}}


@pytest.mark.parametrize(
    ("share", "css"),
    [(0, "none"), (0.3, "low2"), (0.7, "low1"), (1, "even"), (1.9, "high1"), (3, "high2"),
     (9, "high3")],
)  # fmt: skip
def test_colours(share, css):
    assert kind_of(share) == css


def test_cells_are_shares_of_their_row():
    records = [
        {"step": 10, "steps": 10, "tables": {"moe/load": {"layer 3": [1, 1, 1, 1]}}},
        {"step": 20, "steps": 10, "tables": {"moe/load": {"layer 3": [0, 5, 45, 50]}}},
    ]
    (drawn,) = heat_maps(records)
    assert drawn.note == "steps 11 to 20; highest 2.00; 1 unused"
    assert "layer 3" in drawn.svg
    cells = dict(re.findall(r'<path class="(\w+)" d="([^"]+)"', drawn.svg))
    assert {css: path.count("M") for css, path in cells.items()} == {
        "none": 1,
        "low2": 1,
        "high1": 2,
    }


def test_many_cells_stay_small():
    rows = {f"layer {i}": [float(j % 7) for j in range(256)] for i in range(60)}
    (drawn,) = heat_maps([{"step": 1, "tables": {"moe/load": rows}}])
    assert len(drawn.svg) < 450_000
    assert sum(p.count("M") for p in re.findall(r' d="([^"]+)"', drawn.svg)) == 60 * 256


def test_no_table_no_map(tmp_path):
    path = tmp_path / jsonl.TABLES
    path.write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    assert heat_maps(jsonl.read(path)) == []
