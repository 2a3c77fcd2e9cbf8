"""What `mcore plan` predicts of one GPU's memory against what torch.cuda shows, for three models.

A dense one of 0.5B parameters, a small mixture of experts and one with latent attention, each with
both kinds of layers and three kinds of recomputation, in bfloat16 with Adam on one packed row:

- state: weights, gradients and optimizer between steps, against `memory_allocated`;
- kept: what a forward pass leaves for the backward pass, against the growth of `memory_allocated`;
- peak: the most a step takes above the state, against `max_memory_allocated`.

Needs torch, megatron-core and mcore's sources, not its plugins installed; each model in a process
of its own. The last line is one JSON document; a row whose ratio is off by more than 10% is marked.

    python bench/plan_gpu.py
    python bench/plan_gpu.py --device cpu --tiny     # tries the script: only `kept` is measured
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), *map(str, sorted((ROOT / "plugins").iterdir()))]
GIB = 2**30
WITHIN = 0.1
IMPLEMENTATIONS = ("local", "transformer_engine")
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {"recompute_granularity": "none"},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}
NAMES = ("dense", "experts", "latent")


def main() -> None:
    """Measure what was asked for."""
    options = arguments()
    if options.one:
        print(json.dumps(guarded(options)))
        return
    rows: list[dict[str, Any]] = []
    for name in options.models:
        for impl in options.impl:
            found = in_process(name, impl, options)
            print("\n".join(map(line, found)), flush=True)
            rows += found
    print(json.dumps({"tokens": options.tokens, "device": options.device, "rows": rows}))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--impl", nargs="+", choices=IMPLEMENTATIONS, default=None)
    parser.add_argument("--tokens", type=int, default=None, help="of the packed row")
    parser.add_argument("--tiny", action="store_true", help="models of two narrow layers")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "IMPL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    options.impl = options.impl or list(IMPLEMENTATIONS[: 1 if on_cpu else 2])
    options.tokens = options.tokens or (512 if options.tiny else 8192)
    return options


def in_process(name: str, impl: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one model with one kind of layers, in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if options.device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    arguments = [
        *("--one", name, impl, "--device", options.device, "--tokens", str(options.tokens)),
        *(["--tiny"] if options.tiny else []),
    ]
    found = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *arguments],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    try:
        rows: list[dict[str, Any]] = json.loads(found.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        rows = [{"error": f"exit {found.returncode}: {found.stdout[-500:]}"}]
    return [{"model": name, "impl": impl, **row} for row in rows]


def guarded(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of one model; an error is a row that says so."""
    name, impl = options.one
    rows: list[dict[str, Any]] = []
    for recompute in RECOMPUTE:
        try:
            rows.append({"recompute": recompute, **measured(name, impl, recompute, options)})
        except Exception as error:
            traceback.print_exc()
            rows.append({"recompute": recompute, "error": f"{type(error).__name__}: {error}"[:400]})
    return rows


def shape_of(name: str, *, tiny: bool) -> Any:  # noqa: ANN401
    """Return a model's sizes; the dense one is Qwen2.5-0.5B."""
    from mcore_core.model.architecture import Architecture
    from mcore_core.model.shapes import MLAShape, MoEShape

    dense = Architecture(
        num_layers=24,
        hidden_size=896,
        ffn_hidden_size=4864,
        num_attention_heads=14,
        num_query_groups=2,
        kv_channels=64,
        vocab_size=151936,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        add_qkv_bias=True,
    )
    if tiny:
        dense = dataclasses.replace(
            dense, num_layers=2, hidden_size=128, ffn_hidden_size=320, kv_channels=16,
            num_attention_heads=8, vocab_size=640,
        )  # fmt: skip
    layers = tuple(range(dense.num_layers if tiny else 12))
    if name == "experts":
        return dataclasses.replace(
            dense,
            num_layers=len(layers),
            tie_word_embeddings=False,
            add_qkv_bias=False,
            qk_layernorm=True,
            moe=MoEShape(
                num_experts=8 if tiny else 32,
                topk=2 if tiny else 4,
                ffn_hidden_size=64 if tiny else 768,
                layers=layers,
            ),
        )
    if name == "latent":
        heads = dense.num_attention_heads
        return dataclasses.replace(
            dense,
            num_layers=len(layers),
            add_qkv_bias=False,
            num_query_groups=heads,
            mla=MLAShape(
                q_lora_rank=64 if tiny else 512,
                kv_lora_rank=32 if tiny else 256,
                qk_nope_head_dim=16 if tiny else 64,
                qk_rope_head_dim=8 if tiny else 32,
                v_head_dim=16 if tiny else 64,
            ),
        )
    return dense


def case_of(shape: Any, impl: str, recompute: str, options: argparse.Namespace) -> Any:  # noqa: ANN401
    """Return a run of two steps on one full row each."""
    import numpy as np
    from mcore_moe.config import MoEConfig
    from mcore_sft.config import SFTConfig
    from mcore_sft.recipe import SFTRecipe

    from mcore_core.model.moe.dispatchers import AllToAll
    from mcore_core.testing.cases import Case

    rng, half = np.random.default_rng(0), options.device == "cuda"

    def unit() -> dict[str, Any]:
        return {
            "input_ids": rng.integers(0, shape.vocab_size, options.tokens).astype(np.int32),
            "weights": np.ones(options.tokens, np.float32),
            "length": options.tokens,
        }

    return Case(
        architecture=shape,
        recipe=lambda config: SFTRecipe(config, None),  # type: ignore[arg-type]  # it only encodes
        steps=[[[unit()]] for _ in range(2)],
        options={
            "optimizer": "adam",
            "lr": 1e-5,
            "use_distributed_optimizer": False,
            "max_length": options.tokens,
            "micro_batch_size": 1,
            "global_batch_size": 1,
            "bf16": half,
            **RECOMPUTE[recompute],
        },
        groups=(SFTConfig, MoEConfig),
        dtype="bfloat16" if half else "float32",
        transformer_engine=impl == "transformer_engine",
        dispatcher=AllToAll,
    )


def measured(name: str, impl: str, recompute: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return bytes, measured and predicted."""
    import gc

    from mcore_core import compat

    compat.apply()
    import torch

    from mcore_core.parallel.topology import Layout
    from mcore_core.planning.memory import memory
    from mcore_core.testing.cases import Session
    from mcore_core.testing.measure import saved_activations

    shape = shape_of(name, tiny=options.tiny)
    session = Session(case_of(shape, impl, recompute, options), Layout())
    on_gpu = options.device == "cuda"
    (predicted,) = memory(
        session.config, shape, session.layout, session.plan.stage_layers, capacity=0, gpu=on_gpu
    )
    state = predicted.weights + predicted.gradients + predicted.optimizer
    peak = predicted.activations + predicted.logits
    found: dict[str, Any] = {"parameters": predicted.parameters}
    session.train(1)
    placed = session.stepper.place(session.micros(1))
    session.stepper.forward.scale = 1.0
    chunk = session.chunks[0]
    if on_gpu:
        gc.collect()
        before = torch.cuda.memory_allocated()
        hidden = session.stepper.forward.hidden(placed[0], chunk)
        kept = torch.cuda.memory_allocated() - before
        hidden.sum().backward()  # a dispatcher holds on to its tokens, and so to the whole graph
        del hidden, placed
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        session.train(1)
        torch.cuda.synchronize()
        found["state"] = pair(before, state)
        found["peak"] = pair(torch.cuda.max_memory_allocated() - before, peak)
    else:
        with saved_activations(session.chunks) as saved:
            session.stepper.forward.hidden(placed[0], chunk)
        kept = saved.bytes
    found["kept"] = pair(kept, kept_of(session, shape, on_gpu=on_gpu))
    let_go(chunk)
    del session, chunk
    gc.collect()
    return found


def let_go(chunk: Any) -> None:  # noqa: ANN401
    """Drop what dispatchers hold of their last tokens: it would keep the model in memory."""
    import torch

    for module in chunk.modules():
        held = vars(getattr(module, "token_dispatcher", None) or argparse.Namespace())
        for name, value in list(held.items()):
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                held[name] = None


def kept_of(session: Any, shape: Any, *, on_gpu: bool) -> int:  # noqa: ANN401
    """Return the prediction for a forward pass without head and loss."""
    from mcore_core.planning.activations import Rows, stage_bytes
    from mcore_core.planning.memory import recompute_of, row_tokens

    size = 2 if on_gpu else 4
    rows = Rows(
        tokens=row_tokens(session.config, shape),
        size=size,
        fused=on_gpu,
        recompute=recompute_of(session.config),
    )
    kept, _ = stage_bytes(shape, session.layout, rows, range(shape.num_layers), 1.0)
    # the final norm: its input, its output and one float32 a token
    return kept + rows.tokens * (2 * shape.hidden_size * size + 4)


def pair(measured: int, predicted: int) -> dict[str, float]:
    """Return both in bytes, and predicted over measured."""
    ratio = predicted / measured if measured else float("nan")
    return {"measured": measured, "predicted": predicted, "ratio": round(ratio, 3)}


def line(row: dict[str, Any]) -> str:
    """Return a row for people."""
    head = f"{row['model']:<8} {row['impl']:<19} {row.get('recompute', ''):<10}"
    if "error" in row:
        return f"{head} {row['error']}"
    parts = []
    for name in ("state", "kept", "peak"):
        if name in row:
            p = row[name]
            wrong = "" if abs(p["ratio"] - 1) <= WITHIN else " !"
            parts.append(
                f"{name} {p['measured'] / GIB:7.3f} GiB, predicted {p['predicted'] / GIB:7.3f}"
                f" ({p['ratio']:.2f}{wrong})"
            )
    return f"{head} " + "; ".join(parts)


if __name__ == "__main__":
    main()
