"""Losses that keep experts in use alike, as shares: summed over the ranks of a row they are it.

Shapes: T tokens of this rank, E experts, S sequences of the packed row.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_core.model.moe.choice import wide

if TYPE_CHECKING:
    from mcore_core.model.moe.tokens import RowTokens
    from mcore_core.model.shapes import MoEShape


@dataclass(frozen=True, slots=True)
class Spread:
    """How the router would spread a row's tokens over experts, left to itself."""

    scores_TE: Tensor
    """Probabilities, zero for padding."""
    routed_TE: Tensor
    """1 for the experts with the highest scores, zero for padding."""


def spread(logits_TE: Tensor, tokens: "RowTokens", moe: "MoEShape") -> Spread:
    """Return the scores that balancing losses are about: without bias, groups and capacity."""
    scores_TE = wide(logits_TE)
    if moe.score_function == "sigmoid":
        scores_TE = scores_TE.sigmoid()
        scores_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
    else:
        scores_TE = scores_TE.softmax(-1)
    top = scores_TE.topk(moe.topk, dim=-1).indices
    routed_TE = torch.zeros_like(scores_TE).scatter(-1, top, 1.0)
    return Spread(scores_TE * tokens.real_T1, routed_TE * tokens.real_T1)


def summed(values: Tensor, group: Any, op: Any = dist.ReduceOp.SUM) -> Tensor:  # noqa: ANN401
    """Reduce over a group, outside of the gradient."""
    values = values.detach().clone()
    if group.size() > 1:
        dist.all_reduce(values, op=op, group=group)
    return values


def by_groups(found: Spread, group_T: Tensor, topk: int, ranks: Any) -> Tensor:  # noqa: ANN401
    """Return this rank's share of E sum(f_e P_e), averaged over groups of tokens.

    f_e is the share of a group's choices that fall on an expert, P_e its mean score (Fedus et al.
    2021; by sequence, DeepSeek-V3).

    Args:
        found: The row's spread.
        group_T: Which group (a sequence, or the row) a token is of, from 1; 0 for padding.
        topk: Experts a token goes to.
        ranks: The ranks that share the row.
    """
    size = torch.zeros((), dtype=torch.long, device=group_T.device)
    size = torch.maximum(size, group_T.max()) if len(group_T) else size
    count = int(summed(size, ranks, dist.ReduceOp.MAX)) + 1

    def per_group(values: Tensor) -> Tensor:
        return values.new_zeros(count, *values.shape[1:]).index_add(0, group_T, values)

    experts = found.scores_TE.shape[-1]
    tokens_S1 = summed(per_group(torch.ones_like(found.scores_TE[:, :1])), ranks).clamp(min=1)
    fraction_SE = summed(per_group(found.routed_TE), ranks) / (tokens_S1 * topk)
    mean_SE = per_group(found.scores_TE) / tokens_S1
    return experts * (fraction_SE * mean_SE)[1:].sum() / max(1, count - 1)


def over_batch(found: Spread, counts_E: Tensor, topk: int) -> Tensor:
    """Return this rank's share of E sum(f_e P_e) over the global batch (Qiu et al. 2025).

    Args:
        found: The row's spread.
        counts_E: How many tokens of the global batch go to each expert.
        topk: Experts a token goes to.
    """
    choices = counts_E.sum().clamp(min=1)
    fraction_E = (counts_E / choices).to(found.scores_TE.dtype)
    mean_E = found.scores_TE.sum(0) / (choices / topk).to(found.scores_TE.dtype)
    return found.scores_TE.shape[-1] * (fraction_E * mean_E).sum()


def z_loss(logits_TE: Tensor, tokens: "RowTokens", ranks: Any) -> Tensor:  # noqa: ANN401
    """Return this rank's share of the row's mean of logsumexp squared (Zoph et al. 2022)."""
    real_T1 = tokens.real_T1
    squares = torch.logsumexp(wide(logits_TE), -1).square() * real_T1.squeeze(-1)
    return squares.sum() / summed(real_T1.sum().to(squares.dtype), ranks).clamp(min=1)
