"""dpo, kto and rm from end to end: they learn, go on, agree with transformers, and refuse."""

import json
import random

import pytest
import torch
from commands import losses, metrics
from conftest import make_model

SMALL = [
    "--num_workers", "0", "--micro_batch_size", "4", "--global_batch_size", "8",
    "--log_interval", "1", "--max_length", "96",
]  # fmt: skip


def sums(rng):
    a, b = rng.randint(0, 99), rng.randint(0, 999)
    wrong = "".join(rng.choice("abcdef") for _ in range(rng.randint(1, 5)))
    return f"{a} + {b} = ?", str(a + b), wrong


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def pairs(place):
    """Right sums against letters."""
    rng = random.Random(0)
    talks = [sums(rng) for _ in range(96)]
    rows = [{"prompt": q, "chosen": good, "rejected": bad} for q, good, bad in talks]
    return write(place / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def answers(place):
    rng = random.Random(0)
    talks = [sums(rng) for _ in range(96)]
    rows = [
        {"prompt": q, "completion": t[i % 2], "label": i % 2 == 0}
        for i, (q, *t) in enumerate(talks)
    ]
    return write(place / "answers.jsonl", rows)


@pytest.fixture(scope="module")
def start(mcore, model, tmp_path_factory):
    """Run a recipe, alone or as ranks; return how it ended."""

    def run(plugin, dataset, *options, ranks=1, code=0):
        argv = ["run", "--plugin", plugin, "--model", model, "--dataset", dataset, *SMALL]
        argv += ["--save", tmp_path_factory.mktemp(plugin), *options]
        argv += [] if "--lr" in options else ["--lr", "2e-3"]
        ran = mcore(*argv) if ranks == 1 else mcore.ranks(ranks, *argv)
        assert ran.code == code, ran.err
        return ran

    return run


def evaluation(run):
    return [line for line in metrics(run) if "eval/loss" in line][-1]


HELD_OUT = ["--split_dataset_ratio", "0.2", "--train_iters", 14, "--eval_interval", 14]


def test_dpo_learns(start, pairs):
    ran = start("dpo", pairs, *HELD_OUT)
    last = evaluation(ran.folder())
    assert last["eval/rewards/accuracies"] > 0.8
    assert last["eval/rewards/margins"] > 0.3
    first = metrics(ran.folder())[0]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4)  # the reference is the policy
    assert abs(first["rewards/margins"]) < 1e-4


def test_kto_learns(start, answers):
    ran = start("kto", answers, *HELD_OUT)
    lines = metrics(ran.folder())
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-3)
    assert evaluation(ran.folder())["eval/rewards/margins"] > 0.1


def logps(folder, talks):
    """Summed log-probabilities of the answers, by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for question, answer in talks:
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        before = len(tokenizer(prompt).input_ids)
        ids = tokenizer(f"{prompt}{answer}<|im_end|>", return_tensors="pt").input_ids
        with torch.no_grad():
            values = model(ids).logits.log_softmax(-1)[0, :-1]
        picked = values.gather(-1, ids[0, 1:, None])[before - 1 :]
        found.append(float(picked.sum()))
    return torch.tensor(found)


@pytest.mark.parametrize("ranks", [1, 2])
def test_another_reference(start, model, pairs, tmp_path, ranks):
    """The first step's rewards are beta times what transformers says of both models."""
    other = make_model(tmp_path / "other", num_hidden_layers=2, intermediate_size=96)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()][:8]
    file = write(tmp_path / "rows.jsonl", rows)
    layout = ["--tensor_model_parallel_size", "2"] if ranks == 2 else []
    ran = start(
        "dpo", file, "--ref_model", other, "--train_iters", 1, "--beta", 0.3, *layout, ranks=ranks
    )
    line = metrics(ran.folder())[0]
    for side in ("chosen", "rejected"):
        talks = [(row["prompt"], row[side]) for row in rows]
        policy, reference = logps(model, talks), logps(other, talks)
        assert line[f"logps/{side}"] == pytest.approx(policy.mean().item(), rel=1e-4)
        wanted = 0.3 * (policy - reference).mean().item()
        assert line[f"rewards/{side}"] == pytest.approx(wanted, rel=1e-3, abs=1e-4)


def test_a_run_as_the_reference(start, pairs):
    """--ref_load takes a checkpoint of a run: the reference is what was trained there."""
    trained = start("dpo", pairs, "--train_iters", 4, "--lr", "1e-2").folder()
    again = start("dpo", pairs, "--train_iters", 1, "--ref_load", trained).folder()
    folder = trained / "checkpoint-4"
    same = start("dpo", pairs, "--train_iters", 1, "--ref_model", folder).folder()
    first, second = metrics(again)[0], metrics(same)[0]
    assert first["rewards/margins"] == pytest.approx(second["rewards/margins"], rel=1e-4)
    assert first["rewards/margins"] < -0.01  # the reference prefers chosen answers, the policy not


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one(start, pairs, ranks, tmp_path):
    """BCO's mean and the reference's scores go on; under PP they are the last stage's."""
    rows = pairs.read_text().splitlines()[:20]
    file = tmp_path / "few.jsonl"
    file.write_text("\n".join(rows) + "\n")
    options = ["--loss_type", "bco_pair,sft", "--train_iters", 6, "--save_interval", 3]
    if ranks == 2:
        options += ["--pipeline_model_parallel_size", "2"]
    whole = start("dpo", file, *options, ranks=ranks).folder()
    resumed = start("dpo", file, *options, "--load", whole / "checkpoint-3", ranks=ranks).folder()
    assert losses(resumed) == {k: v for k, v in losses(whole).items() if k > 3}


def test_a_loss_of_a_file(start, pairs, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch.nn.functional as F\n\n\n"
        "def loud(pairs, options):\n"
        "    z = pairs.chosen_ratio_P - pairs.rejected_ratio_P\n"
        "    return -2 * F.logsigmoid(options.beta * z)\n"
    )
    plain, mine = (
        start("dpo", pairs, "--train_iters", 2, "--loss_type", name).folder()
        for name in ("sigmoid", f"{tmp_path}/mine.py:loud")
    )
    assert losses(mine)[1] == pytest.approx(2 * losses(plain)[1], rel=1e-6)


def test_packed_pairs(start, pairs):
    ran = start(
        "dpo",
        pairs,
        "--packing",
        "--packing_length",
        256,
        "--train_iters",
        3,
        "--global_batch_size",
        4,
    )
    assert len(losses(ran.folder())) == 3


TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
BAD = {
    "no rejected answer": (
        "dpo",
        [{"prompt": "q", "chosen": "a"}],
        [],
        "error[MC403]: {file}: no usable columns\n"
        "  found: prompt, chosen\n"
        "  usable: messages, rejected_messages | messages, rejected_response | query, response, "
        "rejected_response | prompt, chosen, rejected | chosen, rejected\n"
        "  fix: say what they mean, for example --columns "
        '\'{{"question": "prompt", "better": "chosen", "worse": "rejected"}}\'\n',
    ),
    "a row without a rejected answer": (
        "dpo",
        [
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            {"prompt": "q", "chosen": "a", "rejected": None},
        ],
        ["--strict"],
        "error[MC404]: {file}:2: there is no rejected answer (it has: chosen, prompt)\n"
        "  fix: correct the row, or --strict false to leave it out\n",
    ),
    "no answer of that kind, of a reward model": (
        "rm",
        [{"messages": TALK}],
        [],
        "error[MC403]: {file}: no usable columns\n  found: messages\n",
    ),
    "every rejected answer is empty": (
        "dpo",
        [{"prompt": "q", "chosen": "a", "rejected": ""}] * 2,
        [],
        "error[MC405]: {file}: none of its 2 rows can be read\n"
        "  the first: {file}:1: there is no rejected answer (it has: chosen, prompt)\n",
    ),
    "identical answers of two conversations": (
        "dpo",
        [{"messages": TALK, "rejected_messages": TALK}],
        [],
        "error[MC405]: {file}: none of its 1 rows can be read\n"
        "  the first: {file}:1: the chosen and the rejected answer are the same\n",
    ),
    "identical answers": (
        "rm",
        [{"prompt": "q", "chosen": "a", "rejected": "a"}],
        [],
        "error[MC405]: {file}: none of its 1 rows can be read\n"
        "  the first: {file}:1: the chosen and the rejected answer are the same\n",
    ),
    "one class": (
        "kto",
        [{"prompt": "q", "completion": x, "label": True} for x in "abc"],
        [],
        "error[MC333]: all 3 answers are desirable: there is nothing undesirable to compare with\n"
        "  their 'label' is true\n"
        "  fix: add undesirable answers, or use --plugin sft to learn good ones\n",
    ),
    "the other class": (
        "kto",
        [{"prompt": "q", "completion": x, "label": False} for x in "ab"],
        ["--loss_type", "apo_zero_unpaired"],
        "error[MC333]: all 2 answers are undesirable: there is nothing desirable to compare with\n"
        "  their 'label' is false\n"
        "  fix: add desirable answers, or use --plugin sft to learn good ones\n",
    ),
    "a batch of one in a packed row": (
        "kto",
        [{"prompt": "q", "completion": x * 9, "label": x == "a"} for x in "abc"],
        [
            "--micro_batch_size",
            "1",
            "--global_batch_size",
            "1",
            "--packing",
            "--packing_length",
            "48",
            "--max_length",
            "48",
            "--train_iters",
            "1",
        ],
        "error[MC332]: a global batch of one answer: kto compares each prompt with the answer to "
        "another\n",
    ),
    "a batch of one": (
        "kto",
        [{"prompt": "q", "completion": x, "label": x == "a"} for x in "abc"],
        ["--micro_batch_size", "1", "--global_batch_size", "1"],
        "error[MC332]: a global batch of one answer: kto compares each prompt with the answer to "
        "another\n",
    ),
    "an unknown loss": (
        "dpo",
        [],
        ["--loss_type", "sigmod"],
        "error[MC202]: no loss named 'sigmod' (from --loss_type)\n"
        "  available: aot, aot_unpaired, apo_down, apo_zero, bco_pair, cpo, discopop, exo_pair, "
        "hinge, ipo, nca_pair, orpo, robust, sft, sigmoid, sigmoid_norm, simpo, sppo_hard\n"
        "  did you mean: sigmoid, simpo, sigmoid_norm?\n",
    ),
    "pairs that are too long": (
        "dpo",
        [{"prompt": "q", "chosen": "a" * 50, "rejected": "b"}],
        ["--max_length", "40", "--truncation_strategy", "right"],
        "error[MC410]: {file}: nothing is left to train on, all 1 rows were dropped\n"
        "  1 x one answer of the pair, and not the other, is longer than --max_length (first: "
        "{file}:1)\n"
        "  fix: raise --max_length\n",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(mcore, model, tmp_path, name):
    plugin, rows, options, text = BAD[name]
    file = write(tmp_path / "rows.jsonl", rows)
    argv = ["run", "--plugin", plugin, "--model", model, "--dataset", file, "--num_workers", 0]
    ran = mcore(*argv, "--save", tmp_path / "out", *options)
    assert ran.code == 2, ran.err
    assert text.format(file=file) in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("plugin", ["dpo", "kto"])
def test_a_reference_of_another_vocabulary(mcore, model, pairs, answers, tmp_path, plugin):
    size, words = (make_model(tmp_path / name) for name in ("size", "words"))
    config = json.loads((size / "config.json").read_text())
    (size / "config.json").write_text(json.dumps({**config, "vocab_size": 120}))
    tokenizer = json.loads((words / "tokenizer.json").read_text())
    known = tokenizer["model"]["vocab"]
    known["a"], known["b"] = known["b"], known["a"]
    (words / "tokenizer.json").write_text(json.dumps(tokenizer))
    notes = {
        size: f"vocab_size: {config['vocab_size']} in {model}, 120 in {size}",
        words: "their tokenizer.json give other ids to the same words",
    }
    data = pairs if plugin == "dpo" else answers
    for other, note in notes.items():
        argv = ["--plugin", plugin, "--model", model, "--dataset", data, "--ref_model", other]
        ran = mcore("run", *argv)
        assert ran.code == 2
        assert ran.err == (
            f"error[MC519]: the reference {other} has another vocabulary than the model\n"
            f"  {note}\n"
            "  fix: --ref_model with a model of the same tokenizer\n"
        )
