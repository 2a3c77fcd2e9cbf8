"""Correct for completions that were sampled by other weights, or by another program, than train.

w = exp(old - rollout): what the training code says under the policy that starts the step, over what
the engine said when it sampled the token. L tokens of a completion, N completions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

type Floats = NDArray[np.floating]
type Mode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

LARGEST_LOG = 20.0


def log_weights(old_L: Floats, rollout_L: Floats) -> NDArray[np.float64]:
    """Return old - rollout in float64, at most 20 either way; 0 where the engine gave no number."""
    difference_L = np.asarray(old_L, np.float64) - np.asarray(rollout_L, np.float64)
    return np.clip(np.nan_to_num(difference_L, nan=0.0), -LARGEST_LOG, LARGEST_LOG)


def importance(
    old_L: Floats, rollout_L: Floats, trains_L: NDArray[np.bool_], *, mode: Mode, threshold: float
) -> NDArray[np.float32]:
    """Return what the policy term of each token is multiplied by, [L]; 1 where nothing trains.

    token_truncate: min(w, C). token_mask: w where w <= C, else 0. sequence_truncate: the geometric
    mean of w over what trains, at most C. sequence_mask: w where that mean is at most C, else 0.
    """
    logs_L = np.where(trains_L, log_weights(old_L, rollout_L), 0.0)
    weights_L = np.exp(logs_L)
    mean = float(np.exp(logs_L.sum() / max(1, int(trains_L.sum()))))
    match mode:
        case "token_truncate":
            found_L = np.minimum(weights_L, threshold)
        case "token_mask":
            found_L = np.where(weights_L <= threshold, weights_L, 0.0)
        case "sequence_truncate":
            found_L = np.full_like(weights_L, min(mean, threshold))
        case "sequence_mask":
            found_L = weights_L if mean <= threshold else np.zeros_like(weights_L)
    return np.where(trains_L, found_L, 1.0).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the diagnostics need of one completion; arrays hold what trains only."""

    old: Floats
    rollout: Floats


def diagnostics(completions: Sequence[Sampled], threshold: float) -> dict[str, float]:
    """Return how far the engine's distribution is from that of the training code.

    Means over tokens, except where a name says sequences (`seq_`): kl is E[rollout - old], k3 its
    low-variance estimate; ppl are exp of the mean negative log-likelihood of a completion, averaged
    over completions; chi2 is E[w^2] - 1; is_ where w, clipped is the share above the threshold, ess
    the effective share of samples.
    """
    logs = [log_weights(c.old, c.rollout) for c in completions if len(c.old)]
    if not logs:
        return {}
    log = np.concatenate(logs)
    weight = np.exp(log)
    means = np.array([x.mean() for x in logs])
    old_nll = np.array([-np.mean(c.old, dtype=np.float64) for c in completions if len(c.old)])
    rollout_nll = np.array(
        [-np.nanmean(np.asarray(c.rollout, np.float64)) for c in completions if len(c.old)]
    )
    return {
        "rollout/kl": float(-log.mean()),
        "rollout/k3_kl": float((weight - log - 1).mean()),
        "rollout/abs_diff_mean": float(np.abs(log).mean()),
        "rollout/abs_diff_max": float(np.abs(log).max()),
        "rollout/training_ppl": float(np.exp(old_nll).mean()),
        "rollout/rollout_ppl": float(np.exp(rollout_nll).mean()),
        "rollout/log_ppl_diff": float((rollout_nll - old_nll).mean()),
        "rollout/chi2_token": float((weight**2).mean() - 1),
        "rollout/chi2_seq": float(np.exp(2 * means).mean() - 1),
        "rollout/is_mean": float(weight.mean()),
        "rollout/is_max": float(weight.max()),
        "rollout/is_min": float(weight.min()),
        "rollout/is_clipped": float((weight > threshold).mean()),
        "rollout/is_seq_clipped": float((np.exp(means) > threshold).mean()),
        "rollout/ess": float(weight.mean() ** 2 / (weight**2).mean()),
    }
