"""The element-wise parts of the head: compiled on a GPU, a few tokens at a time elsewhere.

Shapes: C tokens of a chunk, V this rank's vocabulary rows.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

CACHED = 2**18
"""Elements that are worked on at a time where nothing fuses: they stay in the cache."""


def _peak(logits_CV: Tensor) -> Tensor:
    return logits_CV.amax(-1).float()


def _sums(logits_CV: Tensor, peak_C: Tensor, temperature: float) -> Tensor:
    """Return sum(exp(x)) and sum(x exp(x)) of x = (logits - peak) / temperature, [2, C]."""
    x = (logits_CV.float() - peak_C.unsqueeze(-1)) / temperature
    e = x.exp()
    return torch.stack((e.sum(-1), (x * e).sum(-1)))


def _sum(logits_CV: Tensor, peak_C: Tensor, temperature: float) -> Tensor:
    """Return sum(exp(x)) alone, [1, C]."""
    x = (logits_CV.float() - peak_C.unsqueeze(-1)) / temperature
    return x.exp().sum(-1).unsqueeze(0)


def _total(logits_CV: Tensor) -> Tensor:
    """Return the sum of the logits, [1, C]."""
    return logits_CV.float().sum(-1).unsqueeze(0)


def _slope(logits_CV: Tensor, peak_C: Tensor, lse_C: Tensor, grad_C: Tensor, t: float) -> Tensor:
    """Turn logits, in place, into -grad * softmax / t: the dense part of d loss / d logits."""
    p = ((logits_CV.float() - peak_C.unsqueeze(-1)) / t - lse_C.unsqueeze(-1)).exp()
    return logits_CV.copy_(p * (-grad_C / t).unsqueeze(-1))


def _sum_in_place(logits_CV: Tensor, peak_C: Tensor, t: float) -> Tensor:
    """Do what `_sum` does with one tensor."""
    x = logits_CV.float() - peak_C.unsqueeze(-1)
    if t != 1:
        x.div_(t)
    return x.exp_().sum(-1).unsqueeze(0)


def _slope_in_place(
    logits_CV: Tensor, peak_C: Tensor, lse_C: Tensor, grad_C: Tensor, t: float
) -> Tensor:
    """Do what `_slope` does, in float32 without any other tensor."""
    x = logits_CV.float().sub_(peak_C.unsqueeze(-1))  # a copy where there are 16 bits
    if t != 1:
        x.div_(t)
    x.sub_(lse_C.unsqueeze(-1)).exp_().mul_((-grad_C / t).unsqueeze(-1))
    return logits_CV if x.dtype is logits_CV.dtype else logits_CV.copy_(x)


def _few(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Yield slices of tokens, as many as are worked on at a time."""
    size = max(1, CACHED // max(1, vocabulary))
    for start in range(0, max(1, tokens), size):
        yield slice(start, start + size)


def _by_rows(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the same function, a few tokens at a time: it makes no second [C, V] tensor."""

    def run(logits_CV: Tensor, *others: Any) -> Tensor:  # noqa: ANN401
        out: Tensor | None = None
        for some in _few(*logits_CV.shape):
            rows = (o[some] if isinstance(o, Tensor) else o for o in others)
            part = function(logits_CV[some], *rows)
            if out is None:  # beforehand, so that nothing small stays where the next part goes
                out = part.new_empty(*part.shape[:-1], len(logits_CV))
            out[..., some] = part
        assert out is not None
        return out

    return run


def _slope_by_rows(
    logits_CV: Tensor, peak_C: Tensor, lse_C: Tensor, grad_C: Tensor, t: float
) -> Tensor:
    """Do what `_slope` does, a few tokens at a time."""
    for some in _few(*logits_CV.shape):
        _slope_in_place(logits_CV[some], peak_C[some], lse_C[some], grad_C[some], t)
    return logits_CV


@cache
def kernels(fused: bool) -> dict[str, Callable[..., Tensor]]:
    """Return the element-wise parts; compiled on a GPU, where each becomes one pass over logits."""
    functions: dict[str, Callable[..., Tensor]] = {
        "peak": _peak,
        "sum": _sum,
        "sums": _sums,
        "total": _total,
        "slope": _slope,
    }
    if fused:
        return {n: torch.compile(f) for n, f in functions.items()}
    functions["sum"] = _sum_in_place
    return {n: _by_rows(f) for n, f in functions.items()} | {"slope": _slope_by_rows}
