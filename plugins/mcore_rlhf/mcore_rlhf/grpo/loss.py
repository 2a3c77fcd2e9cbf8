"""The losses of the GRPO family: the policy term of each token, and the KL to a reference.

Every one is a sum over tokens of `share_T * (policy_T * term + beta * kl)`; they differ in the term
and in what they count (`mcore_rlhf.grpo.batch.shares`).

Shapes: T tokens, S sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mcore_core.protocols import HeadOut, LossOutput, Reduce
from mcore_rlhf.grpo.batch import Divisor, GRPOBatch

type Level = Literal["token", "sequence", "sequence_token"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """The numbers in the losses; their options have the same names."""

    epsilon: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    cispo_max_ratio: float = 5.0
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    beta: float = 0.0
    """0 also where the KL is in the reward."""
    level: Level = "token"
    off_policy_sequence_mask_delta: float | None = None

    @property
    def token_local(self) -> bool:
        """Whether a token's loss needs nothing of its sequence."""
        return self.level == "token" and self.off_policy_sequence_mask_delta is None


type Term = Callable[[Tensor, Tensor, Tensor, Constants], Tensor]
"""Ratio, advantage and log-probability of each token -> its policy term, all [T]."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss of the family."""

    term: Term
    divisor: Divisor
    clips: bool = True
    """Whether the term is clipped at epsilon, and the share of clipped tokens means something."""


def clipped(ratio_T: Tensor, advantages_T: Tensor, _: Tensor, c: Constants) -> Tensor:
    """Return -min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A): PPO's surrogate.

    delta (arXiv 2505.07291) bounds the unclipped branch only.
    """
    bounded_T = ratio_T if c.delta is None else ratio_T.clamp(max=c.delta)
    inside_T = ratio_T.clamp(1 - c.epsilon, 1 + c.epsilon_high)
    return -torch.minimum(bounded_T * advantages_T, inside_T * advantages_T)


def truncated(ratio_T: Tensor, advantages_T: Tensor, logps_T: Tensor, c: Constants) -> Tensor:
    """Return -stopgrad(min(r, bound)) A logp: CISPO (arXiv 2506.13585)."""
    return -ratio_T.clamp(max=c.cispo_max_ratio).detach() * advantages_T * logps_T


def soft_gated(ratio_T: Tensor, advantages_T: Tensor, _: Tensor, c: Constants) -> Tensor:
    """Return -A sigmoid(tau (r - 1)) 4 / tau: SAPO (arXiv 2511.20347)."""
    tau_T = torch.where(advantages_T > 0, c.tau_pos, c.tau_neg)
    return -torch.sigmoid(tau_T * (ratio_T - 1)) * 4 / tau_T * advantages_T


grpo = Objective(clipped, "sequences")
bnpo = Objective(clipped, "micro_batches")
dr_grpo = Objective(clipped, "length")
dapo = Objective(clipped, "tokens")
cispo = Objective(truncated, "tokens", clips=False)
sapo = Objective(soft_gated, "sequences", clips=False)


def k3(logps_T: Tensor, ref_T: Tensor) -> Tensor:
    """Return exp(ref - logp) - (ref - logp) - 1: an estimate of the KL that is never negative."""
    difference_T = ref_T - logps_T
    return difference_T.exp() - difference_T - 1


def log_ratio(
    logps_T: Tensor, old_T: Tensor, mask_T: Tensor, reduce: Reduce, level: Level
) -> Tensor:
    """Return the logarithm of the importance ratio of each token, [T].

    sequence: the mean over the sequence (GSPO, arXiv 2507.18071), the same for its tokens.
    sequence_token: that value, with the gradient of the token itself.
    """
    token_T = logps_T - old_T
    if level == "token":
        return token_T
    tokens_S = reduce.per_seq(mask_T).clamp(min=1)
    sequence_T = (reduce.per_seq(token_T * mask_T) / tokens_S)[reduce.seq_T]
    if level == "sequence":
        return sequence_T
    return sequence_T.detach() + logps_T - logps_T.detach()


def policy_loss(
    out: HeadOut, batch: GRPOBatch, reduce: Reduce, objective: Objective, c: Constants
) -> LossOutput:
    """Return this rank's share of the loss of a micro-batch.

    `total` is the sum over tokens, `count` what the kernel divides it by.
    """
    mask_T = (batch.weights_T > 0).float()
    live_T = batch.share_T > 0
    logps_T = torch.where(mask_T > 0, out.logps_T, 0.0)
    old_T = logps_T.detach() if batch.old_T is None else batch.old_T
    ratio_T = log_ratio(logps_T, old_T, mask_T, reduce, c.level).exp()
    loss_T = objective.term(ratio_T, batch.advantages_T, logps_T, c) * batch.policy_T
    metrics: dict[str, tuple[Tensor, Tensor]] = {}
    if c.off_policy_sequence_mask_delta is not None:
        keeps_T = on_policy(logps_T, batch, mask_T, reduce, c.off_policy_sequence_mask_delta)
        loss_T = loss_T * keeps_T
        metrics["off_policy_masked"] = _mean(1 - keeps_T, live_T)
    if c.beta:
        kl_T = k3(logps_T, logps_T.detach() if batch.ref_T is None else batch.ref_T)
        loss_T = loss_T + c.beta * kl_T
        metrics["kl"] = _mean(kl_T, live_T)
    if out.entropy_T is not None:
        metrics["entropy"] = _mean(out.entropy_T, live_T)
    metrics |= _clipping(ratio_T.detach(), batch, live_T, objective, c)
    total = torch.where(live_T, loss_T * batch.share_T, 0.0).sum()
    return LossOutput(total, batch.count_T.sum(), metrics)


def on_policy(
    logps_T: Tensor, batch: GRPOBatch, mask_T: Tensor, reduce: Reduce, delta: float
) -> Tensor:
    """Return 0 on sequences with A < 0 whose mean of (rollout - logp) exceeds delta, else 1, [T].

    From DeepSeek-V3.2 (arXiv 2512.02556).
    """
    drift_T = torch.where(mask_T > 0, batch.rollout_T - logps_T.detach(), 0.0).nan_to_num(nan=0.0)
    mean_S = reduce.per_seq(drift_T) / reduce.per_seq(mask_T).clamp(min=1)
    return ((batch.advantages_T >= 0) | (mean_S <= delta)[reduce.seq_T]).float()


def _clipping(
    ratio_T: Tensor, batch: GRPOBatch, live_T: Tensor, objective: Objective, c: Constants
) -> dict[str, tuple[Tensor, Tensor]]:
    advantages_T = batch.advantages_T
    if not objective.clips:
        over_T = (ratio_T > c.cispo_max_ratio) & (advantages_T > 0)
        return {"cispo_clip_ratio": _mean(over_T, live_T)} if objective.term is truncated else {}
    low_T = (ratio_T < 1 - c.epsilon) & (advantages_T < 0)
    high_T = (ratio_T > 1 + c.epsilon_high) & (advantages_T > 0)
    return {
        "clip_ratio/low_mean": _mean(low_T, live_T),
        "clip_ratio/high_mean": _mean(high_T, live_T),
        "clip_ratio/region_mean": _mean(low_T | high_T, live_T),
    }


def _mean(values_T: Tensor, live_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum over live tokens, and their number."""
    return torch.where(live_T, values_T.detach().float(), 0.0).sum(), live_T.float().sum()
