"""DPO with LoRA on the CPU: pairs a second and peak memory against TRL's DPOTrainer, and curves.

    python bench/dpo_cpu.py --model FOLDER [--steps 30] [--seeds 1]

Both sides run in processes of their own, on the same pairs with the same settings. Rates are over
all steps but the first two. The last line is one JSON document; with `--seeds 3` it holds a curve
of rewards/accuracies for each seed of either side.
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

from aside import run_side

MICRO, GLOBAL, LENGTH, BETA, LR = 4, 8, 256, 0.1, 1e-4
THINGS = ("apples", "books", "coins", "doors", "eggs", "flags", "glasses", "hats")


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return pairs whose chosen answer is short and right, and the other one long and evasive."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b, what = rng.randint(1, 20), rng.randint(1, 20), rng.choice(THINGS)
        question = f"I have {a} {what} and get {b} more. How many {what} do I have?"
        good = f"You have {a + b} {what}."
        bad = f"That is hard to say, since {what} can be counted in many ways; maybe {a * b}."
        messages = [{"role": "user", "content": question}]
        rows.append(
            {
                "prompt": messages,
                "chosen": [{"role": "assistant", "content": good}],
                "rejected": [{"role": "assistant", "content": bad}],
            }
        )
    return rows


def ours(model: str, data: str, steps: int, seed: int) -> dict[str, Any]:
    """Run `mcore run --plugin dpo` here."""
    from mcore_core.cli.main import main as mcore

    with tempfile.TemporaryDirectory() as folder:
        code = mcore(
            [
                "run", "--plugin", "dpo", "--model", model, "--dataset", data,
                "--tuner_type", "lora", "--lr", str(LR), "--lr_decay_style", "constant",
                "--beta", str(BETA), "--micro_batch_size", str(MICRO),
                "--global_batch_size", str(GLOBAL), "--max_length", str(LENGTH),
                "--train_iters", str(steps), "--log_interval", "1", "--seed", str(seed),
                "--data_seed", str(seed), "--torch_dtype", "float32", "--no_save_optim",
                "--recompute_granularity", "none",
                "--merge_lora", "false", "--save", folder, "--add_version", "false",
            ]
        )  # fmt: skip
        assert code == 0
        text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [x for x in map(json.loads, text.splitlines()) if "loss" in x]
    rate = [line["tokens_per_second"] / line["tokens"] * GLOBAL for line in lines]
    return result(rate, [line["rewards/accuracies"] for line in lines], lines[-1]["loss"])


def trl(model: str, data: str, steps: int, seed: int) -> dict[str, Any]:
    """Run TRL's DPOTrainer here."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    rows = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()]
    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: object, **__: object) -> None:
            times.append(-time.perf_counter())

        def on_step_end(self, *_: object, **__: object) -> None:
            times[-1] += time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
            processing_class=AutoTokenizer.from_pretrained(model),
            train_dataset=Dataset.from_list(rows),
            peft_config=LoraConfig(
                r=8, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
            args=DPOConfig(
                output_dir=folder, per_device_train_batch_size=MICRO,
                gradient_accumulation_steps=GLOBAL // MICRO, max_steps=steps, learning_rate=LR,
                lr_scheduler_type="constant", weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0,
                beta=BETA, max_length=LENGTH, logging_steps=1, save_strategy="no", use_cpu=True,
                bf16=False, gradient_checkpointing=False, report_to="none", seed=seed,
                dataloader_num_workers=0,
            ),
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    logs = [x for x in trainer.state.log_history if "rewards/accuracies" in x]
    rate = [GLOBAL / seconds for seconds in times]
    return result(rate, [x["rewards/accuracies"] for x in logs], logs[-1]["loss"])


def result(rate: list[float], accuracies: list[float], loss: float) -> dict[str, Any]:
    """Return what a side reports."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    steady = rate[2:] or rate
    return {
        "pairs_per_second": round(statistics.median(steady), 3),
        "peak_gib": round(peak, 3),
        "accuracies": accuracies,
        "last_ten": statistics.fmean(accuracies[-10:]),
        "loss": loss,
    }


def main() -> None:
    """Measure both sides, in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--side", choices=["ours", "trl"])
    parser.add_argument("--data")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.side:
        run = {"ours": ours, "trl": trl}[options.side]
        print(json.dumps(run(options.model, options.data, options.steps, options.seed)))
        return
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.jsonl"
        rows = pairs(GLOBAL * options.steps)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for seed in range(1, options.seeds + 1):
            for side, runs in found.items():
                runs.append(
                    run_side(
                        __file__,
                        side,
                        model=options.model,
                        data=file,
                        steps=options.steps,
                        seed=seed,
                    )
                )
                brief = {k: v for k, v in runs[-1].items() if k != "accuracies"}
                print(f"{side} seed {seed}: {brief}", flush=True)
    mine, theirs = (statistics.median(r["pairs_per_second"] for r in found[side]) for side in found)
    print(json.dumps({"ratio": round(mine / theirs, 3), **found}))


if __name__ == "__main__":
    main()
