"""GRPO on the CPU: samples a second of the whole loop against TRL's GRPOTrainer.

    python bench/grpo_cpu.py --model FOLDER [--steps 12]

Both sides run in processes of their own, on the same prompts in the same order, from the same
adapter, with the same settings: LoRA, a task of reasoning-gym and its own score as the reward, TRL
with transformers' generation. A step takes from one call of the reward to the next, so that
everything counts: prompts, generation, rewards, training. Rates are the median over all steps but
the first two. The last line is one JSON document. Curves of several seeds, also on a GPU, are
drawn by bench/curves.py, which starts the same processes.
"""

import argparse
import json
import os
import random
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

from aside import Side, add_arguments, asked, run_side
from start_adapter import load_adapter, lora_config, write_adapter

PROMPTS, GENERATIONS, TOKENS, LR = 4, 8, 16, 2e-4
BATCH = PROMPTS * GENERATIONS
TASK = "chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1&seed=1&instruction=null"
SYSTEM = "You are a calculator."
NUMBER = re.compile(r"-?\d+")
TIMES = "GRPO_CPU_TIMES"


def tasks(steps: int, seed: int) -> list[dict[str, Any]]:
    """Return the rows of some steps, the prompt as messages, in the order of a seed."""
    from mcore_rewards.gym import rows

    found = []
    count = PROMPTS * steps
    for row in rows(f"{TASK}&size={count}"):
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": row["prompt"]},
        ]
        found.append({**row, "prompt": messages})
    random.Random(seed).shuffle(found)
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


def ours(run: Side) -> list[float]:
    """Run `mcore run --plugin grpo` here; return the rewards of its steps."""
    from mcore_core.cli.main import main as mcore

    with tempfile.TemporaryDirectory() as folder:
        code = mcore(
            [
                "run", "--plugin", "grpo", "--model", run.model, "--dataset", run.data,
                "--dataset_shuffle", "false", "--train_dataloader_shuffle", "false",
                "--reward_funcs", f"{__file__}:score", "--beta", "0", "--tuner_type", "lora",
                "--adapters", run.adapter, "--lora_dropout", "0",
                "--lr", str(LR), "--lr_decay_style", "constant", "--weight_decay", "0.1",
                "--adam_beta1", "0.9", "--adam_beta2", "0.95", "--adam_eps", "1e-8",
                "--clip_grad", "1",
                "--num_generations", str(GENERATIONS), "--max_completion_length", str(TOKENS),
                "--temperature", "1", "--top_k", "0", "--top_p", "1",
                "--micro_batch_size", str(BATCH), "--global_batch_size", str(BATCH),
                "--train_iters", str(run.steps), "--log_interval", "1", "--seed", str(run.seed),
                "--torch_dtype", "float32", "--transformer_impl", "local", "--no_save_optim",
                "--merge_lora", "false", "--save", folder, "--add_version", "false",
            ]
        )  # fmt: skip
        assert code == 0
        text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    return [x["reward"] for x in map(json.loads, text.splitlines()) if "reward" in x]


def trl(run: Side) -> list[float]:
    """Run TRL's GRPOTrainer here; return the rewards of its steps."""
    from datasets import Dataset
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

    rows = [json.loads(line) for line in Path(run.data).read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(run.model, dtype="float32"),
            processing_class=AutoTokenizer.from_pretrained(run.model),
            reward_funcs=reward,
            train_dataset=Dataset.from_list(rows),
            peft_config=lora_config(),
            args=GRPOConfig(
                output_dir=folder, per_device_train_batch_size=BATCH, max_steps=run.steps,
                num_generations=GENERATIONS, max_completion_length=TOKENS, temperature=1.0,
                top_k=0, top_p=1.0, shuffle_dataset=False, mask_truncated_completions=False,
                loss_type="grpo", scale_rewards="group", epsilon=0.2, num_iterations=1, beta=0.0,
                learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.1, adam_beta1=0.9,
                adam_beta2=0.95, adam_epsilon=1e-8, max_grad_norm=1.0, logging_steps=1,
                save_strategy="no", use_cpu=not run.on_gpu, bf16=False,
                gradient_checkpointing=False, report_to="none", seed=run.seed,
            ),
        )  # fmt: skip
        load_adapter(trainer.model, run.adapter)
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


def side(run: Side) -> dict[str, Any]:
    """Run one side here."""
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as file:
        os.environ[TIMES] = file.name
        rewards = {"ours": ours, "trl": trl}[run.side](run)
        return report(rewards, [float(line) for line in file])


def write_inputs(model: str, folder: Path, steps: int, seed: int) -> dict[str, str]:
    """Write what both sides of a seed read; return the names of the files."""
    data, adapter = folder / f"tasks{seed}.jsonl", folder / f"adapter{seed}"
    data.write_text("".join(json.dumps(r) + "\n" for r in tasks(steps, seed)), encoding="utf-8")
    write_adapter(model, adapter, seed)
    return {"data": str(data), "adapter": str(adapter)}


def main() -> None:
    """Measure both sides, in turns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--sides", nargs="+", choices=["ours", "trl"], default=["ours", "trl"])
    parser.add_argument("--limit", type=float, help="exit 1 below this ratio")
    add_arguments(parser)
    options = parser.parse_args()
    if (alone := asked(options)) is not None:
        print(json.dumps(side(alone)))
        return
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = write_inputs(options.model, Path(folder), options.steps, 1)
        for name in options.sides:
            run = Side(side=name, model=options.model, steps=options.steps, seed=1, **files)
            found[name] = run_side(__file__, run)
            brief = {k: v for k, v in found[name].items() if k != "rewards"}
            print(f"{name}: {brief}", flush=True)
    ratio = None
    if len(found) == 2:
        mine, theirs = (found[n]["samples_per_second"] for n in ("ours", "trl"))
        ratio = round(mine / theirs, 3)
    print(json.dumps({"ratio": ratio, **found}))
    if options.limit is not None and ratio is not None and ratio < options.limit:
        sys.exit(1)


if __name__ == "__main__":
    main()
