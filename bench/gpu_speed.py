"""Tokens a second of whole training steps on one device: `mcore run`, and a bare megatron loop."""

import argparse
import gc
import statistics
import time
from typing import Any

from gpu_runs import command, shape_of, trained

WARM_UP = 5


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
