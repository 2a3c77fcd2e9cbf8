"""The losses of single answers: pure functions of summed log-probabilities, one value an answer.

S answers, D policy minus reference, b beta, s the logistic function, k the estimate of the
divergence.
"""

from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from mcore_rlhf.kto.config import KTOConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """S answers."""

    ratio_S: Tensor
    """Policy minus reference, nats, summed over the answer's tokens; has a gradient."""
    good_S: Tensor
    """True where the answer is desirable."""
    kl_S: Tensor
    """The estimate k of the global batch: at least 0, without gradient."""


def losses(answers: Answers, options: KTOConfig) -> Tensor:
    """Return the weighted loss of each answer, [S].

    kto (Ethayarajh et al. 2024, equation 7): 1 - s(b(D - k)) of good answers, 1 - s(b(k - D)) of
    bad ones. apo_zero_unpaired (D'Oosterlinck et al. 2024): 1 - s(bD) and s(bD).
    """
    ratio_S, good_S, beta = answers.ratio_S, answers.good_S, options.beta
    match options.loss_type:
        case "kto":
            good = 1 - torch.sigmoid(beta * (ratio_S - answers.kl_S))
            bad = 1 - torch.sigmoid(beta * (answers.kl_S - ratio_S))
        case "apo_zero_unpaired":
            good, bad = 1 - torch.sigmoid(beta * ratio_S), torch.sigmoid(beta * ratio_S)
        case _:
            assert_never(options.loss_type)
    return torch.where(good_S, options.desirable_weight * good, options.undesirable_weight * bad)
