"""GRPO on the CPU: samples a second of the whole loop against TRL's GRPOTrainer, and curves.

    python bench/grpo_cpu.py --model FOLDER [--steps 12] [--seeds 1] [--plot FILE.png]

Both sides run in processes of their own, on the same prompts with the same settings: LoRA, a task
of reasoning-gym and its own score as the reward, TRL with transformers' generation. A step takes
from one call of the reward to the next, so that everything counts: prompts, generation, rewards,
training. Rates are the median over all steps but the first two. The last line is one JSON document;
with `--seeds 3` it holds a curve of rewards for each seed of either side, which `--plot` draws.
"""

import argparse
import json
import os
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from aside import run_side

PROMPTS, GENERATIONS, TOKENS, LR = 4, 8, 16, 2e-4
BATCH = PROMPTS * GENERATIONS
TASK = "chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1&seed=1&instruction=null"
SYSTEM = "You are a calculator."
NUMBER = re.compile(r"-?\d+")
TIMES = "GRPO_CPU_TIMES"
COLORS = {"ours": "tab:blue", "trl": "tab:orange"}


def tasks(count: int) -> list[dict[str, Any]]:
    """Return rows of the task, the prompt as messages."""
    from mcore_rewards.gym import rows

    found = []
    for row in rows(f"{TASK}&size={count}"):
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": row["prompt"]},
        ]
        found.append({**row, "prompt": messages})
    return found


def score(rollouts: Sequence[Any], /) -> list[float | None]:
    """Return the task's score of the last number in the text; note the time."""
    from mcore_rewards.gym import score as scores

    with Path(os.environ[TIMES]).open("a", encoding="utf-8") as file:
        file.write(f"{time.perf_counter()}\n")
    said = (NUMBER.findall(rollout.text) for rollout in rollouts)
    answers = [
        SimpleNamespace(text=numbers[-1] if numbers else "", row=rollout.row)
        for numbers, rollout in zip(said, rollouts, strict=True)
    ]
    return scores(answers)  # type: ignore[arg-type]


def ours(model: str, data: str, steps: int, seed: int) -> list[float]:
    """Run `mcore run --plugin grpo` here; return the rewards of its steps."""
    from mcore_core.cli.main import main as mcore

    with tempfile.TemporaryDirectory() as folder:
        code = mcore(
            [
                "run", "--plugin", "grpo", "--model", model, "--dataset", data,
                "--reward_funcs", f"{__file__}:score", "--beta", "0", "--tuner_type", "lora",
                "--lora_dropout", "0", "--lr", str(LR), "--lr_decay_style", "constant",
                "--num_generations", str(GENERATIONS), "--max_completion_length", str(TOKENS),
                "--temperature", "1", "--top_k", "0", "--top_p", "1",
                "--micro_batch_size", str(BATCH), "--global_batch_size", str(BATCH),
                "--train_iters", str(steps), "--log_interval", "1", "--seed", str(seed),
                "--data_seed", str(seed), "--torch_dtype", "float32", "--no_save_optim",
                "--merge_lora", "false", "--save", folder, "--add_version", "false",
            ]
        )  # fmt: skip
        assert code == 0
        text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    return [x["reward"] for x in map(json.loads, text.splitlines()) if "reward" in x]


def trl(model: str, data: str, steps: int, seed: int) -> list[float]:
    """Run TRL's GRPOTrainer here; return the rewards of its steps."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[Any], **columns: Any) -> list[float | None]:  # noqa: ANN401
        names = ("answer", "task", "task_options", "entry")
        return score(
            [
                SimpleNamespace(
                    text=completion[0]["content"], row={n: columns[n][i] for n in names}
                )
                for i, completion in enumerate(completions)
            ]
        )

    rows = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
            processing_class=AutoTokenizer.from_pretrained(model),
            reward_funcs=reward,
            train_dataset=Dataset.from_list(rows),
            peft_config=LoraConfig(
                r=8, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
            args=GRPOConfig(
                output_dir=folder, per_device_train_batch_size=BATCH, max_steps=steps,
                num_generations=GENERATIONS, max_completion_length=TOKENS, temperature=1.0,
                loss_type="grpo", beta=0.0, learning_rate=LR, lr_scheduler_type="constant",
                weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0, logging_steps=1,
                save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False,
                report_to="none", seed=seed,
            ),
        )  # fmt: skip
        trainer.train()
    return [x["reward"] for x in trainer.state.log_history if "reward" in x]


def report(rewards: list[float], times: list[float]) -> dict[str, Any]:
    """Return what a side has to say."""
    seconds = [b - a for a, b in pairwise(times)][1:]
    return {
        "samples_per_second": round(BATCH / statistics.median(seconds), 3) if seconds else None,
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "first_ten": statistics.fmean(rewards[:10]),
        "last_ten": statistics.fmean(rewards[-10:]),
        "rewards": rewards,
    }


def side(name: str, model: str, data: str, steps: int, seed: int) -> dict[str, Any]:
    """Run one side here."""
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as file:
        os.environ[TIMES] = file.name
        rewards = {"ours": ours, "trl": trl}[name](model, data, steps, seed)
        return report(rewards, [float(line) for line in file])


def plot(found: dict[str, list[dict[str, Any]]], target: Path) -> None:
    """Draw the curves, each a mean over five steps."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, runs in found.items():
        for i, run in enumerate(runs):
            r = run["rewards"]
            smooth = [statistics.fmean(r[max(0, j - 4) : j + 1]) for j in range(len(r))]
            label = {"ours": "mcore", "trl": "TRL"}[name] if i == 0 else None
            axes.plot(range(1, len(r) + 1), smooth, color=COLORS[name], alpha=0.8, label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("reward, mean over five steps")
    axes.legend()
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=100)


def main() -> None:
    """Measure both sides, in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sides", nargs="+", choices=["ours", "trl"], default=["ours", "trl"])
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--limit", type=float, help="exit 1 below this ratio")
    parser.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        alone = side(options.side, options.model, options.data, options.steps, options.seed)
        print(json.dumps(alone))
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.sides}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tasks.jsonl"
        rows = tasks(PROMPTS * options.steps)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for seed in range(1, options.seeds + 1):
            for name, runs in found.items():
                runs.append(
                    run_side(
                        __file__,
                        name,
                        model=options.model,
                        data=file,
                        steps=options.steps,
                        seed=seed,
                    )
                )
                brief = {k: v for k, v in runs[-1].items() if k != "rewards"}
                print(f"{name} seed {seed}: {brief}", flush=True)
    ratio = None
    if len(found) == 2:
        mine, theirs = (
            statistics.median(r["samples_per_second"] for r in found[n]) for n in ("ours", "trl")
        )
        ratio = round(mine / theirs, 3)
    if options.plot:
        plot(found, options.plot)
    print(json.dumps({"ratio": ratio, **found}))
    if options.limit is not None and ratio is not None and ratio < options.limit:
        sys.exit(1)


if __name__ == "__main__":
    main()
