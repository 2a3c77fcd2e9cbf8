"""One seed of ours on the CPU as bench/curves.py runs it, and what was recorded of all seeds."""

import json
import os
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODEL = os.environ.get("MCORE_SMOLLM2")
"""Folder of SmolLM2-135M-Instruct."""


def recorded(task):
    """Return the document that bench/curves.py wrote on a GPU: three seeds of ours and of TRL."""
    file = ROOT / "tests" / "data" / f"{task}_curves.json"
    return json.loads(file.read_text(encoding="utf-8"))


def trained(task, folder):
    """Train seed 1 in a process of its own; return what it reports."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        module, aside = import_module(f"{task}_cpu"), import_module("aside")
        steps = import_module("curves").STEPS[task]
        files = module.write_inputs(MODEL, folder, steps, 1)
        side = aside.Side(side="ours", model=MODEL, steps=steps, seed=1, **files)
        return aside.run_side(module.__file__, side)
    finally:
        sys.path.remove(str(ROOT / "bench"))
