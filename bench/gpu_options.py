"""Options that only a GPU can follow: the same steps with each, against a run without any.

8-bit products, the precision-aware optimizer, its state in host memory, muon, LoRA, whole-layer
recomputation: losses of 20 steps beside the plain run's, tokens/s and peak memory.

    python bench/gpu_options.py
    python bench/gpu_options.py --device cpu --tiny      # tries the script, not the options
"""

import argparse
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_runs import command, release, shape_of, trained

AWARE = {
    "use_precision_aware_optimizer": "true",
    "exp_avg_dtype": "bf16",
    "exp_avg_sq_dtype": "bf16",
}
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fp8 tensorwise": {"fp8_format": "hybrid", "fp8_recipe": "tensorwise"},
    "fp8 delayed": {"fp8_format": "hybrid", "fp8_recipe": "delayed"},
    "fp8 blockwise": {"fp8_format": "e4m3", "fp8_recipe": "blockwise"},
    "precision-aware": AWARE,
    "optimizer in host memory": {"optimizer_cpu_offload": "true"},
    "muon": {"optimizer": "muon"},
    "lora": {"tuner_type": "lora", "lora_rank": 16},
    "recompute full": {"recompute_granularity": "full", "recompute_method": "uniform",
                       "recompute_num_layers": 1},
}  # fmt: skip


def main() -> None:
    """Run each; the last line is one JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--impl", default="transformer_engine")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=None, help="fewer than the shape has")
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--micro_batch", type=int, default=2)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "mcore-gpu-opts")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        options.impl = "local"
    if options.tiny:
        options.sequence = min(options.sequence, 64)
    options.work.mkdir(parents=True, exist_ok=True)
    os.environ["MCORE_CACHE"] = str(options.work / "cache")
    from mcore_core import compat

    compat.apply()
    found = {name: _guarded(options, RUNS[name]) for name in options.only}
    plain = found.get("plain", {}).get("losses")
    for name, run in found.items():
        if plain and "losses" in run:
            run["largest_difference"] = max(
                abs(a - b) for a, b in zip(run["losses"], plain, strict=True)
            )
        print(f"{name:26}", json.dumps({k: v for k, v in run.items() if k != "losses"}))
    print(json.dumps(found))


def _guarded(options: argparse.Namespace, more: dict[str, Any]) -> dict[str, Any]:
    import torch

    try:
        if options.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        given = command(
            options, shape_of(options, options.layers), options.impl,
            micro=options.micro_batch, train_iters=options.steps, **more,
        )  # fmt: skip
        watch, _ = trained(given)
    except BaseException as error:  # a refusal is a result too
        traceback.print_exc()
        release()
        return {"error": f"{type(error).__name__}: {str(error)[:1500]}"}
    late = watch.seconds[len(watch.seconds) // 2 :]
    return {
        "losses": watch.losses,
        "first": watch.losses[0],
        "last": watch.losses[-1],
        "tokens_per_second": round(median(watch.tokens) / median(late)),
        "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)
        if options.device == "cuda"
        else None,
    }


if __name__ == "__main__":
    main()
