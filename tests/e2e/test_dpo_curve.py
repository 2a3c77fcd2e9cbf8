"""DPO with LoRA on SmolLM2-135M, in the folder that MCORE_SMOLLM2 names, against TRL's curve."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = os.environ.get("MCORE_SMOLLM2")
BENCH = Path(__file__).parents[2] / "bench" / "curves.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(FOLDER is None, reason="MCORE_SMOLLM2 names no model folder"),
]


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """Thirty steps of three seeds on either side."""
    file = tmp_path_factory.mktemp("curves") / "dpo.json"
    command = [sys.executable, BENCH, "--task", "dpo", "--model", FOLDER, "--out", file]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(file.read_text(encoding="utf-8"))


def test_accuracies_rise(curves):
    for run in curves["ours"]:
        assert len(run["accuracies"]) == 30
        assert run["held_out"]["30"] > 0.8


def test_the_last_ten_steps_lie_among_trls(curves):
    """Our mean over seeds, between the lowest and the highest of TRL's three."""
    low, high = curves["trl_range"]
    assert low <= curves["ours_mean"] <= high, curves["last_ten"]
