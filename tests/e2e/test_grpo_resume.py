"""grpo killed within a round of generation: the rest is that of the uninterrupted run."""

import json

import pytest
import torch
from commands import metrics
from conftest import make_model
from safetensors.torch import load_file
from test_kill import moves, newest, same, training_state

REWARD = "def reward(rollouts):\n    return [sum(r.token_ids) % 7 / 7 for r in rollouts]\n"
SHARED = {
    # four steps a round: checkpoint 3 lies within the first, 6 within the second
    "round": ["--steps_per_generation", 2, "--num_iterations", 2, "--beta", 0],
    "reference": [
        "--num_iterations", 2, "--beta", 0.5, "--sync_ref_model", "true",
        "--ref_model_sync_steps", 2, "--ref_model_mixup_alpha", 0.4,
    ],
}  # fmt: skip


@pytest.fixture
def command(model, tmp_path):
    reward, data = tmp_path / "reward.py", tmp_path / "prompts.jsonl"
    reward.write_text(REWARD)
    data.write_text("".join(json.dumps({"prompt": f"{n} + {n} = ?"}) + "\n" for n in range(40)))
    return [
        "run", "--plugin", "grpo", "--model", model, "--dataset", data, "--num_workers", 0,
        "--reward_funcs", f"{reward}:reward", "--num_generations", 2, "--global_batch_size", 4,
        "--micro_batch_size", 2, "--max_completion_length", 6, "--temperature", 1, "--lr", 1e-2,
        "--lr_decay_style", "constant", "--train_iters", 8, "--save_interval", 3,
        "--log_interval", 1, "--add_version", "false",
    ]  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_a_kill_within_a_round(mcore, model, command, tmp_path, name):
    command = [*command, *SHARED[name]]
    whole, save = tmp_path / "whole", tmp_path / "killed"
    ran = mcore(*command, "--save", whole)
    assert ran.code == 0, ran.err
    command += ["--save", save, "--load", save, "--exit_on_missing_checkpoint", "false"]
    child = mcore.start(command)
    moves(child, save, 0)
    child.kill()
    assert child.wait().code == -9
    assert newest(save) in (3, 6)
    ran = mcore(*command)
    assert ran.code == 0, ran.err
    mine, expected = (load_file(p / "checkpoint-8/model.safetensors") for p in (save, whole))
    assert all(torch.equal(mine[key], expected[key]) for key in expected)
    first = load_file(model / "model.safetensors")
    assert any(not torch.equal(first[key], expected[key]) for key in expected)
    mine, expected = (
        training_state(p / "checkpoint-8", tmp_path / "scratch") for p in (save, whole)
    )
    assert mine.keys() == expected.keys()
    assert [key for key in expected if not same(mine[key], expected[key])] == []
    told = [
        {k: v for k, v in line.items() if k in ("step", "loss", "reward", "kl", "grad_norm")}
        for line in metrics(save)
    ]
    assert told == [{k: line[k] for k in told[0]} for line in metrics(whole)]
    if name == "reference":
        check_reference(expected, told)


def check_reference(state, told):
    """The checkpoint holds a reference that is neither the policy nor what it began as."""
    ref = {k.rpartition("beside.ref.0.")[2]: v for k, v in state.items() if "beside.ref.0." in k}
    assert ref
    differ = 0
    for key, weight in ref.items():
        policy = next(v for k, v in state.items() if k.endswith(key) and "beside" not in k)
        differ += isinstance(weight, torch.Tensor) and not torch.equal(weight, policy)
    assert differ
    assert told[-1]["kl"] > 0


def test_a_reference_of_another_shape_cannot_follow(mcore, command, tmp_path):
    other = make_model(tmp_path / "wider", hidden_size=64)
    moving = ["--sync_ref_model", "true", "--beta", 0.1, "--ref_model", other]
    ran = mcore(*command, *moving, "--save", tmp_path / "run")
    assert ran.code == 2, ran.err
    assert "error[MC358]: ref: its weights cannot follow the policy's" in ran.err
    assert "Traceback" not in ran.err
