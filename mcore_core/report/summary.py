"""The facts of a run in a few labelled lines, for the console's start and end and for the report.

`RunContext.data` is read by these keys, all optional: "train" and "eval", each a mapping with
"rows", "pieces", "packs", "tokens" and "dropped" (reason -> rows). Without "train" the keys are
looked up in `data` itself.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mcore_core.config.train import TrainConfig
from mcore_core.context import RunContext
from mcore_core.report.format import count, duration, short_count
from mcore_core.report.record import ModelFacts, RunRecord

type Lines = list[tuple[str, str]]
"""Label and text; an empty label continues the one above."""


def start_lines(run: RunContext, model: ModelFacts | None, begun_at: int | None = None) -> Lines:
    """Return what a user checks before waiting: model, data, batch, layout, output.

    `begun_at` is the number of steps done at the start; `run.step` while that is still so.
    """
    lines: Lines = []
    if model:
        lines.append(("model", model_text(model)))
        if model.precision:
            lines.append(("precision", model.precision))
    lines += data_lines(run.data)
    lines.append(("batch", batch_text(run)))
    lines.append(("steps", steps_text(run, run.step if begun_at is None else begun_at)))
    ranks = f"{run.world_size} rank" + ("s" if run.world_size > 1 else "")
    layout = "" if run.world_size == 1 else f": {run.layout}"
    device = run.environment.get("device", "")
    lines.append(("layout", ranks + layout + (f", {device}" if device else "")))
    lines.append(("output", str(run.output_dir)))
    return lines


def model_text(model: ModelFacts) -> str:
    """Return `NAME (qwen3), 135M parameters, 4.88M trainable (3.6%)`."""
    parts = [f"{model.name} ({model.family})" if model.family else model.name]
    if model.parameters:
        parts.append(f"{short_count(model.parameters)} parameters")
        if model.trainable is not None and model.trainable != model.parameters:
            share = 100 * model.trainable / model.parameters
            parts.append(f"{short_count(model.trainable)} trainable ({share:.2g}%)")
    return ", ".join(parts)


def data_lines(data: Mapping[str, Any]) -> Lines:
    """Return a line for each part of the data, and one for each part that lost rows."""
    parts = {k: data[k] for k in ("train", "eval") if isinstance(data.get(k), Mapping)}
    if not parts:
        parts = {"train": data}
    lines: Lines = []
    for name, part in parts.items():
        amounts = [
            f"{count(part[unit])} {unit}"
            for unit in ("rows", "pieces", "packs", "tokens")
            if unit in part
        ]
        if amounts:
            lines.append(("data" if name == "train" else "eval data", ", ".join(amounts)))
        if dropped := part.get("dropped"):
            reasons = ", ".join(f"{count(n)} {reason}" for reason, n in dropped.items())
            total = sum(dropped.values())
            rows = f"{count(total)} row{'' if total == 1 else 's'}"
            lines.append(("", f"dropped {rows}: {reasons}"))
    return lines


def batch_text(run: RunContext) -> str:
    """Return the arithmetic of the global batch."""
    train, dp = run.config[TrainConfig], run.layout.dp
    times = train.global_batch_size // (train.micro_batch_size * dp)
    return (
        f"{train.global_batch_size} = {train.micro_batch_size} a micro-batch"
        f" x {dp} data-parallel x {times} accumulated"
    )


def steps_text(run: RunContext, begun_at: int) -> str:
    """Return `200 (3.2 epochs)`, and where a resumed run begins."""
    text = count(run.train_iters)
    if run.steps_per_epoch:
        epochs = run.train_iters / run.steps_per_epoch
        text += f" ({epochs:.3g} epoch{'' if epochs == 1 else 's'})"
    return text + (f", resumed after step {count(begun_at)}" if begun_at else "")


def outcome(run: RunContext, record: RunRecord) -> str:
    """Return the headline of the end: done, stopped or failed, and after how much."""
    steps = f"step {count(record.step)} of {count(run.train_iters)}"
    time = duration(record.seconds)
    if record.failure:
        return f"failed at {steps} after {time}"
    if record.step < run.train_iters:
        return f"stopped at {steps} after {time}"
    return f"done: {count(record.step)} steps in {time}, {short_count(record.tokens)} tokens"


def end_lines(run: RunContext, record: RunRecord, files: Mapping[str, str]) -> Lines:
    """Return where everything is and what to type next. `files` says where reports are."""
    lines: Lines = []
    saved = [c.path for c in record.checkpoints if c.path.exists()]
    if saved:
        lines.append(("checkpoint", str(saved[-1])))
    lines += files.items()
    finished = record.failure is None and record.step >= run.train_iters
    if not finished:
        if saved or record.first_step:
            command = f"mcore run {run.output_dir / 'run.yaml'} --load {run.output_dir}"
            lines.append(("continue", command))
        return lines
    if saved:
        lines += _use(saved[-1], record.model)
    return lines


def _use(path: Path, model: ModelFacts | None) -> Lines:
    merged = path.with_name(path.name + "-merged")
    if (merged / "config.json").exists():
        path = merged
    if (path / "config.json").exists() and any(path.glob("*.safetensors")):
        return [
            ("model", f"{path} (Hugging Face safetensors)"),
            ("load it", f'{_opener(path)}("{path}")'),
            ("serve it", f"vllm serve {path}"),
        ]
    if (path / "adapter_config.json").exists():
        base = model.name if model else "BASE"
        return [
            ("adapter", f"{path} (PEFT)"),
            ("load it", f'PeftModel.from_pretrained(model, "{path}")'),
            ("serve it", f"vllm serve {base} --enable-lora --lora-modules tuned={path}"),
        ]
    return []


def _opener(path: Path) -> str:
    """Return what opens a folder in Python, as its files say."""
    if (path / "modules.json").exists():
        return "SentenceTransformer"
    with suppress(OSError, ValueError):
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        name = str((config.get("architectures") or [""])[0])
        if name.endswith("ForSequenceClassification"):
            return "AutoModelForSequenceClassification.from_pretrained"
    return "AutoModelForCausalLM.from_pretrained"
