"""Fine-tuning on the CPU: tokens a second of mcore and of TRL's SFTTrainer, packed, in one run.

Full and LoRA fine-tuning of the model in MCORE_SMOLLM2 (SmolLM2-135M) on the same plain texts, with
the same row length, rows a step, threads, number type and optimizer (AdamW). Both pack by best fit
decreasing and no one recomputes layers. TRL runs attention over whole rows here, since only flash
attention keeps its packed samples apart; mcore always does. Each run is a process of its own, in
turns; the first steps are left out, and the median step of each turn counts.

Bound: 1.2 for both. The last line is one JSON document.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

BOUND = 1.2
WARM = 2


def main() -> None:
    """Measure; exit 1 where the bound is not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=1024, help="of a packed row")
    parser.add_argument("--rows", type=int, default=2, help="packed rows of one step")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--kinds", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--trl", help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = os.environ.get("MCORE_SMOLLM2")
    if not model:
        sys.exit("MCORE_SMOLLM2 names no folder with SmolLM2-135M in it")
    if options.trl:
        print(json.dumps(run_trl(model, Path(options.trl), options)))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        data = write_texts(Path(folder) / "texts.jsonl")
        os.environ |= {"HF_DATASETS_CACHE": f"{folder}/hf", "MCORE_CACHE": f"{folder}/mcore"}
        for kind in options.kinds:
            found: dict[str, list[float]] = {"mcore": [], "trl": []}
            for turn in range(options.turns):
                save = Path(folder) / f"{kind}-{turn}"
                found["mcore"].append(run_mcore(model, data, save, kind, options))
                found["trl"].append(start_trl(data, kind, options))
            speed = {name: statistics.median(turns) for name, turns in found.items()}
            results[kind] = {**speed, "ratio": speed["mcore"] / speed["trl"], "turns": found}
            print(
                f"{kind:5} mcore {speed['mcore']:8.1f} tokens/s  trl {speed['trl']:8.1f} tokens/s  "
                f"ratio {results[kind]['ratio']:.2f}",
                flush=True,
            )
    kept = all(found["ratio"] >= BOUND for found in results.values())
    print(f"bound {BOUND}: {'kept' if kept else 'NOT KEPT'}")
    facts = {k: getattr(options, k) for k in ("length", "rows", "threads", "dtype")}
    print(json.dumps({**facts, "results": results, "kept": kept}))
    sys.exit(not kept)


def write_texts(file: Path) -> Path:
    """Write texts of 200 to 3,000 characters from the standard library's sources."""
    size = 200
    with file.open("w", encoding="utf-8") as out:
        for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            text, at = source.read_text(encoding="utf-8", errors="replace"), 0
            while at < len(text) and out.tell() < 2_000_000:
                piece = text[at : at + size].strip()
                at, size = at + size, 200 + (size * 7 + 13) % 2800
                if piece:
                    out.write(json.dumps({"text": piece}) + "\n")
    return file


def environment(options: argparse.Namespace) -> dict[str, str]:
    """Return the variables of a run."""
    threads = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return {**os.environ, **threads, "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}


def packed(model: str, data: Path, save: Path, length: int) -> dict[str, Any]:
    """Return the options of `mcore run` on packed rows, one at a time."""
    return {
        "plugin": "sft",
        "model": model,
        "dataset": data,
        "save": save,
        "add_version": "false",
        "packing": "true",
        "packing_length": length,
        "max_length": length,
        "truncation_strategy": "right",
        "micro_batch_size": 1,
        "recompute_granularity": "none",
        "load_from_cache_file": "true",
    }


def run_mcore(model: str, data: Path, save: Path, kind: str, options: argparse.Namespace) -> float:
    """Return tokens a second of `mcore run`."""
    values = packed(model, data, save, options.length) | {
        "global_batch_size": options.rows,
        "train_iters": options.steps + WARM,
        "torch_dtype": options.dtype,
        "tuner_type": kind,
        "lr": 1e-5,
        "save_safetensors": "false",
        "no_save_optim": "true",
    }
    if kind == "lora":
        values |= {"lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0}
    flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "mcore_core.cli.main", "run", *flags]
    done = subprocess.run(command, env=environment(options), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"mcore run failed:\n{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line][WARM:]
    return statistics.median(line["tokens"] / line["seconds"] for line in steps)


def start_trl(data: Path, kind: str, options: argparse.Namespace) -> float:
    """Return tokens a second of TRL, run in a process of its own."""
    flags = [
        f"--{k}={getattr(options, k)}" for k in ("length", "rows", "steps", "threads", "dtype")
    ]
    command = [sys.executable, __file__, "--trl", str(data), "--kinds", kind, *flags]
    done = subprocess.run(command, env=environment(options), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"TRL failed:\n{done.stderr[-3000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def run_trl(model: str, data: Path, options: argparse.Namespace) -> float:
    """Train with SFTTrainer; return tokens a second of the median step."""
    import datasets
    import torch
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(options.threads)
    datasets.disable_progress_bars()
    seen: list[tuple[float, int]] = []
    tokens = 0

    class Counting(SFTTrainer):  # type: ignore[misc]
        """Counts the tokens of each micro-batch."""

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            nonlocal tokens
            mask = inputs.get("attention_mask")
            tokens += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
            return super().training_step(model, inputs, *args, **kwargs)

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Times each optimizer step."""

        def on_step_begin(self, *_: object, **__: object) -> None:
            nonlocal tokens
            tokens = 0
            self.begin = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            seen.append((time.perf_counter() - self.begin, tokens))

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            packing=True,
            max_length=options.length,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=options.rows,
            max_steps=options.steps + WARM,
            learning_rate=1e-5,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_num_workers=0,
            model_init_kwargs={"dtype": options.dtype, "attn_implementation": "sdpa"},
        )
        lora = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
        trainer = Counting(
            model=model,
            args=config,
            train_dataset=datasets.load_dataset("json", data_files=str(data), split="train"),
            peft_config=lora if options.kinds == ["lora"] else None,
            callbacks=[Clock()],
        )
        trainer.train()
    return statistics.median(count / seconds for seconds, count in seen[WARM:])


if __name__ == "__main__":
    main()
