"""mcore's sft on one GPU: its two kinds of layers against each other and a bare megatron loop.

In one process, for imports are slow. Sections (--only): agree (20 steps with each transformer_impl
from the same weights and data), cross (a checkpoint of one goes on with the other, both ways),
speed (tokens/s against megatron's GPTModel with Transformer Engine and fused cross entropy).
With --losses FILE it writes 20 losses of a small model instead, in float32 and bfloat16;
--compare OTHER.json then shows the largest difference, so that a CPU and a GPU can be compared:

    python bench/gpu_sft.py --losses cpu.json --device cpu
    python bench/gpu_sft.py --losses gpu.json --device cuda --compare cpu.json
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_runs import command, release, shape_of, trained


def main() -> None:
    """Run what was asked for; the last line is one JSON document."""
    options = arguments()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    options.work.mkdir(parents=True, exist_ok=True)
    os.environ["MCORE_CACHE"] = str(options.work / "cache")
    from mcore_core import compat

    compat.apply()
    import torch

    found: dict[str, Any] = {"device": options.device, "torch": torch.__version__}
    if options.device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    if options.losses is not None:
        found |= small_losses(options)
        options.losses.write_text(json.dumps(found, indent=1))
        print(json.dumps(found))
        return
    for name, section in (("agree", agree), ("cross", cross), ("speed", speed)):
        if name in options.only:
            begin = time.perf_counter()
            found[name] = guarded(section, options)
            print(f"{name}: {time.perf_counter() - begin:.0f} s", json.dumps(found[name]))
    print(json.dumps(found))


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", default=["agree", "cross", "speed"])
    parser.add_argument("--impl", nargs="+", default=["transformer_engine", "local"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--micro_batch", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--num_workers", type=int, default=0, help="data processes of our runs")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny sizes, to try the script on a CPU"
    )
    parser.add_argument("--losses", type=Path, metavar="FILE", help="write small-model losses")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="losses of another device")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "mcore-gpu-sft")
    options = parser.parse_args()
    if options.tiny:
        options.sequence = min(options.sequence, 64)
    if options.device == "cpu":
        options.impl = ["local"]
    return options


def guarded(
    section: Callable[[argparse.Namespace], dict[str, Any]], options: argparse.Namespace
) -> dict[str, Any]:
    """Run a section; its failure is part of the result, and the others still run."""
    try:
        return section(options)
    except BaseException as error:
        traceback.print_exc()
        release()
        return {"error": f"{type(error).__name__}: {str(error)[:2000]}"}


def small_losses(options: argparse.Namespace) -> dict[str, Any]:
    """Train a small model with each layer implementation and precision."""
    from synthetic import SMALL

    losses = {}
    for dtype in ("float32", "bfloat16"):
        for impl in options.impl:
            given = command(
                options, SMALL, impl, micro=2, dtype=dtype, sequence=256,
                train_iters=options.steps, global_batch_size=4, lr=1e-3,
            )  # fmt: skip
            watch, _ = trained(given)
            losses[f"{dtype}/{impl}"] = watch.losses
    found: dict[str, Any] = {"losses": losses}
    references = {k: v for k, v in losses.items() if k.endswith("/local")}
    if options.compare is not None:
        references = json.loads(options.compare.read_text())["losses"]
    found["largest_difference"] = {
        f"{mine} - {other}": difference(losses[mine], references[other])
        for mine in losses
        for other in references
        if mine.split("/")[0] == other.split("/")[0]
    }
    return found


def difference(a: list[float], b: list[float]) -> float:
    """Return the largest difference at any step."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def agree(options: argparse.Namespace) -> dict[str, Any]:
    """Train with each implementation; the losses should differ by less than 2e-2 at every step."""
    shape, losses = shape_of(options), {}
    for impl in options.impl:
        given = command(
            options, shape, impl, micro=options.micro_batch[0], train_iters=options.steps
        )
        losses[impl] = trained(given)[0].losses
    runs = list(losses.values())
    return {"losses": losses, "largest_difference": difference(runs[0], runs[-1])}


def cross(options: argparse.Namespace) -> dict[str, Any]:
    """Save half-way with one implementation, go on with the other, and with the same one."""
    shape, half = shape_of(options, layers=4), 3
    found: dict[str, Any] = {}
    for impl in options.impl:
        other = next((i for i in options.impl if i != impl), impl)
        steps = {"micro": 2, "train_iters": 2 * half}
        saved = command(options, shape, impl, **steps, save_interval=half)
        watch, folder = trained(saved, saves=True)
        load = folder / f"checkpoint-{half}"
        after, _ = trained(command(options, shape, other, **steps, load=load))
        found[f"{impl} -> {other}"] = {
            "uninterrupted": watch.losses[half:],
            "other": after.losses,
            "largest_difference": difference(watch.losses[half:], after.losses),
        }
        shutil.rmtree(folder, ignore_errors=True)
    return found


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Measure tokens/s of whole steps, ours and bare, after a warm-up."""
    from gpu_speed import bare_speed, our_speed

    found: dict[str, Any] = {}
    for micro in options.micro_batch:
        rates: dict[str, Any] = {}
        rates["bare"] = guarded(lambda o, m=micro: bare_speed(o, m), options)
        for impl in options.impl:
            rates[impl] = guarded(lambda o, i=impl, m=micro: our_speed(o, i, m), options)
        base = rates["bare"].get("tokens_per_second")
        for impl in options.impl:
            if base and "tokens_per_second" in rates[impl]:
                rates[impl]["of_bare"] = round(rates[impl]["tokens_per_second"] / base, 4)
        found[f"micro_batch {micro}"] = rates
    return found


if __name__ == "__main__":
    main()
