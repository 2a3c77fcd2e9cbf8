"""DPO with LoRA on SmolLM2-135M, in the folder that MCORE_SMOLLM2 names, against TRL's curve."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = os.environ.get("MCORE_SMOLLM2")
BENCH = Path(__file__).parents[2] / "bench" / "dpo_cpu.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(FOLDER is None, reason="MCORE_SMOLLM2 names no model folder"),
]


@pytest.fixture(scope="module")
def curves():
    """Thirty steps of three seeds on either side."""
    command = [sys.executable, BENCH, "--model", FOLDER, "--steps", "30", "--seeds", "3"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_accuracies_rise(curves):
    for run in curves["ours"]:
        assert len(run["accuracies"]) == 30
        assert run["last_ten"] > 0.8


def test_the_last_ten_steps_lie_among_trls(curves):
    """Our mean over seeds, between the lowest and the highest of TRL's three."""
    theirs = [run["last_ten"] for run in curves["trl"]]
    mine = sum(run["last_ten"] for run in curves["ours"]) / len(curves["ours"])
    assert min(theirs) <= mine <= max(theirs), (mine, theirs)
