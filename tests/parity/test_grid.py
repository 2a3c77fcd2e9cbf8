"""Every recipe x architecture x layout: losses, gradients and three steps equal one rank's.

`make parity` runs a covering set; `make grid` runs all of it and writes docs/reference/layouts.md.
"""

import json
import os
from functools import cache
from pathlib import Path

import pytest
from grid_cases import ARCHITECTURES, LAYOUTS, RECIPES, cells, covering, grid_case, layout, reason

from mcore_core.parallel.topology import Layout
from mcore_core.testing.cases import assert_same, run_case

pytestmark = pytest.mark.parity
RESULTS = os.environ.get("MCORE_GRID")
"""File that collects which cells passed."""


@cache
def _one_rank(recipe, architecture):
    return run_case(grid_case(recipe, architecture), Layout())


def _marked():
    some = covering()
    return [pytest.param(*c, marks=() if c in some else pytest.mark.grid) for c in cells()]


@pytest.mark.parametrize(("recipe", "architecture", "name"), _marked())
def test_cell(recipe, architecture, name):
    reference = _one_rank(recipe, architecture)
    assert len(set(reference.losses)) == len(reference.losses) >= 3
    run = run_case(grid_case(recipe, architecture), layout(name), timeout=300)
    assert_same(run, reference, relative=RECIPES[recipe].relative)
    if RESULTS:
        with Path(RESULTS).open("a") as file:
            file.write(json.dumps([recipe, architecture, name]) + "\n")


def test_few_cells_are_refused():
    every = [(a, n) for a in ARCHITECTURES for n in LAYOUTS]
    expert = [n for n in LAYOUTS if "ep" in n or "etp" in n]
    assert len(LAYOUTS) - len(expert) >= 40
    assert max(layout(n).world for n in LAYOUTS) == 8
    refused = [c for c in every if reason(*c) not in (None, "no experts to divide")]
    assert len(refused) <= len(every) // 10
