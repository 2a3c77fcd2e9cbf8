"""Tokens a second of the native engine and of transformers' generate, on one GPU, same weights.

A model of Qwen3-0.6B's shape (or, with --moe, a mixture of experts) with random weights in
bfloat16: 64 prompts, 256 new tokens each, nothing ends early. The engine with and without CUDA
graphs, transformers with its dynamic and its static (compiled) cache, after a warm-up each. Greedy
completions are compared: where they part, and how far the log-probabilities of the engine's tokens
are from a whole forward pass of transformers. The last line is one JSON document.

    python bench/gpu_native.py            # about two minutes
    python bench/gpu_native.py --moe
    python bench/gpu_native.py --tiny     # on a CPU, to try the script
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from native_rollout import build_engine

DENSE = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
EXPERTS = DENSE | {
    "num_hidden_layers": 16,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
}
PEAK = 8.0
"""Embeddings, which are the head too, times this: one token is clearly the likeliest."""
BEGIN = time.perf_counter()


def main() -> None:
    """Measure what was asked for."""
    options = arguments()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1" if options.tiny else "8")
    from mcore_core import compat
    from mcore_core.platform import install

    platform = install()
    compat.apply()
    import numpy as np
    import torch

    from mcore_core.parallel.state import initialize
    from mcore_core.parallel.topology import Layout

    initialize(platform, Layout())
    found: dict[str, Any] = {"shape": "moe" if options.moe else "dense", "torch": torch.__version__}
    if platform.name == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory(prefix="mcore-native-") as name:
        folder = Path(name)
        model = write_model(folder, options, platform)
        rng = np.random.default_rng(0)
        low, high = options.prompt
        prompts = [
            tuple(rng.integers(3, model.config.vocab_size, n).tolist())
            for n in rng.integers(low, high + 1, options.requests)
        ]
        greedy: dict[str, Any] = {}
        for name, section in sections(options, folder, platform, model, prompts, greedy).items():
            if name not in options.only:
                continue
            if time.perf_counter() - BEGIN > options.limit:
                found[name] = {"left out": f"more than {options.limit} s have passed"}
                continue
            found[name] = guarded(section)
            release(platform)
            print(
                f"{time.perf_counter() - BEGIN:.0f} s {name}", json.dumps(found[name]), flush=True
            )
        found["agreement"] = guarded(lambda: agreement(greedy, model, prompts, platform))
    print(json.dumps(found))


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("graphs", "dynamic", "static", "no graphs")
    parser.add_argument("--moe", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompt", type=int, nargs=2, default=(100, 300), metavar=("LOW", "HIGH"))
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--local", action="store_true", help="layers without Transformer Engine")
    parser.add_argument("--limit", type=float, default=130, help="seconds; then parts are left out")
    parser.add_argument("--profile", action="store_true", help="kernels of a few recorded steps")
    options = parser.parse_args()
    if options.tiny:
        options.requests, options.tokens, options.prompt = 6, 12, (5, 20)
    return options


def write_model(folder: Path, options: argparse.Namespace, platform: Any) -> Any:  # noqa: ANN401
    """Save a random model and return transformers' own."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    shape = dict(EXPERTS if options.moe else DENSE) | (SMALL if options.tiny else {})
    if options.moe and options.tiny:
        shape |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config, cls = (
        (Qwen3MoeConfig, Qwen3MoeForCausalLM) if options.moe else (Qwen3Config, Qwen3ForCausalLM)
    )
    dtype = torch.bfloat16 if platform.name == "cuda" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(platform.device()):
            model = cls(
                config(
                    **shape,
                    max_position_embeddings=4096,
                    bos_token_id=None,
                    eos_token_id=None,
                    pad_token_id=0,
                )
            ).eval()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(PEAK)
    model.save_pretrained(folder)
    return model


def sections(
    options: argparse.Namespace,
    folder: Path,
    platform: Any,  # noqa: ANN401
    model: Any,  # noqa: ANN401
    prompts: list[tuple[int, ...]],
    greedy: dict[str, Any],
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return what is measured, by name."""

    def native(name: str, *, graphs: bool, rounds: int) -> dict[str, Any]:
        engine = build_engine(
            folder,
            platform,
            family="qwen3_moe" if options.moe else "qwen3",
            transformer_engine=platform.name == "cuda" and not options.local,
            native_cuda_graphs=graphs,
        )
        found: dict[str, Any] = {"unrecorded": engine.unrecorded}
        seconds, _ = timed(lambda: ours(engine, prompts, 2, 1.0), platform)
        found["first_call_seconds"] = round(seconds, 2)
        if graphs:
            seconds, _ = timed(lambda: ours(engine, prompts, options.tokens, 1.0), platform)
            found["warm_up_seconds"] = round(seconds, 2)
        found["sampled"] = rate(
            lambda: ours(engine, prompts, options.tokens, 1.0), platform, prompts, options, rounds
        )
        if options.profile and graphs:
            profile(lambda: ours(engine, prompts, 24, 1.0))
        found["greedy"] = rate(
            lambda: greedy.update({name: ours(engine, prompts, options.tokens, 0.0)}),
            platform,
            prompts,
            options,
            1,
        )
        seconds, _ = timed(lambda: ours(engine, prompts, 1, 1.0), platform)
        found["prompts_seconds"] = round(seconds, 3)
        graphs_now = engine._steps.graphs
        found["graphs"] = None if graphs_now is None else len(graphs_now)
        if graphs:
            engine.sleep()
            seconds, _ = timed(lambda: ours(engine, prompts, options.tokens, 1.0), platform)
            total = options.requests * options.tokens
            found["after_sleep_tokens_per_second"] = round(total / seconds)
        engine.close()
        return found

    def theirs(name: str, *, cache: str, rounds: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        given = (model, prompts, options.tokens)
        seconds, _ = timed(lambda: hf(*given, cache, sample=True), platform)
        found["warm_up_seconds"] = round(seconds, 2)
        found["sampled"] = rate(
            lambda: hf(*given, cache, sample=True), platform, prompts, options, rounds
        )
        if cache == "dynamic":
            found["greedy"] = rate(
                lambda: greedy.update({name: hf(*given, cache, sample=False)}),
                platform,
                prompts,
                options,
                1,
            )
        return found

    return {
        "graphs": lambda: native("graphs", graphs=True, rounds=3),
        "dynamic": lambda: theirs("dynamic", cache="dynamic", rounds=1),
        "static": lambda: theirs("static", cache="static", rounds=2),
        "no graphs": lambda: native("no graphs", graphs=False, rounds=1),
    }


def timed(function: Callable[[], Any], platform: Any) -> tuple[float, Any]:  # noqa: ANN401
    """Return seconds and what the function returns."""
    import torch

    begin = time.perf_counter()
    result = function()
    if platform.name == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def rate(
    function: Callable[[], Any],
    platform: Any,  # noqa: ANN401
    prompts: list[tuple[int, ...]],
    options: argparse.Namespace,
    rounds: int,
) -> dict[str, Any]:
    """Return tokens/s of the best round, and of all."""
    rates = [len(prompts) * options.tokens / timed(function, platform)[0] for _ in range(rounds)]
    return {"tokens_per_second": round(max(rates)), "rounds": [round(r) for r in rates]}


def release(platform: Any) -> None:  # noqa: ANN401
    """Give memory back to the device."""
    import torch

    gc.collect()
    if platform.name == "cuda":
        torch.cuda.empty_cache()


def guarded(section: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a part; its failure is part of the result, and the others still run."""
    try:
        return section()
    except Exception as error:  # the others are still worth their time
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {str(error)[:1000]}"}


def ours(
    engine: Any,  # noqa: ANN401
    prompts: list[tuple[int, ...]],
    limit: int,
    temperature: float,
) -> list[Any]:
    """Generate with the engine; return the completions in order."""
    from mcore_core.protocols import Request, Sampling

    sampling = Sampling(max_tokens=limit, temperature=temperature)
    engine.submit([Request(str(i), p, sampling) for i, p in enumerate(prompts)])
    found: dict[str, Any] = {}
    while done := engine.poll():
        found |= {c.id: c for c in done}
    return [found[str(i)] for i in range(len(prompts))]


def hf(
    model: Any,  # noqa: ANN401
    prompts: list[tuple[int, ...]],
    limit: int,
    cache: str,
    *,
    sample: bool,
) -> list[tuple[int, ...]]:
    """Generate with transformers, left-padded in one batch; return the tokens."""
    import torch

    longest, device = max(map(len, prompts)), model.device
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    more: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}
    if sample:
        more |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=mask, do_sample=sample, max_new_tokens=limit, **more
        )
    return [tuple(row) for row in out[:, longest:].tolist()]


def profile(function: Callable[[], Any]) -> None:
    """Print the kernels that take longest."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        function()
    print(found.key_averages().table(sort_by="cuda_time_total", row_limit=25), file=sys.stderr)


def agreement(
    greedy: dict[str, Any],
    model: Any,  # noqa: ANN401
    prompts: list[tuple[int, ...]],
    platform: Any,  # noqa: ANN401
) -> dict[str, Any]:
    """Compare greedy completions, and the engine's log-probabilities with whole passes."""
    import numpy as np
    import torch

    tokens = {
        name: [c if isinstance(c, tuple) else c.token_ids for c in given]
        for name, given in greedy.items()
    }
    found: dict[str, Any] = {}
    for a, b in (("graphs", "dynamic"), ("graphs", "no graphs")):
        if a in tokens and b in tokens:
            same = [prefix(x, y) for x, y in zip(tokens[a], tokens[b], strict=True)]
            whole = len(tokens[a][0])
            found[f"{a} = {b}"] = {
                "completions_equal": f"{sum(n == whole for n in same)} of {len(same)}",
                "median_equal_tokens": float(np.median(same)),
                "first_token_equal": sum(n > 0 for n in same),
            }
    for name in ("graphs", "no graphs"):
        apart = []
        for prompt, one in list(zip(prompts, greedy.get(name, ()), strict=False))[:8]:
            whole_1T = torch.tensor([[*prompt, *one.token_ids]], device=platform.device())
            with torch.no_grad():
                logps = model(whole_1T).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            picked = logps.gather(-1, whole_1T[0, len(prompt) :, None]).squeeze(-1)
            apart.append(np.abs(picked.cpu().numpy() - one.logps))
        if apart:
            every = np.concatenate(apart)
            found[f"logps of {name} from a whole pass"] = {
                "median": float(np.median(every)),
                "largest": float(every.max()),
            }
    return found


def prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Return how many tokens two completions begin with alike."""
    pairs = enumerate(zip(a, b, strict=True))
    return next((i for i, (x, y) in pairs if x != y), len(a))


if __name__ == "__main__":
    main()
