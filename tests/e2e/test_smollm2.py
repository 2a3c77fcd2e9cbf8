"""A real model: SmolLM2-135M-Instruct, in the folder that MCORE_SMOLLM2 names.

It has 9 heads of queries and 3 of keys and values: tensor parallelism takes 3 ranks, not 2.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from commands import losses
from safetensors.torch import load_file

FOLDER = os.environ.get("MCORE_SMOLLM2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(FOLDER is None, reason="MCORE_SMOLLM2 names no model folder"),
]
TALKS = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Name a prime number above ten.", "Eleven is a prime number above ten."),
    ("Why is the sky blue?", "Air scatters blue light more than red light."),
    ("Translate 'good morning' into Spanish.", "'Good morning' is 'buenos días' in Spanish."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("Write a Python expression for the square of x.", "`x ** 2`"),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet, around the year 1600."),
    ("What do bees make?", "Bees make honey, from the nectar of flowers."),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("smollm2") / "rows.jsonl"
    lines = (
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in TALKS
    )
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module", params=["tensor 3", "pipeline 2"])
def trained(request, mcore, rows, tmp_path_factory):
    """One step over some ranks, so small that no weight changes."""
    kind, ranks = request.param.split()
    ran = mcore(
        "run", "--plugin", "sft", "--model", FOLDER, "--dataset", rows, "--torch_dtype", "float32",
        "--nproc_per_node", ranks, f"--{kind}_model_parallel_size", ranks, "--train_iters", 1,
        "--micro_batch_size", 8, "--global_batch_size", 8, "--loss_scale", "all", "--lr", 1e-60,
        "--num_workers", 0, "--no_save_optim", "--save", tmp_path_factory.mktemp("run"),
        timeout=600,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    return ran.folder()


@pytest.fixture(scope="module")
def reference(mcore):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(FOLDER)


def test_two_tensor_parallel_ranks_are_refused(mcore, rows):
    ran = mcore(
        "run", "--plugin", "sft", "--model", FOLDER, "--dataset", rows, "--train_iters", 1,
        "--nproc_per_node", 2, "--tensor_model_parallel_size", 2,
    )  # fmt: skip
    assert ran.code == 2
    assert (
        "error[MC611]: the model has 9 attention heads, which tensor_model_parallel_size 2 does "
        "not divide\n  9 / 2 = 4.50\n  fix: --tensor_model_parallel_size 1 or 3\n"
    ) in ran.err


def test_the_first_loss_is_that_of_transformers(trained, reference):
    model, tokenizer = reference
    total, count = 0.0, 0
    for question, answer in TALKS:
        talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(talk, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert losses(trained)[1] == pytest.approx(total / count, abs=1e-4)


def test_the_round_trip_changes_no_bit(trained):
    mine = load_file(trained / "checkpoint-1" / "model.safetensors")
    expected = {}
    for file in Path(FOLDER).glob("*.safetensors"):
        expected |= load_file(file)
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[name], expected[name]) for name in expected)


def test_the_text_is_the_same(trained, reference):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = reference
    folder = trained / "checkpoint-1"
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = [{"role": "user", "content": "What is gravity?"}]
    ids = [
        t.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        for t in (tokenizer, AutoTokenizer.from_pretrained(folder))
    ]
    assert torch.equal(ids[0]["input_ids"], ids[1]["input_ids"])
    texts = [
        tokenizer.decode(m.generate(**i, max_new_tokens=32, do_sample=False)[0])
        for m, i in zip((model, other), ids, strict=True)
    ]
    assert texts[0] == texts[1]
    assert "gravity" in texts[0].lower()
