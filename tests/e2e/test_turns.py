"""Conversations of several turns, with the native engine and a chat template."""

import json

import pytest
from commands import metrics

SCHEDULER = """
class Environment:
    def __init__(self, config):
        self.turns = config.get("max_turns")

    async def __call__(self, turn):
        assert turn.messages[-1] == {"role": "assistant", "content": turn.text}
        assert [m["role"] for m in turn.messages] == ["user", "assistant"] * turn.number
        if turn.row["prompt"].startswith("bad"):
            raise ValueError("no such move")
        return [{"role": "user", "content": f"{turn.number} is not right"}]
"""
REWARD = """
def turns(rollouts):
    return [sum(m["role"] == "assistant" for m in r.messages) / 3 for r in rollouts]
"""


@pytest.fixture
def grpo(mcore, model, tmp_path):
    (tmp_path / "environment.py").write_text(SCHEDULER)
    (tmp_path / "reward.py").write_text(REWARD)

    def run(*options, begin="", ranks=1):
        rows = [{"prompt": f"{begin}{i} + 1 = ?"} for i in range(16)]
        data = tmp_path / "prompts.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        argv = [
            "run", "--plugin", "grpo", "--model", model, "--dataset", data, "--num_workers", 0,
            "--reward_funcs", f"{tmp_path}/reward.py:turns", "--beta", 0, "--lr", "1e-3",
            "--multi_turn_scheduler", f"{tmp_path}/environment.py:Environment", "--max_turns", 3,
            "--global_batch_size", 8, "--micro_batch_size", 4, "--num_generations", 4,
            "--max_completion_length", 160, "--train_iters", 2, "--log_completions", "true",
            "--stop_words", *"aeiou0123456789", "--save", tmp_path / f"run{ranks}", *options,
        ]  # fmt: skip
        return mcore(*argv) if ranks == 1 else mcore.ranks(ranks, *argv)

    return run


def test_an_environment_answers(grpo):
    """The same with two ranks of a model; what the environment says stands between the turns."""
    found = []
    for ranks, options in ((1, []), (2, ["--tensor_model_parallel_size", 2])):
        ran = grpo(*options, ranks=ranks)
        assert ran.code == 0, ran.err
        lines = (ran.folder() / "completions.jsonl").read_text().splitlines()
        said = [json.loads(line) for line in lines]
        assert len(said) == 16
        turns = [each["completion"].count("is not right") + 1 for each in said]
        assert max(turns) == 3
        assert [round(3 * each["reward"]) for each in said] == turns
        steps = metrics(ran.folder())
        assert [s["completions/mean_turns"] for s in steps] == pytest.approx(
            [sum(turns[:8]) / 8, sum(turns[8:]) / 8]
        )
        found.append([each["completion"] for each in said[:8]])
    assert found[0] == found[1]


def test_an_environment_that_fails_names_the_row(grpo):
    ran = grpo(begin="bad ")
    assert ran.code == 1
    assert "MC848" in ran.err and "ValueError: no such move" in ran.err
    assert 'row: {"prompt": "bad' in ran.err
