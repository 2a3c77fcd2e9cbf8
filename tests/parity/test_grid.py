"""Every recipe x architecture x layout: losses, gradients and three steps equal one rank's.

`make parity` runs a covering set; `make grid` runs all of it and writes docs/reference/layouts.md.
"""

import time
from functools import cache

import pytest
from grid_cases import ARCHITECTURES, LAYOUTS, RECIPES, cells, covering, grid_case, layout, reason
from grid_results import record, to_run

from mcore_core.parallel.topology import Layout
from mcore_core.testing.cases import assert_same, run_case

pytestmark = pytest.mark.parity


@cache
def _one_rank(recipe, architecture):
    reference = run_case(grid_case(recipe, architecture), Layout())
    assert len(set(reference.losses)) == len(reference.losses) >= 3
    return reference


def _marked():
    some = covering()
    return [pytest.param(*c, marks=() if c in some else pytest.mark.grid) for c in to_run(cells())]


@pytest.mark.parametrize(("recipe", "architecture", "name"), _marked())
def test_cell(recipe, architecture, name):
    cell, begin, chosen = (recipe, architecture, name), time.monotonic(), RECIPES[recipe]
    try:
        reference = _one_rank(recipe, architecture)
        run = run_case(grid_case(recipe, architecture), layout(name), timeout=250)
        assert_same(run, reference, relative=chosen.relative, absolute=chosen.absolute)
    except AssertionError as error:
        record(cell, passed=False, seconds=time.monotonic() - begin, message=str(error)[-300:])
        raise
    record(cell, passed=True, seconds=time.monotonic() - begin)


def test_few_cells_are_refused():
    every = [(a, n) for a in ARCHITECTURES for n in LAYOUTS]
    expert = [n for n in LAYOUTS if "ep" in n or "etp" in n]
    assert len(LAYOUTS) - len(expert) >= 40
    assert max(layout(n).world for n in LAYOUTS) == 8
    refused = [c for c in every if reason(*c) not in (None, "no experts to divide")]
    assert len(refused) <= len(every) // 10
