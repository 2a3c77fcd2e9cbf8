"""Saving: how long a checkpoint holds up training, in optimizer steps, on the CPU.

Full fine-tuning of the model in MCORE_SMOLLM2 (SmolLM2-135M) in float32, saved with everything (HF
files, weights, Adam's state): in the step's place, and with `--async_save`; and LoRA, whose saves
write the merged model too. A step is one packed row of `--length` tokens, which is little: larger
steps make a save cost fewer of them. What a save costs is all time of the steps until the next save
beyond their median, background writing included.

Bound: 10 steps for each. The last line is one JSON document.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from ours import run
from sft_cpu import packed, write_texts

BOUND = 10
WARM = 2
KINDS: dict[str, dict[str, Any]] = {
    "full": {"tuner_type": "full"},
    "full, async": {"tuner_type": "full", "async_save": "true"},
    "lora": {"tuner_type": "lora", "lora_rank": 8},
}


def main() -> None:
    """Measure; exit 1 where the bound is not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a step")
    parser.add_argument("--every", type=int, default=4, help="steps from one save to the next")
    parser.add_argument("--saves", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    model = os.environ.get("MCORE_SMOLLM2")
    if not model:
        sys.exit("MCORE_SMOLLM2 names no folder with SmolLM2-135M in it")
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {"HF_DATASETS_CACHE": f"{folder}/hf", "MCORE_CACHE": f"{folder}/mcore"}
        data = write_texts(folder / "texts.jsonl")
        for kind in options.kinds:
            results[kind] = measure(model, data, folder / "run", KINDS[kind], options)
            shutil.rmtree(folder / "run")
            found = results[kind]
            print(
                f"{kind:12} step {found['step']:5.2f} s  save {found['save']:5.2f} s, "
                f"{found['steps']:.1f} steps  {found['mib']:,.0f} MiB",
                flush=True,
            )
    kept = all(found["steps"] <= BOUND for found in results.values())
    print(f"bound {BOUND} steps: {'kept' if kept else 'NOT KEPT'}")
    print(json.dumps({"length": options.length, "results": results, "kept": kept}))
    sys.exit(not kept)


def measure(
    model: str, data: Path, save: Path, kind: dict[str, Any], options: argparse.Namespace
) -> dict[str, float]:
    """Return the seconds of a step and of a save, the save in steps, and the size of one."""
    values = packed(model, data, save, options.length) | {
        "global_batch_size": 1,
        "train_iters": WARM + options.every * (1 + options.saves),
        "save_interval": options.every,
        "torch_dtype": "float32",
        "num_workers": 0,
        **kind,
    }
    flags = [text for name, value in values.items() for text in (f"--{name}", value)]
    watch, _ = run(flags, saves=True)
    # seconds[i] ends with step i + 2: a save after step n is part of the time of step n + 1
    first = options.every - 1
    spans = [
        watch.seconds[first + i * options.every :][: options.every] for i in range(options.saves)
    ]
    step = statistics.median(watch.seconds[WARM - 1 : first])
    cost = statistics.mean(sum(span) - len(span) * step for span in spans)
    folder = save / f"checkpoint-{options.every}"
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {"step": step, "save": cost, "steps": cost / step, "mib": size / 2**20}


if __name__ == "__main__":
    main()
