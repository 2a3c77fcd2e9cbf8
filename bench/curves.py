"""Curves of GRPO and DPO against TRL's trainers, several seeds of each, on the CPU or one GPU.

    python bench/curves.py --task grpo --model FOLDER --platform cuda --seeds 3 \
        --out tests/data/grpo_curves.json --plot docs/images/grpo.png
    python bench/curves.py --task dpo --model FOLDER --platform cuda --seeds 3 \
        --out tests/data/dpo_curves.json --plot docs/images/dpo.png

Settings and data are those of grpo_cpu.py and dpo_cpu.py, whose processes this starts: float32,
LoRA; a seed is the order of the rows, the adapter that both sides start from, and what is sampled
from. With `--platform cuda` all processes run at once on one GPU. GRPO's curve is the mean reward
of each step; DPO's are rewards/accuracies on held-out pairs every few steps, and those of the
batches that train. `--out` gets every number; `--plot` draws an earlier `--out` again with
`--seeds 0`.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import dpo_cpu
import grpo_cpu
from aside import Side, finish_side, start_side

TASKS: dict[str, ModuleType] = {"grpo": grpo_cpu, "dpo": dpo_cpu}
STEPS = {"grpo": 40, "dpo": 30}
SIDES = ("ours", "trl")
LABELS = {"ours": "mcore", "trl": "TRL"}
COLORS = {"ours": "tab:blue", "trl": "tab:orange"}
SMOOTH = 5


def last_ten(task: str, run: dict[str, Any]) -> float:
    """Return the mean of a curve over its last ten steps."""
    if task == "grpo":
        return statistics.fmean(run["rewards"][-10:])
    held = {int(step): value for step, value in run["held_out"].items()}
    return statistics.fmean(value for step, value in held.items() if step > max(held) - 10)


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Run both sides of all seeds, `--jobs` at a time."""
    module = TASKS[options.task]
    waiting: list[Side] = []
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, options.seeds + 1):
            files = module.write_inputs(options.model, Path(folder), options.steps, seed)
            common = {"model": options.model, "steps": options.steps, "seed": seed, **files}
            waiting += [Side(side=side, platform=options.platform, **common) for side in SIDES]
        jobs = options.jobs or (len(waiting) if options.platform == "cuda" else 1)
        threads = max(1, (os.cpu_count() or 1) // jobs)
        while waiting:
            now, waiting = waiting[:jobs], waiting[jobs:]
            started = [(side, start_side(str(module.__file__), side, threads)) for side in now]
            for side, process in started:
                run = finish_side(process, f"{side.side}, seed {side.seed}")
                found[side.side].append({"seed": side.seed, **run})
                mean = last_ten(options.task, run)
                print(f"{side.side} seed {side.seed}: last ten {mean:.4f}", flush=True)
    return found


def summary(task: str, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the means over the last ten steps, and whether ours lies among TRL's."""
    means = {side: [last_ten(task, run) for run in runs] for side, runs in found.items()}
    mine, theirs = statistics.fmean(means["ours"]), means["trl"]
    return {
        "last_ten": means,
        "ours_mean": mine,
        "trl_range": [min(theirs), max(theirs)],
        "inside": min(theirs) <= mine <= max(theirs),
    }


def machine(platform: str) -> str:
    """Return what it ran on."""
    import torch

    cores = f"{os.cpu_count()} cores"
    name = torch.cuda.get_device_name() if platform == "cuda" else cores
    return f"{name}, torch {torch.__version__}"


def panels(task: str, run: dict[str, Any]) -> list[tuple[str, list[int], list[float]]]:
    """Return title, steps and values of each curve of a run."""
    if task == "grpo":
        rewards = run["rewards"]
        smooth = [
            statistics.fmean(rewards[max(0, i - SMOOTH + 1) : i + 1]) for i in range(len(rewards))
        ]
        return [(f"reward, mean over {SMOOTH} steps", list(range(1, len(smooth) + 1)), smooth)]
    held, train = run["held_out"], run["accuracies"]
    return [
        ("rewards/accuracies, held out", [int(step) for step in held], list(held.values())),
        ("rewards/accuracies, training", list(range(1, len(train) + 1)), train),
    ]


def plot(task: str, found: dict[str, list[dict[str, Any]]], target: Path) -> None:
    """Draw the curves."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    count = len(panels(task, found["ours"][0]))
    figure, axes = plt.subplots(1, count, figsize=(1 + 5 * count, 3.6), squeeze=False)
    for side, runs in found.items():
        for number, run in enumerate(runs):
            label = LABELS[side] if number == 0 else None
            style = {"color": COLORS[side], "alpha": 0.8, "label": label}
            for axis, (title, steps, values) in zip(axes[0], panels(task, run), strict=True):
                axis.plot(steps, values, linestyle="-" if side == "ours" else "--", **style)
                axis.set_xlabel("optimizer step")
                axis.set_ylabel(title)
    axes[0][0].legend()
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=100)


def main() -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--model", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--platform", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seeds", type=int, default=3, help="0: read --out")
    parser.add_argument("--steps", type=int, help="default: 40 of grpo, 30 of dpo")
    parser.add_argument("--jobs", type=int, help="processes at a time; default: cuda all, cpu 1")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    options.steps = options.steps or STEPS[options.task]
    if options.seeds:
        if options.model is None:
            parser.error("--model FOLDER is needed")
        found = measure(options)
        about = {"task": options.task, "steps": options.steps, "machine": machine(options.platform)}
        document = {**about, **summary(options.task, found), **found}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    document = json.loads(options.out.read_text(encoding="utf-8"))
    if options.plot:
        plot(options.task, {side: document[side] for side in SIDES}, options.plot)
    print(json.dumps({k: v for k, v in document.items() if k not in SIDES}))


if __name__ == "__main__":
    main()
