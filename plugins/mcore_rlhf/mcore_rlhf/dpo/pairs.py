"""Pairs of answers as the losses see them: sums of log-probabilities over each answer.

P pairs.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from mcore_core.protocols import Reduce
from mcore_rlhf.dpo.config import DPOConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """P pairs. Log-probabilities are in nats, summed over an answer's tokens."""

    chosen_P: Tensor
    """Under the policy; has a gradient, as rejected_P."""
    rejected_P: Tensor
    ref_chosen_P: Tensor
    """Under the reference; 0 where the loss has none."""
    ref_rejected_P: Tensor
    chosen_tokens_P: Tensor
    """Tokens of the answer, at least 1."""
    rejected_tokens_P: Tensor
    nll_scale_P: Tensor
    """Turns the mean over pairs of -chosen_P into the mean over the tokens of all chosen answers
    of the global batch: its pairs by its chosen tokens."""
    delta: Tensor
    """Running mean of the rewards, a scalar without gradient (BCO)."""

    @property
    def chosen_ratio_P(self) -> Tensor:
        """Policy minus reference, of the chosen answers."""
        return self.chosen_P - self.ref_chosen_P

    @property
    def rejected_ratio_P(self) -> Tensor:
        """Policy minus reference, of the rejected answers."""
        return self.rejected_P - self.ref_rejected_P

    def scores(self, options: DPOConfig) -> tuple[Tensor, Tensor]:
        """Return f'(u) of u = policy / reference for chosen and rejected answers, both [P].

        Their difference is the z of the losses; constants that cancel in it are kept as TRL has
        them. f is the divergence of Wang et al. 2023 (Beyond Reverse KL), table 1.
        """
        ratios = self.chosen_ratio_P, self.rejected_ratio_P
        match options.f_divergence_type:
            case "reverse_kl":
                return ratios
            case "js_divergence":
                a, b = (math.log(2) + F.logsigmoid(r) for r in ratios)
                return a, b
            case "forward_kl" | "alpha_divergence":  # (1 - u^-a) / a with a = 1
                top = math.log(torch.finfo(ratios[0].dtype).max) - 1
                a, b = (1 - torch.exp((-r).clamp(max=top)) for r in ratios)
                return a, b
            case _:
                assert_never(options.f_divergence_type)

    def gathered(self, reduce: Reduce) -> "Pairs":
        """Return the pairs of all data-parallel ranks' micro-batch; collective."""
        names = [field.name for field in fields(self) if field.name.endswith("_P")]
        rows_PN = torch.stack([getattr(self, name) for name in names], -1)
        columns = reduce.gather_seqs(rows_PN).unbind(-1)
        return replace(self, **dict(zip(names, columns, strict=True)))

    def with_delta(self, delta: Tensor) -> "Pairs":
        """Return the pairs with another running mean."""
        return replace(self, delta=delta)
