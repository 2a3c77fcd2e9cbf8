"""mcore's sft on one GPU: its two kinds of layers against each other and a bare megatron loop.

In one process, for imports are slow. Sections (--only): agree (20 steps with each transformer_impl
from the same weights and data), cross (a checkpoint of one goes on with the other, both ways),
speed (tokens/s against megatron's GPTModel with Transformer Engine and fused cross entropy, packed).
With --losses FILE it writes 20 losses of a small model instead, in float32 and bfloat16;
--compare OTHER.json then shows the largest difference, so that a CPU and a GPU can be compared:

    python bench/gpu_sft.py --losses cpu.json --device cpu
    python bench/gpu_sft.py --losses gpu.json --device cuda --compare cpu.json
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

WARM_UP = 5


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


def release() -> None:
    """Leave process groups that a failed run still holds."""
    from ours import finish_run

    try:
        finish_run()
    except (AssertionError, RuntimeError) as error:
        print(f"cleaning up: {error}", file=sys.stderr)


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


def our_speed(options: argparse.Namespace, impl: str, micro: int) -> dict[str, Any]:
    """Time everything that `mcore run` does from one step to the next."""
    reset_memory(options)
    given = command(options, shape_of(options), impl, micro=micro, train_iters=options.steps)
    watch, _ = trained(given)
    return rate(options, watch.seconds[WARM_UP - 1 :], watch.tokens[-1], watch.losses[-1])


def bare_speed(options: argparse.Namespace, micro: int) -> dict[str, Any]:
    """Time megatron's own loop on packed rows of the same length (HybridModel on the CPU)."""
    import torch
    from bare import BareLoop, Row, gpt_model, hybrid_model
    from ours import finish_run

    from mcore_core.cli.execute import begin, source_of
    from mcore_core.cli.run import prepare
    from mcore_core.model.build import decoder_config
    from mcore_core.model.packed import PackedRow
    from mcore_core.train.build import model_plan

    reset_memory(options)
    shape = shape_of(options)
    impl = options.impl[0]
    given = command(options, shape, impl, micro=micro, train_iters=options.steps)
    prepared = prepare([str(a) for a in given])
    source = source_of(prepared)
    platform = begin(prepared, source)
    if options.device == "cuda":
        model, config = gpt_model(shape)
    else:
        from megatron.core.models.hybrid import hybrid_block

        from mcore_core.model.norm import Norm

        hybrid_block.TENorm = Norm
        plan = model_plan(source, prepared.config, platform, max_length=options.sequence)
        config = decoder_config(plan, prepared.config, on_cpu=True)
        model = hybrid_model(plan, config)
    loop = BareLoop(model, config, lr=1e-4, distributed=True)
    del model
    device, total = platform.device(), micro * options.sequence
    seconds, loss = [], 0.0
    for _ in range(options.steps):
        tokens = torch.randint(2, shape["vocab_size"], (1, total), device=device)
        cu = list(range(0, total + 1, options.sequence))
        positions = torch.arange(options.sequence, device=device).repeat(micro)
        row = Row(
            tokens,
            tokens.roll(-1, 1),
            torch.ones(total, device=device),
            PackedRow.build(cu, positions),
        )
        begin_step = time.perf_counter()
        loss = loop.step([row])
        seconds.append(time.perf_counter() - begin_step)
    found = rate(options, seconds[WARM_UP:], total, loss)
    del loop
    gc.collect()
    finish_run()
    return found


def rate(
    options: argparse.Namespace, seconds: list[float], tokens: int, loss: float
) -> dict[str, Any]:
    """Return tokens/s by the median step, and the peak of memory."""
    import torch

    found = {
        "tokens_per_second": round(tokens / statistics.median(seconds)),
        "seconds": round(statistics.median(seconds), 4),
        "steps": len(seconds),
        "last_loss": round(loss, 4),
    }
    if options.device == "cuda":
        found["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    return found


def reset_memory(options: argparse.Namespace) -> None:
    """Begin to look for the peak anew."""
    import torch

    if options.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
