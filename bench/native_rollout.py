"""Completions a second of the native engine and of transformers' generate, same model and prompts.

The two take turns in one process, on one core (or on the GPU, if there is one). Lengths differ: an
end token is likely enough that completions stop anywhere before their limit, as in training.
`--profile` prints where the engine's time goes. The last line is one JSON document.
"""

import argparse
import cProfile
import json
import os
import pstats
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "quickstart": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 72,
        "prompts": 16,
        "generations": 8,
        "prompt_tokens": (24, 36),
        "max_tokens": 24,
    },
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "prompts": 4,
        "generations": 4,
        "prompt_tokens": (40, 80),
        "max_tokens": 32,
    },
    "0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "prompts": 16,
        "generations": 8,
        "prompt_tokens": (100, 300),
        "max_tokens": 256,
    },
}
EOS = 1


def main() -> None:
    """Measure each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["quickstart", "135m"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--alone", action="store_true", help="leave transformers out")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from mcore_core import compat
    from mcore_core.platform import install

    platform = install()
    compat.apply()
    from mcore_core.parallel.state import initialize
    from mcore_core.parallel.topology import Layout

    initialize(platform, Layout())
    found = {}
    for size in options.sizes:
        with tempfile.TemporaryDirectory(prefix="mcore-rollout-") as folder:
            found[size] = measure(size, Path(folder), platform, options)
        print(size, json.dumps(found[size]), flush=True)
    print(json.dumps({"native_rollout": found}))


def measure(size: str, folder: Path, platform: Any, options: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return the seconds and tokens of the best round of each."""
    import numpy as np
    import torch

    shape = dict(SIZES[size])
    number, copies, limit = (shape.pop(k) for k in ("prompts", "generations", "max_tokens"))
    low, high = shape.pop("prompt_tokens")
    model = write_model(folder, shape, half=platform.name == "cuda")
    engine = build_engine(folder, platform)
    rng = np.random.default_rng(0)
    prompts = [
        tuple(rng.integers(3, shape["vocab_size"], rng.integers(low, high)).tolist())
        for _ in range(number)
    ]
    batch = [p for p in prompts for _ in range(copies)]
    native, theirs = [], []
    for i in range(options.rounds):
        if options.profile and i == options.rounds - 1:
            profile = cProfile.Profile()
            profile.enable()
        native.append(timed(lambda i=i: ours(engine, batch, limit, seed=i), platform))
        if options.profile and i == options.rounds - 1:
            profile.disable()
            pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(45)
        if not options.alone:
            torch.manual_seed(i)
            theirs.append(timed(lambda: hf(model, batch, limit, platform.device()), platform))
    result: dict[str, Any] = {"completions": len(batch)}
    for name, runs in (("native", native), ("transformers", theirs)):
        if runs:
            result[name] = {
                "completions_per_second": round(max(len(batch) / s for s, _ in runs), 1),
                "tokens_per_second": round(max(t / s for s, t in runs), 1),
            }
    if theirs:
        rates = [result[k]["completions_per_second"] for k in ("native", "transformers")]
        result["ratio"] = round(rates[0] / rates[1], 2)
    return result


def timed(function: Any, platform: Any) -> tuple[float, int]:  # noqa: ANN401
    """Return seconds and what the function returns."""
    import torch

    begin = time.perf_counter()
    tokens = function()
    if platform.name == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, tokens


def write_model(folder: Path, shape: dict[str, Any], *, half: bool) -> Any:  # noqa: ANN401
    """Save a random qwen3-shaped model; return transformers' own, ready to generate."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        **shape,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    if half:
        return model.to("cuda", torch.bfloat16).eval()
    return model.eval()


def build_engine(
    folder: Path,
    platform: Any,  # noqa: ANN401
    *,
    family: str = "qwen3",
    transformer_engine: bool = False,
    **options: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Return the native engine with the folder's weights, and options of its own."""
    import torch
    from mcore_hfbridge.bridge import HFBridge
    from mcore_rlhf.rollout.native.config import NativeConfig
    from mcore_rlhf.rollout.native.engine import NativeEngine

    from mcore_core.config.kernel import kernel_config
    from mcore_core.model.build import ModelPlan
    from mcore_core.model.resolve import read_hf_config
    from mcore_core.parallel.topology import Layout
    from mcore_core.protocols import EngineContext
    from mcore_core.train.build import build_model

    table = import_module(f"mcore_hfbridge.families.{family}").FAMILY
    architecture = table.architecture(read_hf_config(folder))
    cuda = platform.name == "cuda"
    config = kernel_config(NativeConfig, model=str(folder), **options)
    plan = ModelPlan(
        architecture=architecture,
        layout=Layout(),
        stage_layers=[architecture.num_layers],
        dtype=torch.bfloat16 if cuda else torch.float32,
        transformer_engine=transformer_engine,
    )
    chunks = build_model(plan, config, on_cpu=not cuda)
    bridge = HFBridge(table, architecture)
    bridge.load(chunks, folder)
    engine = NativeEngine(
        EngineContext(
            config=config,
            chunks=chunks,
            plan=plan,
            device=platform.device(),
            tokenizer=None,
            bridge=bridge,
            model_path=folder,
        )
    )
    engine.update_weights(step=0)
    return engine


def ours(engine: Any, batch: list[tuple[int, ...]], limit: int, *, seed: int) -> int:  # noqa: ANN401
    """Generate with the engine; return the tokens."""
    from mcore_core.protocols import Request, Sampling

    sampling = Sampling(max_tokens=limit, temperature=1.0, stop_token_ids=(EOS,), seed=seed)
    engine.submit([Request(f"{seed}-{i}", p, sampling) for i, p in enumerate(batch)])
    tokens = 0
    while done := engine.poll():
        tokens += sum(len(c.token_ids) for c in done)
    return tokens


def hf(model: Any, batch: list[tuple[int, ...]], limit: int, device: Any) -> int:  # noqa: ANN401
    """Generate with transformers, left-padded in one batch; return the tokens."""
    import torch

    longest = max(map(len, batch))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in batch], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=device)
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=limit,
        )
    new = out[:, longest:]
    ended = (new == EOS).int().cumsum(-1)
    return int(((ended == 0) | ((new == EOS) & (ended == 1))).sum())


if __name__ == "__main__":
    main()
