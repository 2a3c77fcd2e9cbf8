"""DPO with LoRA on the CPU: pairs a second and peak memory against TRL's DPOTrainer.

    python bench/dpo_cpu.py --model FOLDER [--steps 30]

Both sides run in processes of their own, on the same pairs in the same order, from the same
adapter, with the same settings. Rates are over all steps but the first two. The last line is one
JSON document. Curves of several seeds, also on a GPU, are drawn by bench/curves.py, which starts
the same processes.
"""

import argparse
import json
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from aside import Side, add_arguments, asked, run_side
from start_adapter import load_adapter, lora_config, write_adapter

MICRO, GLOBAL, LENGTH, BETA, LR = 4, 8, 256, 0.1, 2e-5
HELD, EVERY = 64, 3
"""Pairs that are held out, and steps between two evaluations on them."""
TEMPLATE = (
    "{% for m in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's without the line break after the last message: TRL trains it, mcore does not."""
ACCURACY = "rewards/accuracies"
THINGS = ("apples", "books", "coins", "doors", "eggs", "flags", "glasses", "hats")


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return pairs whose chosen answer is right.

    The other one is long and evasive in half of them, and has a number that is much too large or
    nearly right in the others: the last are hard to learn.
    """
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b, what = rng.randint(2, 20), rng.randint(3, 20), rng.choice(THINGS)
        question = f"I have {a} {what} and get {b} more. How many {what} do I have?"
        good = f"You have {a + b} {what}."
        bad = rng.choice(
            [f"That is hard to say, since {what} can be counted in many ways; maybe {a * b}."] * 2
            + [f"You have {a * b} {what}.", f"You have {a + b + rng.randint(1, 9)} {what}."]
        )
        messages = [{"role": "user", "content": question}]
        rows.append(
            {
                "prompt": messages,
                "chosen": [{"role": "assistant", "content": good}],
                "rejected": [{"role": "assistant", "content": bad}],
            }
        )
    return rows


def command(run: Side, template: str, folder: str) -> list[str]:
    """Return the arguments of `mcore`."""
    held = ["--val_dataset", run.held, "--eval_interval", str(EVERY)] if run.held else []
    return [
        "run", "--plugin", "dpo", "--model", run.model, "--dataset", run.data, *held,
        "--chat_template", template,
        "--dataset_shuffle", "false", "--train_dataloader_shuffle", "false",
        "--tuner_type", "lora", "--adapters", run.adapter, "--lora_dropout", "0",
        "--lr", str(LR), "--lr_decay_style", "constant", "--weight_decay", "0.1",
        "--adam_beta1", "0.9", "--adam_beta2", "0.95", "--adam_eps", "1e-8",
        "--clip_grad", "1", "--beta", str(BETA), "--micro_batch_size", str(MICRO),
        "--global_batch_size", str(GLOBAL), "--max_length", str(LENGTH),
        "--train_iters", str(run.steps), "--log_interval", "1", "--seed", str(run.seed),
        "--torch_dtype", "float32", "--transformer_impl", "local", "--no_save_optim",
        "--recompute_granularity", "none", "--merge_lora", "false",
        "--save", folder, "--add_version", "false",
    ]  # fmt: skip


def ours(run: Side) -> dict[str, Any]:
    """Run `mcore run --plugin dpo` here."""
    from mcore_core.cli.main import main as mcore

    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "template.jinja"
        template.write_text(TEMPLATE, encoding="utf-8")
        code = mcore(command(run, str(template), folder))
        assert code == 0
        text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    every = [json.loads(line) for line in text.splitlines()]
    lines = [x for x in every if "loss" in x]
    held_out = {x["step"]: x[f"eval/{ACCURACY}"] for x in every if f"eval/{ACCURACY}" in x}
    rate = [line["tokens_per_second"] / line["tokens"] * GLOBAL for line in lines]
    return result(rate, lines, held_out)


def trl(run: Side) -> dict[str, Any]:
    """Run TRL's DPOTrainer here."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    def read(file: str) -> Any:  # noqa: ANN401
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        return Dataset.from_list([json.loads(line) for line in lines])

    tokenizer = AutoTokenizer.from_pretrained(run.model)
    tokenizer.chat_template = TEMPLATE
    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: object, **__: object) -> None:
            times.append(-time.perf_counter())

        def on_step_end(self, *_: object, **__: object) -> None:
            times[-1] += time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(run.model, dtype="float32"),
            processing_class=tokenizer,
            train_dataset=read(run.data),
            eval_dataset=None if run.held is None else read(run.held),
            peft_config=lora_config(),
            args=DPOConfig(
                output_dir=folder, per_device_train_batch_size=MICRO,
                gradient_accumulation_steps=GLOBAL // MICRO, max_steps=run.steps,
                per_device_eval_batch_size=MICRO, eval_steps=EVERY,
                eval_strategy="no" if run.held is None else "steps",
                train_sampling_strategy="sequential", learning_rate=LR,
                lr_scheduler_type="constant", weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95,
                adam_epsilon=1e-8, max_grad_norm=1.0, loss_type="sigmoid", beta=BETA,
                max_length=LENGTH, logging_steps=1, save_strategy="no", use_cpu=not run.on_gpu,
                bf16=False, gradient_checkpointing=False, report_to="none", seed=run.seed,
                dataloader_num_workers=0,
            ),
            callbacks=[Clock()],
        )  # fmt: skip
        load_adapter(trainer.model, run.adapter)
        trainer.train()
    logs = [x for x in trainer.state.log_history if ACCURACY in x]
    held_out = {
        x["step"]: x[f"eval_{ACCURACY}"]
        for x in trainer.state.log_history
        if f"eval_{ACCURACY}" in x
    }
    return result([GLOBAL / seconds for seconds in times], logs, held_out)


def result(
    rate: list[float], steps: list[dict[str, Any]], held_out: dict[int, float]
) -> dict[str, Any]:
    """Return what a side reports.

    Args:
        rate: Pairs a second of each step.
        steps: What it logged of each step.
        held_out: Accuracies on the pairs that are held out, by step.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    steady = rate[2:] or rate
    accuracies = [step[ACCURACY] for step in steps]
    return {
        "pairs_per_second": round(statistics.median(steady), 3),
        "peak_gib": round(peak, 3),
        "last_ten": statistics.fmean(accuracies[-10:]),
        "loss": steps[-1]["loss"],
        "accuracies": accuracies,
        "losses": [step["loss"] for step in steps],
        "held_out": held_out,
    }


def write_inputs(model: str, folder: Path, steps: int, seed: int) -> dict[str, str]:
    """Write what both sides of a seed read; return the names of the files."""
    files = {"data": folder / f"pairs{seed}.jsonl", "held": folder / "held.jsonl"}
    rows = {"data": pairs(GLOBAL * steps, seed), "held": pairs(HELD, 0)}
    for name, file in files.items():
        file.write_text("".join(json.dumps(r) + "\n" for r in rows[name]), encoding="utf-8")
    write_adapter(model, folder / f"adapter{seed}", seed)
    return {name: str(f) for name, f in files.items()} | {"adapter": str(folder / f"adapter{seed}")}


def main() -> None:
    """Measure both sides, in turns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=30)
    add_arguments(parser)
    options = parser.parse_args()
    if (alone := asked(options)) is not None:
        print(json.dumps({"ours": ours, "trl": trl}[alone.side](alone)))
        return
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = write_inputs(options.model, Path(folder), options.steps, 1) | {"held": None}
        for side in ("ours", "trl"):
            run = Side(side=side, model=options.model, steps=options.steps, seed=1, **files)
            found[side] = run_side(__file__, run)
            series = ("accuracies", "losses", "held_out")
            brief = {k: v for k, v in found[side].items() if k not in series}
            print(f"{side}: {brief}", flush=True)
    ratio = found["ours"]["pairs_per_second"] / found["trl"]["pairs_per_second"]
    print(json.dumps({"ratio": round(ratio, 3), **found}))


if __name__ == "__main__":
    main()
