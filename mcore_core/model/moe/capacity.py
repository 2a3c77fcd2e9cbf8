"""Experts that take a limited number of tokens of a row, and which ones are dropped.

The limit is on a whole row (a micro-batch), padding not counted: a result does not depend on how
its tokens are divided over ranks. Megatron's own limits what each rank sends.

Shapes: R real tokens of a row, E experts.
"""

import math

import torch
from torch import Tensor


def capacity_of(tokens: int, *, topk: int, experts: int, factor: float) -> int:
    """Return how many tokens an expert takes of so many."""
    return math.ceil(tokens * topk / experts * factor)


def keep(
    weights_RE: Tensor, routed_RE: Tensor, order_R: Tensor, *, capacity: int, policy: str
) -> Tensor:
    """Return which choices are kept, [R, E].

    Args:
        weights_RE: The router's weights.
        routed_RE: Which experts each token chose.
        order_R: Grows along the row.
        capacity: Tokens an expert takes at most.
        policy: "probs" keeps the tokens with the largest weights, "position" the first ones.
    """
    if capacity >= len(order_R):
        return routed_RE
    by_place = order_R.argsort()
    routed = routed_RE[by_place]
    if policy == "probs":
        value = weights_RE[by_place].masked_fill(~routed, -1)
        best = value.argsort(dim=0, descending=True, stable=True)[:capacity]
        kept = torch.zeros_like(routed).scatter(0, best, True) & routed
    else:
        kept = routed & (routed.cumsum(0) <= capacity)
    return torch.empty_like(kept).index_copy(0, by_place, kept)
