"""The quickstart: make a model and a task, train, and measure what was learned.

Each training stage is one `mcore` command, printed before it runs, so that it can be typed as well.
It starts from the model of the stage before, and what it wrote is measured with plain transformers.
Everything is written to runs/quickstart: data, model, and one run folder for each stage.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from evaluate import Answer, accuracy, evaluate
from make_model import make_model
from task import make_data
from transformers.utils import logging

SHOWN = 3
REWARD = os.path.relpath(Path(__file__).parent / "task.py") + ":exact_match"


@dataclass(frozen=True, slots=True)
class Stage:
    """One `mcore run`: from the model before it to the checkpoint of its last step."""

    name: str
    steps: int
    options: str

    def command(self, folder: Path, start: Path, seed: int) -> list[str]:
        """Return the command line."""
        return [
            *("mcore", "run", "--plugin", self.name),
            *("--model", str(start), "--dataset", str(folder / "data" / "train.jsonl")),
            *("--save", str(folder / self.name), "--add_version", "false"),
            *("--train_iters", str(self.steps), "--seed", str(seed), *self.options.split()),
        ]

    def model(self, folder: Path) -> Path:
        """Return the folder of the trained model."""
        return folder / self.name / f"checkpoint-{self.steps}"


STAGES = (
    Stage(
        "sft",
        steps=800,
        options="--micro_batch_size 64 --global_batch_size 64 --lr 5e-3 --lr_warmup_iters 40 "
        "--recompute_granularity none --log_interval 100",
    ),
    Stage(
        "grpo",
        steps=160,
        options=f"--reward_funcs {REWARD} --beta 0 --scale_rewards none --num_generations 16 "
        "--micro_batch_size 256 --global_batch_size 512 --max_completion_length 24 "
        "--temperature 1 --top_k 0 --top_p 1 --lr 5e-4 "
        "--lr_warmup_iters 5 --recompute_granularity none --log_interval 20",
    ),
)


def run(command: list[str]) -> None:
    """Print a command and run it with the mcore beside this Python."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    program = Path(sys.executable).parent / command[0]
    done = subprocess.run([str(program), *command[1:]], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def measure(name: str, model: Path, folder: Path) -> list[Answer]:
    """Print and return how a model does on the held-out problems."""
    answers = evaluate(model, folder / "data" / "held_out.jsonl")
    print(f"{name}: {accuracy(answers):.1%} of {len(answers)} held-out problems are solved exactly")
    return answers


def show(results: dict[str, list[Answer]]) -> None:
    """Print the first problems, and one that is still wrong, with what each model replied."""
    width = max(map(len, (*results, "answer")))
    rows = list(zip(*results.values(), strict=True))
    still_wrong = [row for row in rows[SHOWN:] if not row[-1].correct]
    print()
    for replies in (*rows[:SHOWN], *still_wrong[:1]):
        print(replies[0].question)
        print(f"  {'answer':{width}}  {replies[0].answer}")
        for name, reply in zip(results, replies, strict=True):
            mark = "right" if reply.correct else "wrong"
            print(f"  {name:{width}}  {_short(reply.reply)}  ({mark})")


def _short(reply: str) -> str:
    text = " ".join(reply.split()) or "(blank)"
    return text if len(text) <= 40 else text[:37] + "..."


def main(folder: Path, seed: int) -> None:
    """Run every stage."""
    logging.disable_progress_bar()
    begin = time.monotonic()
    for stage in STAGES:
        shutil.rmtree(folder / stage.name, ignore_errors=True)
    make_data(folder / "data", train=20_000, held_out=500, seed=seed)
    size = make_model(folder / "model", seed=seed)
    print(f"model  {folder / 'model'}: qwen3, {size:,} parameters, random weights")
    print(f"data   {folder / 'data'}: 20,000 problems to train on, 500 held out")
    results = {"before": measure("before", folder / "model", folder)}
    start = folder / "model"
    for stage in STAGES:
        run(stage.command(folder, start, seed))
        start = stage.model(folder)
        results[stage.name] = measure(stage.name, start, folder)
    show(results)
    scores = " ".join(f"{name} {accuracy(answers):.1%}" for name, answers in results.items())
    print(f"\ntook {time.monotonic() - begin:.0f} s; the reports: {folder}/*/report.html")
    print(f"quickstart: {scores} (held-out exact match)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(options.folder, options.seed)
