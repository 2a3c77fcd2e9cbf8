"""gkd from end to end: a student comes closer to its teacher, with everyone's answers."""

import json
import random

import pytest
from commands import losses, metrics
from conftest import make_model

SMALL = [
    "--num_workers", "0", "--lr", "3e-3", "--micro_batch_size", "4", "--global_batch_size", "8",
    "--log_interval", "1", "--max_length", "96", "--max_completion_length", "16",
]  # fmt: skip


@pytest.fixture(scope="module")
def questions(place):
    rng = random.Random(0)
    rows = []
    for _ in range(96):
        a, b = rng.randint(0, 99), rng.randint(0, 999)
        rows.append({"prompt": f"{a} + {b} = ?", "completion": str(a + b)})
    file = place / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def teacher(place):
    """Wider than the student, surer of itself, and with a larger vocabulary."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = make_model(place / "teacher")
    small = Qwen3Config.from_pretrained(folder)
    torch.manual_seed(5)
    small.hidden_size, small.vocab_size, small.initializer_range = 96, small.vocab_size + 5, 0.1
    Qwen3ForCausalLM(small).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def start(mcore, model, questions, teacher, tmp_path_factory):
    def run(*options, ranks=1, code=0, dataset=questions):
        argv = ["run", "--plugin", "gkd", "--model", model, "--dataset", dataset, *SMALL]
        argv += ["--teacher_model", teacher, "--save", tmp_path_factory.mktemp("gkd"), *options]
        ran = mcore(*argv) if ranks == 1 else mcore.ranks(ranks, *argv)
        assert ran.code == code, ran.err
        return ran if code else ran.folder()

    return run


def divergences(run):
    return [line["divergence"] for line in metrics(run) if "divergence" in line]


def test_the_divergence_falls(start):
    ran = start("--lmbda", "0.5", "--train_iters", 30, "--sft_alpha", "0.1")
    found = divergences(ran)
    assert sum(found[-5:]) < 0.6 * sum(found[:5])
    sources = {line["on_policy"] for line in metrics(ran) if "on_policy" in line}
    assert sources == {0.0, 1.0}


def test_a_resumed_run_repeats_the_rest(start):
    whole = start("--lmbda", "0.5", "--train_iters", 6, "--save_interval", 3)
    rest = start("--lmbda", "0.5", "--train_iters", 6, "--load", whole / "checkpoint-3")
    assert losses(rest) == {step: loss for step, loss in losses(whole).items() if step > 3}


def test_prompts_alone_suffice_where_models_answer(start, place):
    file = place / "prompts.jsonl"
    rows = [{"prompt": f"{i} + {i} = ?"} for i in range(16)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    start("--lmbda", "0.5", "--seq_kd", "true", "--train_iters", 2, dataset=file)
    ran = start("--train_iters", 2, dataset=file, code=2)
    assert "there is no answer to distill on" in ran.err


def test_offloading_needs_a_gpu(start):
    ran = start("--offload_teacher_model", "true", "--train_iters", 1, code=2)
    assert "MC371" in ran.err


@pytest.mark.slow
def test_two_ranks(start):
    options = ("--lmbda", "1", "--train_iters", 3)
    one = start(*options)
    two = start(*options, "--tensor_model_parallel_size", 2, ranks=2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
