"""Reward models: transformers opens what rm writes and scores alike, in grpo too."""

import json
import random

import pytest
import torch
from commands import metrics

STEPS = 8
LAYOUTS = {
    "one": (1, []),
    "tp2": (2, ["--tensor_model_parallel_size", "2", "--sequence_parallel"]),
    "pp2": (2, ["--pipeline_model_parallel_size", "2"]),
}


def sums(count, seed):
    rng = random.Random(seed)
    for _ in range(count):
        a, b = rng.randint(0, 99), rng.randint(0, 999)
        wrong = "".join(rng.choice("abcdef") for _ in range(rng.randint(1, 5)))
        yield {"prompt": f"{a} + {b} = ?", "chosen": str(a + b), "rejected": wrong}


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def files(place):
    return write(place / "rm_train.jsonl", sums(96, 0)), write(place / "rm_val.jsonl", sums(16, 7))


@pytest.fixture(scope="module")
def trained(mcore, model, files, tmp_path_factory):
    """The folder of a reward model, and what its run said of the held-out pairs; each once."""
    found = {}

    def run(tuner, layout):
        if (tuner, layout) in found:
            return found[tuner, layout]
        ranks, options = LAYOUTS[layout]
        argv = [
            "run", "--plugin", "rm", "--model", model, "--dataset", files[0],
            "--val_dataset", files[1], "--num_workers", 0, "--micro_batch_size", 4,
            "--global_batch_size", 8, "--max_length", 96, "--train_iters", STEPS,
            "--eval_interval", STEPS, "--log_interval", 1, "--center_rewards_coefficient", "0.01",
            "--tuner_type", tuner, "--lr", "5e-3", "--save", tmp_path_factory.mktemp("rm"),
            *options,
        ]  # fmt: skip
        ran = mcore(*argv) if ranks == 1 else mcore.ranks(ranks, *argv)
        assert ran.code == 0, ran.err
        last = [line for line in metrics(ran.folder()) if "eval/loss" in line][-1]
        name = f"checkpoint-{STEPS}" + ("" if tuner == "full" else "-merged")
        found[tuner, layout] = ran.folder() / name, last
        return found[tuner, layout]

    return run


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def scores(folder, talks, *, together=False):
    """What transformers gives conversations, one by one or in one padded batch."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    scorer = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    assert scorer.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.apply_chat_template(each, tokenize=False) for each in talks]
    with torch.no_grad():
        if together:
            batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
            ids, mask = batch["input_ids"], batch["attention_mask"]
            return scorer(input_ids=ids, attention_mask=mask).logits.squeeze(-1).tolist()
        return [float(scorer(tokenizer(t, return_tensors="pt").input_ids).logits) for t in texts]


@pytest.mark.parametrize(("tuner", "layout"), [("full", x) for x in LAYOUTS] + [("lora", "tp2")])
def test_transformers_gives_the_scores_that_the_run_gave(trained, files, tuner, layout):
    folder, last = trained(tuner, layout)
    assert last["eval/accuracy"] > 0.8
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    found = {}
    for side in ("chosen", "rejected"):
        found[side] = scores(folder, [talk(row["prompt"], row[side]) for row in rows])
        mean = sum(found[side]) / len(rows)
        assert last[f"eval/rewards/{side}"] == pytest.approx(mean, rel=1e-5, abs=1e-5)
    every = [*found["chosen"], *found["rejected"]]
    assert last["eval/max_reward"] == pytest.approx(max(every), rel=1e-5)
    assert last["eval/min_reward"] == pytest.approx(min(every), rel=1e-5)
    gaps = torch.tensor(found["chosen"]) - torch.tensor(found["rejected"])
    assert last["eval/margin"] == pytest.approx(gaps.mean().item(), rel=1e-5)
    centred = (torch.tensor(found["chosen"]) + torch.tensor(found["rejected"])).square()
    loss = (-torch.nn.functional.logsigmoid(gaps) + 0.01 * centred).mean().item()
    assert last["eval/loss"] == pytest.approx(loss, rel=1e-5)


def test_a_padded_batch_has_the_same_scores(trained):
    """The saved config says what pads: transformers finds the last token of each row."""
    folder, _ = trained("full", "one")
    talks = [talk("1 + 1 = ?", "2"), talk("100 + 200 = ?", "300"), talk("5 + 5 = ?", "abcde")]
    assert scores(folder, talks, together=True) == pytest.approx(scores(folder, talks), rel=1e-5)


@pytest.fixture
def grpo(mcore, model, tmp_path):
    """Run one step of grpo with more options."""

    def run(*options):
        rows = write(tmp_path / "prompts.jsonl", [{"prompt": f"{i} + 1 = ?"} for i in range(8)])
        return mcore(
            "run", "--plugin", "grpo", "--model", model, "--dataset", rows, *options,
            "--global_batch_size", 8, "--micro_batch_size", 4, "--num_generations", 4,
            "--max_completion_length", 8, "--lr", "1e-4", "--beta", 0, "--num_workers", 0,
            "--train_iters", 1, "--log_completions", "true", "--save", tmp_path / "run",
        )  # fmt: skip

    return run


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_grpo_takes_it_as_the_reward(grpo, trained, tuner):
    """Each completion's reward is the score of the conversation that it makes."""
    folder, _ = trained(tuner, "one" if tuner == "full" else "tp2")
    ran = grpo("--reward_model", folder)
    assert ran.code == 0, ran.err
    lines = (ran.folder() / "completions.jsonl").read_text().splitlines()
    said = [json.loads(line) for line in lines]
    assert len(said) == 8
    talks = []
    for each in said:
        question = each["prompt"].removeprefix("user\n").removesuffix("\nassistant\n")
        assert question.endswith(" + 1 = ?")
        talks.append(talk(question, each["completion"]))
    wanted = scores(folder, talks)
    assert len(set(wanted)) > 1
    for each, score in zip(said, wanted, strict=True):
        assert each["rewards"]["reward_model"] == pytest.approx(score, rel=1e-4, abs=1e-5)
        assert each["reward"] == pytest.approx(score, rel=1e-4, abs=1e-5)


def test_what_is_no_reward_model(grpo, model, trained, tmp_path):
    """transformers would give a causal model a random head, and score with it."""
    adapter = trained("lora", "tp2")[0].parent / f"checkpoint-{STEPS}"
    config = json.loads((model / "config.json").read_text())
    config["architectures"] = ["Qwen3ForSequenceClassification"]
    for name, labels in (("two", {"0": "a", "1": "b"}), ("empty", {"0": "a"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**config, "id2label": labels}))
    fix = "  fix: a checkpoint-N of a run of rm; with LoRA its checkpoint-N-merged\n"
    cases = {
        model: f"--reward_model {model} is no sequence-classification model\n"
        f"  found: Qwen3ForCausalLM\n{fix}",
        adapter: f"--reward_model {adapter} is no sequence-classification model\n"
        "  found: no config.json that names one, but ",
        tmp_path / "two": f"--reward_model {tmp_path}/two has 2 labels; a reward is one number\n",
        tmp_path / "empty": f"the reward model {tmp_path}/empty cannot be read\n",
    }
    for folder, text in cases.items():
        ran = grpo("--reward_model", folder)
        assert ran.code == 2, ran.err
        assert f"error[MC344]: {text}" in ran.err
        assert "Traceback" not in ran.err
    ran = grpo("--reward_funcs", "reward_model")
    assert ran.code == 2
    assert "error[MC344]: --reward_funcs reward_model does not say which model\n" in ran.err
