"""From logits to tokens: temperature, top_k, top_p, repetition penalty, and their own randomness.

A token's random number is a function of (seed, request, index of the token), so that a completion
is the same in every batch and layout.

Shapes: N rows, V vocabulary.
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mcore_core.protocols import Sampling

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def stream_key(seed: int, request: str) -> int:
    """Return where the random numbers of a request begin, 64 bits."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{request}".encode(), digest_size=8).digest())


def uniforms(keys_N: "NDArray[np.uint64]", index_N: "NDArray[Any]") -> "NDArray[np.float64]":
    """Return each row's random number of a token index: multiples of 2**-32 in [0, 1).

    SplitMix64 (Steele, Lea and Flood, 2014) at a position of the request's stream.
    """
    with np.errstate(over="ignore"):
        z = keys_N + (index_N.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    high: NDArray[np.float64] = ((z ^ (z >> np.uint64(31))) >> np.uint64(32)).astype(np.float64)
    return high * 2.0**-32


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How the rows of a step choose; None where no row needs it."""

    temperature_N1: Tensor
    """1 for greedy rows."""
    greedy_N: Tensor | None
    all_greedy: bool
    top_k_N1: Tensor | None
    """The vocabulary's size where all are kept."""
    top_p_N1: Tensor | None
    penalty_N1: Tensor | None

    @classmethod
    def of(cls, settings: "Sequence[Sampling]", vocab_size: int, device: torch.device) -> "Choice":
        """Return the settings of rows as tensors."""

        def column(values: list[Any], neutral: Any, dtype: torch.dtype) -> Tensor | None:  # noqa: ANN401
            if all(v == neutral for v in values):
                return None
            return torch.tensor(values, dtype=dtype).to(device).unsqueeze(-1)

        greedy = [s.temperature == 0 for s in settings]
        warmth = [1.0 if s.temperature == 0 else s.temperature for s in settings]
        top_k = [s.top_k if 0 < s.top_k < vocab_size else vocab_size for s in settings]
        flags = column(greedy, False, torch.bool)
        return cls(
            temperature_N1=torch.tensor(warmth).to(device).unsqueeze(-1),
            greedy_N=None if flags is None else flags.squeeze(-1),
            all_greedy=all(greedy),
            top_k_N1=column(top_k, vocab_size, torch.long),
            top_p_N1=column([s.top_p for s in settings], 1.0, torch.float32),
            penalty_N1=column([s.repetition_penalty for s in settings], 1.0, torch.float32),
        )


def filtered(scores_NV: Tensor, choice: Choice) -> Tensor:
    """Return the scores with what top_k, then top_p leave out at minus infinity."""
    if choice.top_k_N1 is not None:
        largest = int(choice.top_k_N1.max())
        top_k_N1 = choice.top_k_N1.expand(len(scores_NV), 1)
        best = scores_NV.topk(largest, dim=-1).values.gather(-1, top_k_N1 - 1)
        scores_NV = scores_NV.masked_fill(scores_NV < best, float("-inf"))
    if choice.top_p_N1 is not None:
        ascending, order = scores_NV.sort(dim=-1)
        below = ascending.softmax(-1).cumsum(-1)
        out = below <= 1 - choice.top_p_N1
        out[..., -1] = False
        scores_NV = scores_NV.masked_fill(out.scatter(-1, order, out), float("-inf"))
    return scores_NV


def sample(
    logits_NV: Tensor, uniform_N: Tensor, choice: Choice, seen_NV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose a token for each row.

    Args:
        logits_NV: float32.
        uniform_N: A random number in [0, 1) for each row, float64.
        choice: The rows' settings.
        seen_NV: True for tokens that a row has already, prompt included; needed for penalties.

    Returns:
        Tokens [N], int64, and their log-probabilities [N] under the temperature alone.
    """
    scores_NV = logits_NV / choice.temperature_N1
    logps_NV = scores_NV.log_softmax(-1)
    if choice.penalty_N1 is not None:
        assert seen_NV is not None
        penalty = choice.penalty_N1
        penalized = torch.where(logits_NV < 0, logits_NV * penalty, logits_NV / penalty)
        scores_NV = torch.where(seen_NV, penalized, logits_NV) / choice.temperature_N1
    tokens_N = _draw(scores_NV, logps_NV, uniform_N, choice)
    return tokens_N, logps_NV.gather(-1, tokens_N.unsqueeze(-1)).squeeze(-1)


def _draw(scores_NV: Tensor, logps_NV: Tensor, uniform_N: Tensor, choice: Choice) -> Tensor:
    if choice.all_greedy:
        return scores_NV.argmax(-1)
    plain = choice.top_k_N1 is None and choice.top_p_N1 is None and choice.penalty_N1 is None
    probs_NV = logps_NV.exp() if plain else filtered(scores_NV, choice).softmax(-1)
    # one number a row: the first token at which the summed probability exceeds it
    summed_NV = probs_NV.cumsum(-1, dtype=torch.float64)
    threshold_N1 = uniform_N.unsqueeze(-1) * summed_NV[:, -1:]
    drawn_N = torch.searchsorted(summed_NV, threshold_N1, right=True).squeeze(-1)
    if choice.greedy_N is None:
        return drawn_N
    return torch.where(choice.greedy_N, scores_NV.argmax(-1), drawn_N)
