"""Every decoder part trains on a CUDA device as on the CPU: MoE, MLA, delta nets, MTP, sinks."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SCRIPT = Path(__file__).with_name("layer_losses.py")
NAMES = (
    "postnorm gate moe-softmax moe-groups moe-gpt-oss mla mla-direct mla-moe gdn mtp mtp-tied "
    "mla-moe-mtp moe-mtp-dense gdn-moe"
)


@cache
def _run(device, tmp, engine=False):
    out = Path(tmp) / f"{device}-{engine}.json"
    env = dict(os.environ, CUDA_VISIBLE_DEVICES="" if device == "cpu" else "0")
    command = [sys.executable, str(SCRIPT), str(out), *(["te"] if engine else [])]
    subprocess.run(command, env=env, check=True, timeout=900)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("layers"))


@pytest.mark.parametrize("name", NAMES.split())
def test_local_equals_the_cpu(name, folder):
    mine, expected = _run("cuda", folder)[name], _run("cpu", folder)[name]
    assert "error" not in mine, mine["error"]
    assert mine["losses"] == pytest.approx(expected["losses"], rel=2e-4)
    assert mine["norms"] == pytest.approx(expected["norms"], rel=2e-3)


@pytest.mark.parametrize("name", NAMES.split())
def test_engine_is_near_the_cpu(name, folder):
    """In bfloat16: a part that Transformer Engine's layers leave out would be far off."""
    pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")
    mine, expected = _run("cuda", folder, engine=True)[name], _run("cpu", folder)[name]
    assert "error" not in mine, mine["error"]
    assert mine["losses"] == pytest.approx(expected["losses"], rel=2e-2)
