"""kill -9 at random moments, resume, again and again: the end is that of the uninterrupted run."""

import random
import shutil
import time

import pytest
import torch
from commands import losses
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mcore_core.checkpoint import folders


def training_state(checkpoint, scratch):
    """Everything in the torch_dist state, flat."""
    dcp_to_torch_save(checkpoint / "mcore", scratch)
    return dict(flat(torch.load(scratch, weights_only=False)))


def flat(value, name=""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from flat(item, f"{name}.{i}")
    else:
        yield name, value


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if hasattr(a, "getvalue"):
        return a.getvalue() == b.getvalue()
    return bool((a == b).all()) if hasattr(a, "shape") else a == b


def trial(mcore, sft, tmp_path, *, kills, steps, seed):
    """Run to the end without and with `kills` kills; compare the last checkpoints."""
    # dropout, so that random states matter; retention, so that deleting is interrupted too
    common = [
        *sft, "--train_iters", steps, "--save_interval", 2, "--save_retain_interval", 10,
        "--add_version", "false", "--attention_dropout", 0.1, "--hidden_dropout", 0.1,
    ]  # fmt: skip
    whole = mcore(*common, "--save", tmp_path / "whole", timeout=600)
    assert whole.code == 0, whole.err
    save = tmp_path / "killed"
    command = [*common, "--save", save, "--load", save, "--exit_on_missing_checkpoint", "false"]
    rng = random.Random(seed)
    seen = []
    for _ in range(kills):
        child = mcore.start(command)
        before = newest(save)
        # a fifth are killed anywhere, starting up included; the others once steps are taken
        if rng.random() > 0.2:
            moves(child, save, before)
        time.sleep(rng.uniform(0, 1.2))
        assert child.alive(), child.err
        child.kill()
        ran = child.wait()
        assert ran.code == -9, ran.err
        assert "error[" not in ran.err
        found = newest(save)
        assert found >= before
        seen.append(found)
        if found:
            checkpoint = save / f"checkpoint-{found}"
            assert len(load_file(checkpoint / "model.safetensors")) == 46
            assert training_state(checkpoint, tmp_path / "scratch")
    assert seen[-1] > 0
    assert seen[-1] < steps
    ran = mcore(*command, timeout=600)
    assert ran.code == 0, ran.err
    last = f"checkpoint-{steps}"
    mine, expected = (load_file(p / last / "model.safetensors") for p in (save, tmp_path / "whole"))
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[name], expected[name]) for name in expected)
    mine = training_state(save / last, tmp_path / "scratch")
    expected = training_state(tmp_path / "whole" / last, tmp_path / "scratch")
    assert mine.keys() == expected.keys()
    assert [name for name in expected if not same(mine[name], expected[name])] == []
    assert losses(save) == losses(tmp_path / "whole")
    kept = {p.name for p in save.iterdir() if "checkpoint" in p.name}
    assert kept == {p.name for p in (tmp_path / "whole").iterdir() if "checkpoint" in p.name}
    shutil.rmtree(save)


def newest(save):
    complete = folders.complete(save)
    return complete[-1].step if complete else 0


def moves(child, save, before, timeout=60):
    """Wait until the run has saved something beyond what was there."""
    end = time.monotonic() + timeout
    while newest(save) <= before:
        assert child.alive(), child.err
        assert time.monotonic() < end, child.err
        time.sleep(0.02)


def test_three_kills(mcore, sft, tmp_path):
    trial(mcore, sft, tmp_path, kills=3, steps=40, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills(mcore, sft, tmp_path):
    trial(mcore, sft, tmp_path, kills=20, steps=240, seed=2)
