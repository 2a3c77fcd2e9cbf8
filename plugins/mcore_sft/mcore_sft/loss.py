"""Losses of single tokens: cross-entropy, and dynamic fine-tuning. T tokens, C channels."""

import torch
from torch import Tensor

from mcore_core.protocols import HeadOut, LossOutput, Reduce
from mcore_sft.batch import SFTBatch


def cross_entropy(out: HeadOut, batch: SFTBatch, _: Reduce, /) -> LossOutput:
    """Return the weighted negative log-likelihood, summed, and what to divide it by.

    Both are sums over tokens, so that any part of a row gives its share.
    """
    return _shares(_nll(out, batch), batch)


def dynamic_fine_tuning(out: HeadOut, batch: SFTBatch, _: Reduce, /) -> LossOutput:
    """Return the same with each token's loss multiplied by its probability, as a constant.

    The gradient of -p log p with p held fixed is that of -p: tokens that the model finds unlikely
    pull less (Wu et al., On the Generalization of SFT: a Reinforcement Learning Perspective with
    Reward Rectification, arXiv 2508.05629).
    """
    return _shares(_nll(out, batch) * out.logps_T.detach().exp(), batch)


def _nll(out: HeadOut, batch: SFTBatch) -> Tensor:
    """Return each token's weighted negative log-likelihood, [T], in nats; 0 where none trains."""
    return torch.where(batch.weights_T > 0, -out.logps_T * batch.weights_T, 0.0)


def _shares(loss_T: Tensor, batch: SFTBatch) -> LossOutput:
    return LossOutput(loss_T.sum(), batch.count_T.sum(), _by_channel(loss_T.detach(), batch))


def _by_channel(loss_T: Tensor, batch: SFTBatch) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the sum and the count of each channel, also of those that have no token here."""
    if batch.channel_T is None:
        return {}
    ids_C = torch.arange(1, len(batch.channels) + 1, device=loss_T.device)
    has_CT = batch.channel_T == ids_C.unsqueeze(1)
    sums_C, counts_C = (
        (has_CT * x_T).sum(1, dtype=torch.float64) for x_T in (loss_T, batch.count_T)
    )
    return {f"loss/{n}": (sums_C[i], counts_C[i]) for i, n in enumerate(batch.channels)}
