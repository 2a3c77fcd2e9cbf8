"""Losses of embeddings: pure functions, one value a query. Q queries, D documents, C candidates.

A loss is `loss(vectors, options) -> loss_Q`; the mean over the queries is what is minimized.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mcore_sft.tasks.config import EmbeddingConfig
from mcore_sft.tasks.vectors import Vectors


def infonce(vectors: Vectors, options: EmbeddingConfig) -> Tensor:
    """Return the cross-entropy of the positive document among the candidates, [Q], in nats.

    Candidates of query q are documents, by s(q, d) / temperature; with include_qq the other
    queries q', by s(q, q'), and with include_dd the other documents d, by s(d+, d) (van den Oord et
    al., arXiv 1807.03748; Zhang et al., Qwen3 Embedding, arXiv 2506.05176). A fake negative has a
    similarity of more than s(q, d+) plus a margin.
    """
    right_Q = vectors.cosine_Q()
    rows_Q = torch.arange(len(right_Q), device=right_Q.device)
    parts = [vectors.queries_QH @ vectors.docs_DH.t()]
    own_QD = rows_Q.unsqueeze(1) == vectors.owner_D
    kept = [torch.ones_like(own_QD) if options.infonce_use_batch else own_QD]
    positive_QD = torch.zeros_like(own_QD)
    positive_QD[rows_Q, vectors.positive_Q] = True
    if options.infonce_include_qq:
        parts.append(vectors.queries_QH @ vectors.queries_QH.t())
        kept.append(rows_Q.unsqueeze(1) != rows_Q)
    if options.infonce_include_dd:
        parts.append(vectors.positives_QH @ vectors.docs_DH.t())
        kept.append(~positive_QD)
    near_QC, kept_QC = torch.cat(parts, 1), torch.cat(kept, 1)
    if options.infonce_mask_fake_negative:
        bound_Q = right_Q.detach() + options.infonce_fake_neg_margin
        kept_QC = kept_QC & (near_QC.detach() <= bound_Q.unsqueeze(1))
        kept_QC[rows_Q, vectors.positive_Q] = True
    logits_QC = (near_QC / options.infonce_temperature).masked_fill(~kept_QC, float("-inf"))
    return logits_QC.logsumexp(1) - right_Q / options.infonce_temperature


def cosine_similarity(vectors: Vectors, options: EmbeddingConfig) -> Tensor:
    """Return (s(q, d) - label)^2, [Q]: labels are similarities from -1 to 1."""
    return (vectors.cosine_Q() - vectors.labels_Q) ** 2


def contrastive(vectors: Vectors, options: EmbeddingConfig) -> Tensor:
    """Return the contrastive loss of each pair, [Q] (Hadsell et al. 2006).

    With the distance x = 1 - s(q, d) it is x^2 / 2 where the label is 1, and
    max(0, margin - x)^2 / 2 where it is 0.
    """
    far_Q, like_Q = 1 - vectors.cosine_Q(), vectors.labels_Q
    apart_Q = F.relu(options.contrastive_margin - far_Q)
    return 0.5 * (like_Q * far_Q**2 + (1 - like_Q) * apart_Q**2)


def online_contrastive(vectors: Vectors, options: EmbeddingConfig) -> Tensor:
    """Return the contrastive loss, without its half, of the hard pairs of the micro-batch, [Q].

    Unlike pairs are hard where they are nearer than the farthest like pair, like ones where they
    are farther than the nearest unlike pair; without any pair of that other kind, the mean
    distance of their own kind is the bound (sentence-transformers' OnlineContrastiveLoss). That
    loss is a sum over the micro-batch: each value is multiplied by Q, so that their mean is it.
    """
    far_Q, like_Q = 1 - vectors.cosine_Q(), vectors.labels_Q > 0.5
    bounds_Q = far_Q.detach()
    farthest, nearest = _bound(bounds_Q, like_Q, largest=True), _bound(bounds_Q, ~like_Q)
    apart_Q = F.relu(options.contrastive_margin - far_Q)
    like_loss_Q = torch.where(bounds_Q > nearest, far_Q**2, 0.0)
    unlike_loss_Q = torch.where(bounds_Q < farthest, apart_Q**2, 0.0)
    return torch.where(like_Q, like_loss_Q, unlike_loss_Q) * len(far_Q)


def _bound(far_Q: Tensor, chosen_Q: Tensor, *, largest: bool = False) -> Tensor:
    """Return the largest or smallest distance of a kind; without any, the mean of the others."""
    mine, others = far_Q[chosen_Q], far_Q[~chosen_Q]
    if len(mine):
        return mine.max() if largest else mine.min()
    return others.mean()
