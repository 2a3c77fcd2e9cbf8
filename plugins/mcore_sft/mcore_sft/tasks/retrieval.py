"""How well a query finds its positive document. Q queries, D documents, R rows, H numbers."""

import torch
from torch import Tensor

from mcore_sft.tasks.correlation import pearson, spearman
from mcore_sft.tasks.vectors import Vectors

CHUNK = 1024
"""Queries that are compared with all documents at a time."""
TIED = 1e-5
"""Similarities that differ by less are equal."""


@torch.no_grad()
def measures(vectors: Vectors, mine: slice) -> tuple[dict[str, Tensor], Tensor]:
    """Return what is reported of a micro-batch, and what an evaluation keeps of it.

    Returns:
        mean_pos: similarity with the positive, [Q]. mean_neg: mean similarity with what else there
        is in the micro-batch. margin: the first minus the largest of the second. The rows, [R, 2 H]
        for the queries of `mine`: query and positive.
    """
    near_QD = vectors.queries_QH @ vectors.docs_DH.t()
    right_Q = vectors.cosine_Q()
    rows_Q = torch.arange(len(right_Q), device=right_Q.device)
    others_QD = torch.ones_like(near_QD, dtype=torch.bool)
    others_QD[rows_Q, vectors.positive_Q] = False
    number = others_QD.sum(1)
    found = {"mean_pos": right_Q}
    if near_QD.shape[1] > 1:
        found["mean_neg"] = (near_QD * others_QD).sum(1) / number
        found["margin"] = right_Q - near_QD.masked_fill(~others_QD, float("-inf")).amax(1)
    rows = torch.cat([vectors.queries_QH[mine], vectors.positives_QH[mine]], 1)
    return found, rows


@torch.no_grad()
def found(rows_RN: Tensor) -> dict[str, float]:
    """Return recall@1 and the mean reciprocal rank among the positives of all rows.

    Documents that equal the positive in similarity, within rounding, stand beside it in an order of
    chance: so embeddings that are all the same find nothing.
    """
    queries_RH, docs_RH = rows_RN.chunk(2, 1)
    right_R = (queries_RH * docs_RH).sum(1, keepdim=True)
    first, reciprocal = 0.0, 0.0
    for start in range(0, len(rows_RN), CHUNK):
        part = slice(start, start + CHUNK)
        ahead_CR = queries_RH[part] @ docs_RH.t() - right_R[part]
        better_C = (ahead_CR > TIED).sum(1).double()
        tied_C = (ahead_CR.abs() <= TIED).sum(1).double() - 1
        first += float(((better_C == 0) / (1 + tied_C)).sum())
        reciprocal += float((1 / (1 + better_C + tied_C / 2)).sum())
    return {"recall@1": first / len(rows_RN), "mrr": reciprocal / len(rows_RN)}


def correlations(rows_R2: Tensor) -> dict[str, float]:
    """Return the correlations of similarities, the first column, with labels, the second."""
    rows = rows_R2.double().cpu().numpy()
    return {
        "pearson": pearson(rows[:, 0], rows[:, 1]),
        "spearman": spearman(rows[:, 0], rows[:, 1]),
    }
