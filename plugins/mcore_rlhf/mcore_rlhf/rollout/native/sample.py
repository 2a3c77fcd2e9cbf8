"""From logits to tokens: temperature, top_k, top_p, repetition penalty, and their own randomness.

A token's random number is a function of (seed, request, index of the token), so that a completion
is the same in every batch and layout. Nothing here asks the device for a value.

Shapes: N rows, V vocabulary, B blocks of it.
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcore_core.protocols import Sampling

_GOLDEN, _FIRST, _SECOND = (
    n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
MOST_SORTED = 1024
"""With a top_k up to this, only so many scores are put in order."""
TIES = 32
"""Tokens as likely as the last one of top_k that top_p counts."""
BLOCK = 128
"""Tokens whose probabilities are summed before they are looked at one by one."""


def stream_key(seed: int, request: str) -> int:
    """Return where the random numbers of a request begin, 64 bits."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{request}".encode(), digest_size=8).digest())


def uniforms(keys_N: Tensor, index_N: Tensor) -> Tensor:
    """Return each row's random number of a token index: multiples of 2**-32 in [0, 1), float64.

    SplitMix64 (Steele, Lea and Flood, 2014) at a position of the request's stream.

    Args:
        keys_N: The bits of `stream_key`, int64.
        index_N: int64.
    """

    def high(z: Tensor, bits: int) -> Tensor:  # a shift of int64 repeats the sign: cut it off
        shifted: Tensor = (z >> bits) & (2 ** (64 - bits) - 1)
        return shifted

    z = keys_N + (index_N + 1) * _GOLDEN
    z = (z ^ high(z, 30)) * _FIRST
    z = (z ^ high(z, 27)) * _SECOND
    return high(z ^ high(z, 31), 32).double() * 2.0**-32


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How the rows of a step choose; None where no row needs it."""

    temperature_N1: Tensor
    """1 for greedy rows."""
    greedy_N: Tensor | None
    all_greedy: bool
    top_k_N1: Tensor | None
    """The vocabulary's size where all are kept."""
    largest_k: int
    """The largest of these."""
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
            largest_k=max(top_k),
            top_p_N1=column([s.top_p for s in settings], 1.0, torch.float32),
            penalty_N1=column([s.repetition_penalty for s in settings], 1.0, torch.float32),
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The settings that there are, by field."""
        names = ("temperature_N1", "greedy_N", "top_k_N1", "top_p_N1", "penalty_N1")
        return {n: t for n in names if (t := getattr(self, n)) is not None}


def filtered(scores_NV: Tensor, choice: Choice) -> Tensor:
    """Return the scores with what top_k, then top_p leave out at minus infinity.

    Tokens as likely as the last one that is kept are kept, too.
    """
    top_p_N1, vocab = choice.top_p_N1, scores_NV.shape[-1]
    if choice.top_k_N1 is not None and choice.largest_k <= MOST_SORTED:
        few = min(vocab, choice.largest_k + (0 if top_p_N1 is None else TIES))
        best_NM = scores_NV.topk(few, dim=-1).values
        least_N1 = best_NM.gather(-1, choice.top_k_N1.expand(len(scores_NV), 1) - 1)
        if top_p_N1 is not None:
            best_NM = best_NM.masked_fill(best_NM < least_N1, float("-inf"))
            least_N1 = torch.maximum(least_N1, _nucleus(best_NM, top_p_N1))
        return scores_NV.masked_fill(scores_NV < least_N1, float("-inf"))
    if choice.top_k_N1 is None and top_p_N1 is None:
        return scores_NV
    best_NV = scores_NV.sort(dim=-1, descending=True).values
    if choice.top_k_N1 is not None:
        least_N1 = best_NV.gather(-1, choice.top_k_N1.expand(len(scores_NV), 1) - 1)
        best_NV = best_NV.masked_fill(best_NV < least_N1, float("-inf"))
        scores_NV = scores_NV.masked_fill(scores_NV < least_N1, float("-inf"))
    if top_p_N1 is not None:
        least_N1 = _nucleus(best_NV, top_p_N1)
        scores_NV = scores_NV.masked_fill(scores_NV < least_N1, float("-inf"))
    return scores_NV


def _nucleus(best_NM: Tensor, top_p_N1: Tensor) -> Tensor:
    """Return the least score that top_p keeps, [N, 1], of scores in descending order.

    A score is kept if those before it have less than top_p of the probability.
    """
    probs_NM = best_NM.softmax(-1)
    before_NM = probs_NM.cumsum(-1) - probs_NM
    kept_NM = (before_NM < top_p_N1) | (top_p_N1 >= 1)
    return best_NM.masked_fill(~kept_NM, float("inf")).amin(-1, keepdim=True)


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
    drawn_N = inverse(probs_NV, uniform_N)
    if choice.greedy_N is None:
        return drawn_N
    return torch.where(choice.greedy_N, scores_NV.argmax(-1), drawn_N)


def inverse(probs_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Return for each row the first token at which the summed probability exceeds its number.

    Sums run over blocks first, then inside one: a running sum over a whole vocabulary is slow.

    Args:
        probs_NV: Probabilities, or any multiple of them.
        uniform_N: In [0, 1), float64.

    Returns:
        Tokens, [N], int64; never one of probability zero.
    """
    rows, vocab = probs_NV.shape
    blocks_NBb = F.pad(probs_NV, (0, -vocab % BLOCK)).view(rows, -1, BLOCK)
    mass_NB = blocks_NBb.sum(-1, dtype=torch.float64)
    upto_NB = mass_NB.cumsum(-1)
    threshold_N1 = uniform_N.unsqueeze(-1) * upto_NB[:, -1:]
    block_N1 = torch.searchsorted(upto_NB, threshold_N1, right=True)
    before_N1 = (upto_NB - mass_NB).gather(-1, block_N1)
    inside_Nb = blocks_NBb.gather(1, block_N1.unsqueeze(-1).expand(-1, 1, BLOCK)).squeeze(1)
    inside_Nb = inside_Nb.cumsum(-1, dtype=torch.float64)
    found_N1 = torch.searchsorted(inside_Nb, threshold_N1 - before_N1, right=True)
    total_N1 = inside_Nb[:, -1:].contiguous()
    last_N1 = torch.searchsorted(inside_Nb, total_N1)  # the last token that adds something
    return (block_N1 * BLOCK + torch.minimum(found_N1, last_N1)).squeeze(-1)
