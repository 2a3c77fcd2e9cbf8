"""One seed of ours on the CPU as bench/curves.py runs it, and what was recorded of all seeds."""

import json
import os
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = os.environ.get("MCORE_SMOLLM2")
"""Folder of SmolLM2-135M-Instruct."""


def trains(test):
    """Mark what trains a real model."""
    marks = (
        pytest.mark.slow,
        pytest.mark.timeout(1800),
        pytest.mark.skipif(MODEL is None, reason="MCORE_SMOLLM2 names no model folder"),
    )
    for mark in marks:
        test = mark(test)
    return test


@contextmanager
def bench():
    """Make bench/curves.py and its neighbours importable."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        yield import_module("curves")
    finally:
        sys.path.remove(str(ROOT / "bench"))


def recorded(task):
    """Return what bench/curves.py wrote on a GPU: three seeds of ours and of TRL.

    Its summary is checked against its numbers.
    """
    file = ROOT / "tests" / "data" / f"{task}_curves.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    with bench() as curves:
        summary = curves.summary(task, {side: document[side] for side in curves.SIDES})
        assert document["steps"] == curves.STEPS[task]
    assert {key: document[key] for key in summary} == summary
    assert len(document["ours"]) == len(document["trl"]) == 3
    return document


def trained(task, folder):
    """Train seed 1 in a process of its own; return what it reports."""
    with bench() as curves:
        module, aside = curves.TASKS[task], import_module("aside")
        steps = curves.STEPS[task]
        files = module.write_inputs(MODEL, folder, steps, 1)
        side = aside.Side(side="ours", model=MODEL, steps=steps, seed=1, **files)
        return aside.run_side(module.__file__, side)
