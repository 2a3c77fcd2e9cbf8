"""The step time of `mcore run` over a bare megatron-core loop, on the same model and batch.

Ours is everything from one step to the next: data, collation, the step, metrics, reports. The bare
loop is forward_backward_func, DDP, the optimizer and stock cross entropy over whole logits, on
megatron's HybridModel with the same layers. The two take turns, step by step, in one process; every
token trains, so that our head skips nothing. The ratio is judged where a step takes 100 ms or more;
shorter ones show what a step costs whatever its size, in milliseconds, which has a limit of its
own. The last line is one JSON document.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

LONG_MS = 100.0
"""Steps that are shorter say what is fixed, not what share of a real step it is."""

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"tokens": 48, "micro_batch_size": 2, "micros": 4, "steps": 60},
    "small": {"tokens": 128, "micro_batch_size": 4, "micros": 2, "steps": 40},
    "135m": {"tokens": 128, "micro_batch_size": 4, "micros": 1, "steps": 8},
}


def main() -> None:
    """Measure each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--steps", type=int, help="steps of either loop; the first 3 are warm-up")
    parser.add_argument("--limit", type=float, default=1.03, help="exit 1 above this ratio")
    parser.add_argument(
        "--fixed-limit", type=float, default=1.5, help="exit 1 above so many ms a short step"
    )
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from mcore_core import compat

    compat.apply()
    found = {}
    with tempfile.TemporaryDirectory(prefix="mcore-overhead-") as folder:
        os.environ["MCORE_CACHE"] = f"{folder}/cache"
        for size in options.sizes:
            found[size] = measure(size, Path(folder), options.steps)
            print(size, json.dumps(found[size]), flush=True)
    result = judge(found, limit=options.limit, fixed_limit=options.fixed_limit)
    print(json.dumps(result))
    sys.exit(not result["kept"])


def judge(found: dict[str, dict[str, Any]], *, limit: float, fixed_limit: float) -> dict[str, Any]:
    """Return the figures beside their limits."""
    long = [r["ratio"] for r in found.values() if r["bare_ms"] >= LONG_MS]
    short = [r["extra_ms"] for r in found.values() if r["bare_ms"] < LONG_MS]
    ratio, fixed = max(long, default=None), max(short, default=None)
    kept = (ratio is None or ratio <= limit) and (fixed is None or fixed <= fixed_limit)
    return {
        "overhead": found,
        "ratio": ratio,
        "limit": limit,
        "fixed_ms": fixed,
        "fixed_limit_ms": fixed_limit,
        "kept": kept,
    }


def measure(size: str, folder: Path, steps: int | None) -> dict[str, Any]:
    """Return the median times of both loops' steps, and their ratio."""
    from bare import BareLoop, Row, hybrid_model
    from ours import Watch, finish_run, open_run
    from synthetic import SMALL, SMOLLM2_135M, TINY, write_model, write_texts

    from mcore_core.model.build import decoder_config
    from mcore_core.train.loop import train

    shape = {"tiny": TINY, "small": SMALL, "135m": SMOLLM2_135M}[size]
    sizes = SIZES[size]
    steps = steps or sizes["steps"]
    model = write_model(folder / size, shape)
    batch = sizes["micro_batch_size"] * sizes["micros"]
    data = write_texts(
        folder / f"{size}.jsonl",
        rows=4 * batch,
        tokens=sizes["tokens"],
        vocabulary=shape["vocab_size"],
    )
    watch = Watch()
    arguments = {
        "plugin": "sft",
        "model": model,
        "dataset": data,
        "micro_batch_size": sizes["micro_batch_size"],
        "global_batch_size": batch,
        "train_iters": steps,
        "lr": 1e-4,
        "recompute_granularity": "none",
        "loss_scale": "all",
        "transformer_impl": "local",
        "save": folder / "runs",
    }
    flags = [part for name, value in arguments.items() for part in (f"--{name}", value)]
    session = open_run(flags, watch, saves=False)
    stepper = session.stepper
    config = decoder_config(stepper.plan, session.run.config, on_cpu=True)
    bare = BareLoop(hybrid_model(stepper.plan, config), config, lr=1e-4, distributed=True)
    placed: list[Any] = []
    ours_place = stepper.place

    def remember(micros: Any) -> Any:  # noqa: ANN401
        placed[:] = ours_place(micros)
        return list(placed)

    stepper.place = remember  # type: ignore[method-assign]
    seconds: list[float] = []

    def bare_step() -> None:
        rows = [
            Row(p.batch.tokens_T[None], p.batch.targets_T[None], p.batch.weights_T, p.row)
            for p in placed
        ]
        begin = time.perf_counter()
        bare.step(rows)
        seconds.append(time.perf_counter() - begin)

    watch.between = bare_step
    train(session)
    session.reports.end(None)
    tokens = watch.tokens[-1]
    finish_run()
    ours, theirs = watch.seconds[2:], seconds[3:]
    # the two of one turn see the same machine: the median of their ratios is steadier than the
    # ratio of the medians where other processes come and go
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return {
        "ratio": round(statistics.median(pairs), 4),
        "ratio_of_medians": round(statistics.median(ours) / statistics.median(theirs), 4),
        "ours_ms": round(1000 * statistics.median(ours), 2),
        "bare_ms": round(1000 * statistics.median(theirs), 2),
        "extra_ms": round(1000 * statistics.median(differences), 2),
        "tokens": tokens,
        "turns": len(pairs),
    }


if __name__ == "__main__":
    main()
