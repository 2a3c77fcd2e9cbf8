"""GRPO steps on one GPU with each rollout engine: where time goes, and whose weights it has.

A model of Qwen3-0.6B's shape with random weights in bfloat16; a step is 32 prompts with 8
completions each, of 256 tokens at most. After the last step the engine gets the weights once more
and completes some prompts greedily, and so does a native engine on the same policy: where vLLM has
the policy's weights the two agree but for near ties of bfloat16. Each engine in a process of its
own; the last line is one JSON document.

    python bench/gpu_grpo.py                                # native, then vllm in colocate mode
    python bench/gpu_grpo.py --engine native --tiny --device cpu
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
CALLS = ("update_weights", "wake", "sleep", "poll")
seconds: defaultdict[str, list[float]] = defaultdict(list)
engines: list[Any] = []


def score(rollouts: Sequence[Any], /) -> list[float | None]:
    """Reward even tokens, so that advantages differ."""
    return [mean([1.0 - t % 2 for t in r.token_ids] or [0.0]) for r in rollouts]


def main() -> None:
    """Run each engine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", nargs="+", default=["native", "vllm"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--micro", type=int, default=32)
    parser.add_argument("--memory", type=float, default=0.4, help="vLLM's share of the GPU")
    parser.add_argument("--sleep_level", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="vLLM without compiling")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "mcore-gpu-grpo")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.prompts, options.generations, options.tokens, options.micro = 2, 4, 8, 4
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    options.work.mkdir(parents=True, exist_ok=True)
    if options.one:
        print(json.dumps(one(options, options.one)))
        return
    found = {}
    for engine in options.engine:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", engine]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        lines = done.stdout.splitlines()
        found[engine] = json.loads(lines[-1]) if not done.returncode else {"rc": done.returncode}
        print(engine, json.dumps(found[engine]), flush=True)
    print(json.dumps(found))


def one(options: argparse.Namespace, engine: str) -> dict[str, Any]:
    """Train with one engine; return means over all steps but the first."""
    from ours import open_run

    from mcore_core.platform import install

    os.environ["MCORE_CACHE"] = str(options.work / "cache")
    install()
    _watch(engine)
    begin = time.perf_counter()
    session = open_run(_arguments(options, engine), saves=False)
    started = time.perf_counter() - begin
    from mcore_core.train.loop import train

    train(session)
    checked = _check(engines[0], options)
    session.reports.end(None)
    lines = (session.run.output_dir / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "loss" in line]
    import torch

    return {
        "start_seconds": round(started, 1),
        "per_step": {
            key: round(mean(s[key] for s in steps[1:]), 3)
            for key in steps[-1]
            if key.startswith("timers/") or key in ("seconds", "reward", "tokens")
        },
        "first_step_rollout": steps[0].get("timers/rollout"),
        "engine_calls": {k: [round(x, 3) for x in v] for k, v in seconds.items()},
        "rewards": [s.get("reward") for s in steps],
        "losses": [s["loss"] for s in steps],
        "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1)
        if options.device == "cuda"
        else None,
        "after_sync": checked,
    }


def _arguments(options: argparse.Namespace, engine: str) -> list[Any]:
    batch = options.prompts * options.generations
    given: dict[str, Any] = {
        "plugin": "grpo",
        "model": _model(options),
        "dataset": _prompts(options),
        "reward_funcs": f"{__file__}:score",
        "rollout_engine": engine,
        "transformer_impl": options.impl,
        "num_generations": options.generations,
        "max_completion_length": options.tokens,
        "temperature": 1,
        "top_k": 0,
        "top_p": 1,
        "beta": 0,
        "lr": 1e-5,
        "micro_batch_size": options.micro,
        "global_batch_size": batch,
        "train_iters": options.steps,
        "log_interval": 1,
        "num_workers": 0,
        "save": options.work / "runs",
        "no_save_optim": "true",
    }
    if engine == "vllm":
        given |= {
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": options.memory,
            "vllm_max_model_len": 1024,
            "vllm_enforce_eager": str(options.eager).lower(),
            "sleep_level": options.sleep_level,
            "log_rollout_offpolicy_metrics": "true",
        }
    return [part for key, value in given.items() for part in (f"--{key}", value)]


def _model(options: argparse.Namespace) -> Path:
    from synthetic import QWEN3_06B, TINY, write_model

    dtype = "float32" if options.device == "cpu" else "bfloat16"
    shape = TINY if options.tiny else QWEN3_06B
    folder = write_model(options.work / f"model-{shape['vocab_size']}", shape, dtype=dtype)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def _prompts(options: argparse.Namespace) -> Path:
    file = options.work / "prompts.jsonl"
    rows = (
        {"messages": [{"role": "user", "content": " ".join(f"w{2 + (i * 7 + j) % 97}"
                       for j in range(20 + i % 60))}]}
        for i in range(options.prompts * options.steps)
    )  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _class_of(engine: str) -> Any:  # noqa: ANN401
    if engine == "native":
        from mcore_rlhf.rollout.native.engine import NativeEngine

        return NativeEngine
    from mcore_rlhf.rollout.vllm.colocate import VllmColocated

    return VllmColocated


def _watch(engine: str) -> None:
    """Keep the run's engine and its context, and measure its calls."""
    kind = _class_of(engine)
    begin = kind.__init__

    def init(self: Any, context: Any) -> None:  # noqa: ANN401
        started = time.perf_counter()
        begin(self, context)
        seconds["start"].append(time.perf_counter() - started)
        engines.append(self)
        self.seen_context = context

    kind.__init__ = init
    kind.close = lambda self: None  # it is asked once more after the run
    for name in CALLS:
        setattr(kind, name, _measured(name, getattr(kind, name)))


def _measured(name: str, method: Any) -> Any:  # noqa: ANN401
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        begin = time.perf_counter()
        try:
            return method(self, *args, **kwargs)
        finally:
            seconds[name].append(time.perf_counter() - begin)

    return call


def _greedy(engine: Any, options: argparse.Namespace) -> list[Any]:  # noqa: ANN401
    from mcore_core.protocols import Request, Sampling

    sampling = Sampling(max_tokens=min(options.tokens, 32), temperature=0)
    prompts = [tuple(range(3 + i, 13 + 2 * i)) for i in range(8)]
    engine.wake()
    engine.update_weights(step=options.steps)
    engine.submit([Request(f"check{i}", p, sampling) for i, p in enumerate(prompts)])
    done = {}
    while some := engine.poll():
        done |= {c.id: c for c in some}
    engine.sleep()
    return [done[f"check{i}"] for i in range(len(prompts))]


def _check(engine: Any, options: argparse.Namespace) -> dict[str, Any]:  # noqa: ANN401
    """Compare greedy completions of the run's engine with a native one's on the same policy."""
    from mcore_rlhf.rollout.native.engine import NativeEngine

    theirs = _greedy(engine, options)
    native = NativeEngine(engine.seen_context)
    own = _greedy(native, options)
    same, apart = 0, []
    for a, b in zip(theirs, own, strict=True):
        common = 0
        for x, y in zip(a.token_ids, b.token_ids, strict=False):
            if x != y:
                break
            common += 1
        same += common
        apart += [
            abs(float(x - y)) for x, y in zip(a.logps[:common], b.logps[:common], strict=True)
        ]
    return {
        "tokens_until_they_part": same,
        "tokens": sum(len(b.token_ids) for b in own),
        "logps_mean_difference": mean(apart) if apart else None,
        "logps_largest_difference": max(apart, default=None),
    }


if __name__ == "__main__":
    main()
