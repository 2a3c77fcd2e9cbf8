"""Peak memory and time of the head: hidden states to loss and gradients, in chunks of tokens.

Memory: at 32k tokens x 152k vocabulary, what is needed beyond the weight, its gradient and the
hidden states (their gradient counts as the head's) stays under 1.5 GB. Time: within 1.3 times whole
logits with torch's cross entropy, forward and backward, at a size where those fit. Each case runs
in a process of its own (on the CPU the peak is the resident memory). The last line is one JSON
document.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

MEMORY_LIMIT = 1.5e9
TIME_LIMIT = 1.3


def main() -> None:
    """Measure; exit 1 where a limit is not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--tokens", type=int, default=32768, help="of the memory case")
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--time_tokens", type=int, help="of the time case (cpu 1024, cuda 8192)")
    parser.add_argument("--time_vocabulary", type=int, help="(cpu 16384, cuda --vocabulary)")
    parser.add_argument("--repeat", type=int, default=5, help="turns of the time case")
    parser.add_argument("--only", nargs="+", choices=("memory", "time"), default=["memory", "time"])
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(**json.loads(options.case))))
        return
    on_cpu = options.device == "cpu"
    found: dict[str, Any] = {"device": options.device}
    good = True
    for dtype in options.dtypes:
        common = {"device": options.device, "dtype": dtype, "hidden": options.hidden}
        result: dict[str, Any] = {}
        if "memory" in options.only:
            sizes = {"tokens": options.tokens, "vocabulary": options.vocabulary}
            result["memory"] = in_process({"kind": "memory", **sizes, **common})
            good &= result["memory"]["beyond_bytes"] < MEMORY_LIMIT
        if "time" in options.only:
            sizes = {
                "tokens": options.time_tokens or (1024 if on_cpu else 8192),
                "vocabulary": options.time_vocabulary or (16384 if on_cpu else options.vocabulary),
            }
            result["time"] = in_process(
                {"kind": "time", "repeat": options.repeat, **sizes, **common}
            )
            good &= result["time"]["ratio"] <= TIME_LIMIT
        found[dtype] = result
        print(dtype, json.dumps(result), flush=True)
    print(json.dumps(found | {"within_limits": good}))
    sys.exit(not good)


def in_process(case: dict[str, Any]) -> dict[str, Any]:
    """Run one case in a process of its own: peaks do not mix."""
    done = subprocess.run(
        [sys.executable, __file__, "--case", json.dumps(case)],
        stdout=subprocess.PIPE, text=True, check=True,
        env={"OMP_NUM_THREADS": "1", **os.environ},
    )  # fmt: skip
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_case(kind: str, device: str, dtype: str, **sizes: int) -> dict[str, Any]:
    """Measure one case."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from mcore_core import compat

    compat.apply()
    import torch

    torch.manual_seed(0)
    tokens, vocabulary, width = sizes["tokens"], sizes["vocabulary"], sizes["hidden"]
    make = {"device": device, "dtype": getattr(torch, dtype)}
    hidden_TH = torch.randn(tokens, width, **make).requires_grad_()
    weight_VH = torch.empty(vocabulary, width, **make).normal_(0, 0.02).requires_grad_()
    targets_T = torch.randint(0, vocabulary, (tokens,), device=device)
    common = {"tokens": tokens, "vocabulary": vocabulary, "hidden": width}
    if kind == "memory":
        small = slice(0, 512)
        chunked(hidden_TH[small].detach().requires_grad_(), weight_VH, targets_T[small])
        weight_VH.grad = None
        before = start_peak(device)
        begin = time.perf_counter()
        chunked(hidden_TH, weight_VH, targets_T)
        seconds = time.perf_counter() - begin
        gradient = weight_VH.numel() * weight_VH.element_size()
        return common | {
            "beyond_bytes": peak(device) - before - gradient,
            "whole_logits_bytes": tokens * vocabulary * hidden_TH.element_size(),
            "seconds": round(seconds, 3),
        }
    ours, theirs = [], []
    for turn in range(sizes["repeat"] + 1):
        for run, times in ((chunked, ours), (whole, theirs)):
            weight_VH.grad = hidden_TH.grad = None
            begin = time.perf_counter()
            loss = run(hidden_TH, weight_VH, targets_T)
            if turn:
                times.append(time.perf_counter() - begin)
            common["loss_of_" + run.__name__] = loss
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    return common | {
        "ratio": round(statistics.median(pairs), 3),
        "ours_seconds": round(statistics.median(ours), 4),
        "whole_seconds": round(statistics.median(theirs), 4),
    }


def chunked(hidden_TH: Any, weight_VH: Any, targets_T: Any) -> float:  # noqa: ANN401
    """Run mcore's head, forward and backward."""
    import torch

    from mcore_core.model.head import VocabRange, local_loss
    from mcore_core.protocols import HeadOut, HeadSpec, LossOutput

    def loss(out: HeadOut, where: slice) -> LossOutput:
        ones = torch.ones_like(out.logps_T)
        return LossOutput(-out.logps_T.sum(), ones.sum())

    vocab = VocabRange(start=0, rows=len(weight_VH))
    out = local_loss(hidden_TH, weight_VH, targets_T, loss, vocab=vocab, spec=HeadSpec())
    mean = out.total / out.count
    mean.backward()  # type: ignore[no-untyped-call]
    return float(mean.detach())


def whole(hidden_TH: Any, weight_VH: Any, targets_T: Any) -> float:  # noqa: ANN401
    """Run whole logits and cross entropy in float32, forward and backward."""
    import torch.nn.functional as F

    mean = F.cross_entropy((hidden_TH @ weight_VH.t()).float(), targets_T)
    mean.backward()
    return float(mean.detach())


def start_peak(device: str) -> int:
    """Return the memory in use, and begin to look for its peak."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak of resident memory
    return _status("VmRSS")


def peak(device: str) -> int:
    """Return the peak since `start_peak`."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024


if __name__ == "__main__":
    main()
