"""The third party's family in examples/plugins: one file, one entry point, proven as the others."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from family_cases import QWEN_MOE, WINDOWED, FamilyCase, family_of, tensors_of, write
from family_runs import build, forward, logits_of, tokens_and_weights

from mcore_core.testing.ranks import fork_ranks

FOLDER = Path(__file__).parents[2] / "examples/plugins/mellum"
CASE = FamilyCase(
    "mellum",
    {
        **QWEN_MOE,
        **WINDOWED,
        "head_dim": 10,
        "attention_bias": True,
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    moe=True,
    module="mcore_mellum",
)


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def test_it_is_one_short_file_that_imports_the_kernel_only():
    (file,) = FOLDER.glob("*.py")
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 120
    imports = re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)
    assert set(imports) == {"collections", "functools", "typing", "mcore_core"}


def test_the_entry_point_is_all_that_mcore_needs(tmp_path):
    """As installed: the project's metadata beside the module, and the command."""
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = tmp_path / "site/mcore_mellum-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    (points,) = project["entry-points"].items()
    lines = [f"{name} = {target}" for name, target in points[1].items()]
    (info / "entry_points.txt").write_text(f"[{points[0]}]\n" + "\n".join(lines) + "\n")
    write(tmp_path / "model", CASE)
    path = os.pathsep.join([str(FOLDER), str(tmp_path / "site")])
    done = subprocess.run(
        [sys.executable, "-m", "mcore_core.cli.main", "bridge", "coverage", "--json",
         "--model", str(tmp_path / "model")],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["family"], found["problems"]) == ("mellum", [])
    claimed = {name for rule in found["rules"] for name in rule["tensors"]}
    assert claimed == set(tensors_of(tmp_path / "model"))


def _run(folder, out, tokens_T):
    bridge, (chunk,) = build(folder, family_of(CASE))
    bridge.load([chunk], folder)
    bridge.save([chunk], out, max_shard_size=10**8, source=folder)
    chunk.eval()
    return forward(chunk, tokens_T).detach()


def test_logits_and_round_trip(tmp_path):
    model = write(tmp_path / "in", CASE)
    tokens_T, _ = tokens_and_weights()
    logits_TV = logits_of(model, tokens_T)
    (found_TV,) = fork_ranks(lambda _: _run(tmp_path / "in", tmp_path / "out", tokens_T), 1)
    assert logits_TV.std() >= 1
    assert (found_TV - logits_TV).abs().max() < 1e-4 * logits_TV.std()
    before, after = tensors_of(tmp_path / "in"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
