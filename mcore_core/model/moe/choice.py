"""Which experts a token goes to and with which weights: every family's choice in one function.

Shapes: T tokens, E experts, K chosen ones.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mcore_core.model.shapes import MoEShape


def wide(logits_TE: Tensor) -> Tensor:
    """Return the logits in float32, or in float64 where the router runs in it."""
    return logits_TE if logits_TE.dtype is torch.float64 else logits_TE.float()


def scores_of(logits_TE: Tensor, moe: "MoEShape") -> Tensor:
    """Return each expert's score, by softmax over experts or by sigmoid."""
    logits_TE = wide(logits_TE)
    return logits_TE.sigmoid() if moe.score_function == "sigmoid" else logits_TE.softmax(-1)


def limit_groups(choice_TE: Tensor, moe: "MoEShape") -> Tensor:
    """Return the scores with all but the best groups of experts at minus infinity.

    A group's score is its best expert's with softmax (DeepSeek-V2's group_limited_greedy), the sum
    of its best two with sigmoid (DeepSeek-V3).
    """
    assert moe.num_groups is not None
    assert moe.group_topk is not None
    grouped = choice_TE.view(*choice_TE.shape[:-1], moe.num_groups, -1)
    best = min(1 if moe.score_function == "softmax" else 2, grouped.shape[-1])
    scores_TG = grouped.topk(best, dim=-1).values.sum(-1)
    kept = torch.zeros_like(scores_TG, dtype=torch.bool)
    kept = kept.scatter(-1, scores_TG.topk(moe.group_topk, dim=-1).indices, True)
    return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)


def chosen_by_score(scores_TE: Tensor, moe: "MoEShape", bias_E: Tensor | None) -> Tensor:
    """Return the numbers of the chosen experts, [T, K]."""
    choice_TE = scores_TE.detach()
    if bias_E is not None:
        choice_TE = choice_TE + bias_E.to(choice_TE.dtype)
    if moe.group_topk is not None and moe.num_groups is not None:
        choice_TE = limit_groups(choice_TE, moe)
    return choice_TE.topk(moe.topk, dim=-1).indices


def weights_of(scores_TE: Tensor, chosen_TK: Tensor, moe: "MoEShape") -> Tensor:
    """Return what each chosen expert's output is multiplied by, [T, K]."""
    weights_TK = scores_TE.gather(-1, chosen_TK)
    if not moe.pre_softmax and (moe.topk > 1 or moe.score_function == "softmax"):
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return weights_TK * moe.scaling_factor


def choose(logits_TE: Tensor, moe: "MoEShape", bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the weights of the chosen experts [T, K] and their numbers [T, K]."""
    scores_TE = scores_of(logits_TE, moe)
    chosen_TK = chosen_by_score(scores_TE, moe, bias_E)
    return weights_of(scores_TE, chosen_TK, moe), chosen_TK


def sinkhorn(logits_NE: Tensor, *, tolerance: float = 1e-4, limit: int = 1000) -> Tensor:
    """Return the balanced assignment of N tokens to experts (Clark et al. 2022, S-BASE), float64.

    Rows and columns of exp(logits) are scaled in turn until each expert takes an even share, as
    megatron-core does; in float64, so that the choice does not hang on the order of a sum.
    """
    cost = (logits_NE.double() - logits_NE.double().amax(-1, keepdim=True)).exp()
    tokens, experts = cost.shape
    columns, epsilon = cost.new_ones(experts), 1e-8
    for _ in range(limit):
        rows = 1 / (tokens * ((columns * cost).sum(1) + epsilon))
        found = 1 / (experts * ((rows.unsqueeze(1) * cost).sum(0) + epsilon))
        moved = float((found - columns).abs().mean())
        columns = found
        if moved <= tolerance:
            break
    return columns * cost * rows.unsqueeze(1)
