"""Whole steps of grpo and dpo with LoRA are those of TRL's trainers, from the same adapter.

Plain gradient descent without momentum: what an adapter moves by is its gradient. Completions are
fixed; prompts, tokens, rewards, advantages, references, losses and reductions are each side's own.
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import metrics
from conftest import TEMPLATE
from safetensors.torch import load_file

BENCH = Path(__file__).parents[2] / "bench"
COPIES, LENGTH, LR = 4, 12, 2.0
ALONE = TEMPLATE.replace("<|im_end|>\n{% endfor %}", "<|im_end|>{% endfor %}").replace(
    "<|im_start|>{{", "{% if not loop.first %}\n{% endif %}<|im_start|>{{"
).replace("{% if add_generation_prompt %}<", "{% if add_generation_prompt %}\n<")  # fmt: skip
"""Without the line break after the last message, which TRL's DPO trains and mcore does not."""
OURS = [
    "--num_workers", "0", "--dataset_shuffle", "false", "--train_dataloader_shuffle", "false",
    "--tuner_type", "lora", "--lora_dropout", "0", "--optimizer", "sgd", "--sgd_momentum", "0",
    "--lr", str(LR), "--lr_decay_style", "constant", "--weight_decay", "0", "--clip_grad", "0",
    "--log_interval", "1", "--add_version", "false", "--merge_lora", "false",
]  # fmt: skip
THEIRS = {
    "optim": "sgd", "learning_rate": LR, "lr_scheduler_type": "constant", "weight_decay": 0.0,
    "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no", "use_cpu": True,
    "bf16": False, "gradient_checkpointing": False, "report_to": "none",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    from datasets import disable_progress_bars

    disable_progress_bars()
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def adapter(place, model):
    """An adapter of PEFT with both matrices drawn."""
    from peft import get_peft_model
    from start_adapter import lora_config

    torch.manual_seed(3)
    tuned = get_peft_model(base(model), lora_config())
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    tuned.save_pretrained(place / "start")
    return place / "start"


def base(model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype="float32")


def tokenizer_of(model):
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(model)
    found.chat_template = ALONE
    return found


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(mcore, model, adapter, save, *options):
    """Run mcore; return the adapter after it and what it logged of each step."""
    template = save.with_suffix(".jinja")
    template.write_text(ALONE)
    ran = mcore(
        "run", "--model", model, "--adapters", adapter, *OURS, "--chat_template", template,
        "--save", save, *options,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    last = max(save.glob("checkpoint-*"), key=lambda f: int(f.name.partition("-")[2]))
    return load_file(last / "adapter_model.safetensors"), metrics(save)


def train(trainer, adapter, tmp_path):
    """Take the steps of a trainer of TRL; return the same."""
    from start_adapter import load_adapter

    load_adapter(trainer.model, str(adapter))
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "theirs")
    logs = [line for line in trainer.state.log_history if "loss" in line]
    return load_file(tmp_path / "theirs" / "adapter_model.safetensors"), logs


def assert_moved_alike(mine, theirs, adapter):
    """Within 1e-5 of the largest movement of each matrix; every one has moved."""
    before = load_file(adapter / "adapter_model.safetensors")
    assert mine.keys() == theirs.keys() == before.keys()
    for name, start in before.items():
        moved = theirs[name] - start
        assert moved.abs().max() > 1e-3, name  # what is compared is not rounding of the start
        difference = (mine[name] - theirs[name]).abs().max() / moved.abs().max()
        assert difference < 1e-5, (name, difference)


# -- grpo ------------------------------------------------------------------------------------------


def completion(index):
    """Return the tokens of a completion of the round; some end, some are cut."""
    rng = np.random.default_rng(index)
    size = int(rng.integers(1, LENGTH + 1))
    ids = rng.integers(3, 98, size).tolist()
    return ids if size == LENGTH else [*ids, 2]


REWARD = "def reward(rollouts):\n    return [{0}(r.token_ids) for r in rollouts]\n"
VALUE = "def value(ids):\n    return sum(ids) % 11 / 4\n\n\n"


def value(ids):
    return sum(ids) % 11 / 4


def fixed_engine():
    """Make the native engine answer with the fixed completions."""
    from mcore_rlhf.rollout.native.engine import NativeEngine

    from mcore_core.protocols import Completion

    def poll(self, *, wait=True):
        found, self.asked = getattr(self, "asked", []), []
        made = []
        for request in found:
            ids = completion(int(request.id.split("-")[1]))
            n = len(ids)
            stop = "stop" if ids[-1] == 2 else "length"
            logps, versions = np.full(n, -1, np.float32), np.zeros(n, np.int64)
            trains = np.ones(n, bool)
            made.append(Completion(request.id, tuple(ids), logps, versions, stop, trains))
        return made

    def submit(self, requests):
        self.asked = [*getattr(self, "asked", []), *requests]

    NativeEngine.submit, NativeEngine.poll = submit, poll


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("grpo", {"beta": 0.3}),
        ("grpo", {"beta": 0.0, "num_iterations": 2, "epsilon": 0.01}),
        ("dapo", {"beta": 0.0, "scale_rewards": "batch"}),
        ("dr_grpo", {"beta": 0.1, "scale_rewards": "none", "num_iterations": 2}),
    ],
)
def test_grpo(mcore, model, adapter, tmp_path, loss, options):
    from datasets import Dataset
    from start_adapter import lora_config
    from trl import GRPOConfig, GRPOTrainer

    prompts = [[{"role": "user", "content": f"{n} + {n * n} = ?"}] for n in (3, 17)]
    data = write(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    reward = tmp_path / "reward.py"
    reward.write_text(VALUE + REWARD.format("value"))
    steps, batch = options.get("num_iterations", 1), len(prompts) * COPIES
    flags = [text for name, v in options.items() for text in (f"--{name}", str(v))]
    mine, logs = run(
        lambda *argv: mcore(*argv, before=fixed_engine), model, adapter, tmp_path / "run",
        "--plugin", "grpo", "--dataset", data, "--reward_funcs", f"{reward}:reward",
        "--loss_type", loss, *flags, "--num_generations", COPIES, "--temperature", "0.9",
        "--top_k", "0", "--top_p", "1", "--max_completion_length", LENGTH,
        "--micro_batch_size", batch // 2, "--global_batch_size", batch, "--train_iters", steps,
    )  # fmt: skip

    class Fixed(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *_, **__):
            assert len(prompt_ids) == batch
            return [completion(i) for i in range(batch)], None

    def rewards(completion_ids, **_):
        return [value(ids) for ids in completion_ids]

    trainer = Fixed(
        model=base(model),
        processing_class=tokenizer_of(model),
        reward_funcs=rewards,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        peft_config=lora_config(),
        args=GRPOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=batch // 2,
            gradient_accumulation_steps=2, max_steps=steps, num_generations=COPIES,
            max_completion_length=LENGTH, shuffle_dataset=False, temperature=0.9, loss_type=loss,
            use_bias_correction_kl=False,  # the KL is added after the importance weights
            **options, **THEIRS,
        ),
    )  # fmt: skip
    theirs, expected = train(trainer, adapter, tmp_path)
    assert_moved_alike(mine, theirs, adapter)
    seen = [line for line in logs if "loss" in line]
    assert len(seen) == len(expected) == steps
    assert seen[0]["reward"] == pytest.approx(expected[0]["reward"], abs=1e-6)
    for a, b in zip(seen, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6)
    if options.get("epsilon"):
        assert seen[1]["clip_ratio/region_mean"] > 0
        assert expected[1]["clip_ratio/region_mean"] > 0


# -- dpo -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_dpo(mcore, model, adapter, tmp_path, loss):
    from datasets import Dataset
    from start_adapter import lora_config
    from trl import DPOConfig, DPOTrainer

    rng = random.Random(1)
    rows = []
    for _ in range(16):
        a, b = rng.randint(0, 99), rng.randint(0, 999)
        talk = {
            "prompt": ("user", f"{a} + {b} = ?"),
            "chosen": ("assistant", str(a + b)),
            "rejected": ("assistant", "x" * rng.randint(1, 9)),
        }
        rows.append({k: [{"role": who, "content": what}] for k, (who, what) in talk.items()})
    data = write(tmp_path / "pairs.jsonl", rows)
    mine, logs = run(
        mcore, model, adapter, tmp_path / "run", "--plugin", "dpo", "--dataset", data,
        "--beta", "0.3", "--loss_type", loss, "--micro_batch_size", 4, "--global_batch_size", 8,
        "--max_length", 96, "--train_iters", 2,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=base(model),
        processing_class=tokenizer_of(model),
        train_dataset=Dataset.from_list(rows),
        peft_config=lora_config(),
        args=DPOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=2,
            gradient_accumulation_steps=2, train_sampling_strategy="sequential", beta=0.3,
            loss_type=loss, max_length=96, **THEIRS,
        ),
    )  # fmt: skip
    theirs, expected = train(trainer, adapter, tmp_path)
    assert_moved_alike(mine, theirs, adapter)
    names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen")
    for a, b in zip([x for x in logs if "loss" in x], expected, strict=True):
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name
