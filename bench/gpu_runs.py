"""The runs that bench/gpu_sft.py compares: models and data written once, then one run each."""

import argparse
import sys
from pathlib import Path
from typing import Any


def shape_of(options: argparse.Namespace, layers: int | None = None) -> dict[str, Any]:
    """Return the model's sizes."""
    from synthetic import QWEN3_06B, TINY

    shape = dict(TINY if options.tiny else QWEN3_06B)
    return shape | ({"num_hidden_layers": layers} if layers else {})


def command(
    options: argparse.Namespace,
    shape: dict[str, Any],
    impl: str,
    *,
    micro: int,
    **more: Any,  # noqa: ANN401
) -> list[Any]:
    """Return the arguments of a run, its model and data written where they are not there yet."""
    from synthetic import write_model, write_texts

    dtype = more.pop("dtype", "float32" if options.device == "cpu" else "bfloat16")
    sequence = more.pop("sequence", options.sequence)
    name = f"{dtype}-{shape['num_hidden_layers']}-{shape['hidden_size']}"
    model = write_model(options.work / name, shape, dtype=dtype)
    data = options.work / f"texts-{shape['vocab_size']}-{sequence}.jsonl"
    if not data.exists():
        write_texts(data, rows=160, tokens=sequence, vocabulary=shape["vocab_size"])
    values = {
        "plugin": "sft",
        "model": model,
        "dataset": data,
        "transformer_impl": impl,
        "micro_batch_size": micro,
        "global_batch_size": micro,
        "max_length": sequence,
        "lr": 1e-4,
        "lr_warmup_fraction": 0.1,
        "recompute_granularity": "none",
        "num_workers": options.num_workers,
        "save": options.work / "runs",
        "no_save_optim": "false",
        "log_interval": 5,
        **more,
    }
    flags = [part for key, value in values.items() for part in (f"--{key}", value)]
    return [*flags]


def trained(arguments: list[Any], *, saves: bool = False) -> tuple[Any, Path]:
    """Run ours; megatron's stack takes its final norm from its module, which `local` replaces."""
    from megatron.core.models.hybrid import hybrid_block
    from ours import run

    norm = hybrid_block.TENorm
    try:
        return run(arguments, saves=saves)
    finally:
        hybrid_block.TENorm = norm


def release() -> None:
    """Leave process groups that a failed run still holds."""
    from ours import finish_run

    try:
        finish_run()
    except (AssertionError, RuntimeError) as error:
        print(f"cleaning up: {error}", file=sys.stderr)
