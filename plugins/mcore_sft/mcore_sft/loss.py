"""Token cross-entropy. T tokens."""

import torch

from mcore_core.protocols import HeadOut, LossOutput, Reduce
from mcore_sft.batch import SFTBatch


def cross_entropy(out: HeadOut, batch: SFTBatch, _: Reduce, /) -> LossOutput:
    """Return the weighted negative log-likelihood, summed, and what to divide it by.

    Both are sums over tokens, so that any part of a row gives its share.
    """
    trains_T = batch.weights_T > 0
    nll_T = torch.where(trains_T, -out.logps_T * batch.weights_T, 0.0)
    return LossOutput(nll_T.sum(), batch.count_T.sum())
