"""The embeddings of a micro-batch as losses see them: those of all data-parallel ranks.

S sequences, Q queries, D documents, H numbers of an embedding.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mcore_core.protocols import Reduce

QUERY, POSITIVE, NEGATIVE = 0, 1, 2
"""What a sequence is, in this order within each unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vectors:
    """Embeddings of length 1, so that a product is a cosine similarity.

    Queries and documents are in the order of the global micro-batch: one data-parallel rank's after
    another's, and each query's positive before its negatives.
    """

    queries_QH: Tensor
    docs_DH: Tensor
    owner_D: Tensor
    """Index of the query that each document belongs to, int64."""
    positive_Q: Tensor
    """Index of each query's positive document, int64."""
    labels_Q: Tensor
    """How alike the pair is, as the row says; 0 where it does not."""

    @property
    def positives_QH(self) -> Tensor:
        """Each query's positive document."""
        return self.docs_DH[self.positive_Q]

    def cosine_Q(self) -> Tensor:
        """Return the similarity of each pair, [Q]."""
        return (self.queries_QH * self.positives_QH).sum(-1)

    def first(self, size: int) -> "Vectors":
        """Return the same with the first `size` numbers of each embedding, of length 1 again."""
        queries_QH, docs_DH = (
            F.normalize(x[:, :size], dim=-1) for x in (self.queries_QH, self.docs_DH)
        )
        return replace(self, queries_QH=queries_QH, docs_DH=docs_DH)


def vectors(hidden_SH: Tensor, roles_S: Tensor, labels_S: Tensor, reduce: Reduce) -> Vectors:
    """Return the embeddings of all ranks' present micro-batch. Collective.

    Args:
        hidden_SH: The hidden state that each of this rank's sequences is read at.
        roles_S: QUERY, POSITIVE or NEGATIVE.
        labels_S: Of the sequence's unit.
        reduce: Of the micro-batch.
    """
    beside_S2 = torch.stack([roles_S.to(hidden_SH), labels_S.to(hidden_SH)], -1)
    everyone = reduce.gather_seqs(torch.cat([hidden_SH, beside_S2], -1))
    roles = everyone[:, -2].detach().round().long()
    values = F.normalize(everyone[:, :-2], dim=-1)
    asks, documents = roles == QUERY, roles != QUERY
    return Vectors(
        queries_QH=values[asks],
        docs_DH=values[documents],
        owner_D=(asks.long().cumsum(0) - 1)[documents],
        positive_Q=(roles[documents] == POSITIVE).nonzero().squeeze(-1),
        labels_Q=everyone[asks, -1].detach(),
    )
