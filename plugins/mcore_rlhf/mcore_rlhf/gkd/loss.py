"""The loss of distillation. T tokens."""

import torch

from mcore_core.protocols import HeadOut, LossOutput, Reduce
from mcore_rlhf.gkd.batch import GKDBatch


def distillation(out: HeadOut, batch: GKDBatch, _: Reduce, /) -> LossOutput:
    """Return the divergence from the teacher, plus the weighted negative log-likelihood.

    A mean over tokens by their weights (On-Policy Distillation, arXiv:2306.13649; the second term
    is ms-swift's sft_alpha). Sums over tokens, so that any part of a row gives its share.
    """
    assert out.divergence_T is not None
    trains_T = batch.weights_T > 0
    divergence = torch.where(trains_T, out.divergence_T * batch.weights_T, 0.0).sum()
    nll = torch.where(batch.nll_T > 0, -out.logps_T * batch.nll_T, 0.0).sum()
    count = batch.weights_T.sum()
    metrics = {"divergence": (divergence, count)}
    return LossOutput(divergence + nll, count, metrics)
