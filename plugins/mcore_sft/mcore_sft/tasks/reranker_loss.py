"""Losses of rerankers: pure functions, a sum and a count of each query.

Q queries, D documents of all of them. Logits are those of yes minus those of no.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mcore_sft.tasks.config import RerankerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Documents and what the model says of them."""

    logits_D: Tensor
    """Logit of yes minus logit of no: the log-odds that the document suits."""
    suits_D: Tensor
    """1 where the document suits the query, else 0."""
    query_D: Tensor
    """Index of the query that each document belongs to, int64."""
    queries: int
    """How many queries there are, Q."""

    def negatives_Q(self) -> Tensor:
        """Return the number of negative documents of each query."""
        return self.sums_Q(1 - self.suits_D)

    def sums_Q(self, values_D: Tensor) -> Tensor:
        """Return the sum over each query's documents."""
        return values_D.new_zeros(self.queries).index_add(0, self.query_D, values_D)


def pointwise_reranker(judged: Judged, options: RerankerConfig) -> tuple[Tensor, Tensor]:
    """Return the binary cross-entropy of each document, summed by query, and the documents, [Q].

    It is the cross-entropy of yes and no alone, in nats.
    """
    loss_D = F.binary_cross_entropy_with_logits(judged.logits_D, judged.suits_D, reduction="none")
    return judged.sums_Q(loss_D), judged.sums_Q(torch.ones_like(judged.suits_D))


def listwise_reranker(judged: Judged, options: RerankerConfig) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each positive among itself and the negatives of its query.

    In nats, summed by query, and the number of such groups, [Q]. A group that is smaller than
    listwise_reranker_min_group_size is left out.
    """
    logits_D = judged.logits_D / options.listwise_reranker_temperature
    suits_D, query_D = judged.suits_D, judged.query_D
    negative_D = suits_D < 0.5
    same_DD = query_D.unsqueeze(1) == query_D
    itself_DD = torch.eye(len(query_D), dtype=torch.bool, device=query_D.device)
    others_DD = (same_DD & negative_D) | itself_DD
    spread_D = logits_D.expand(len(query_D), -1).masked_fill(~others_DD, float("-inf"))
    loss_D = spread_D.logsumexp(1) - logits_D
    enough_Q = judged.negatives_Q() + 1 >= options.listwise_reranker_min_group_size
    group_D = suits_D * enough_Q[query_D]
    return judged.sums_Q(loss_D * group_D), judged.sums_Q(group_D)


@torch.no_grad()
def measures(judged: Judged) -> dict[str, tuple[Tensor, Tensor]]:
    """Return sums and counts by query, [Q] each.

    accuracy: of yes and no. For queries with a positive and a negative document: recall@1, whether
    a positive stands first, and mrr, one by the rank of the first positive. A negative that equals
    it stands before it.
    """
    logits_D, suits_D, query_D = judged.logits_D, judged.suits_D, judged.query_D
    right_D = ((logits_D > 0) == (suits_D > 0)).to(logits_D)
    low_D = torch.full_like(logits_D, float("-inf"))
    best_Q = low_D.new_full((judged.queries,), float("-inf")).scatter_reduce(
        0, query_D, torch.where(suits_D > 0, logits_D, low_D), "amax"
    )
    ahead_Q = judged.sums_Q((1 - suits_D) * (logits_D >= best_Q[query_D]))
    ranked_Q = ((judged.negatives_Q() > 0) & (best_Q > float("-inf"))).to(logits_D)
    return {
        "accuracy": (judged.sums_Q(right_D), judged.sums_Q(torch.ones_like(right_D))),
        "recall@1": ((ahead_Q == 0) * ranked_Q, ranked_Q),
        "mrr": (ranked_Q / (1 + ahead_Q), ranked_Q),
    }
