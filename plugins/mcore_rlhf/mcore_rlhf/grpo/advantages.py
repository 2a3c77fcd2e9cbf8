"""From rewards to advantages.

Shapes: N completions, G of them for each prompt and side by side; F reward functions. Everything is
float64. NaN in a reward means that it does not apply, or that its function failed.
"""

import numpy as np
from numpy.typing import NDArray

from mcore_rlhf.grpo.config import Estimator, Scale

type Floats = NDArray[np.float64]

EPSILON = 1e-4
"""Added to a standard deviation before dividing by it, as TRL does."""
GDPO_EPSILON = 1e-8


def weighted(rewards_NF: Floats, weights_F: Floats) -> Floats:
    """Return the weighted sum of what applies, its weights renormalized, [N].

    The weights of the functions that apply to a completion are scaled so that their absolute values
    add up as those of all functions do. NaN where nothing applies.
    """
    applies_NF = ~np.isnan(rewards_NF)
    share_N = applies_NF @ np.abs(weights_F)
    total = np.abs(weights_F).sum()
    scale_N = np.divide(total, share_N, out=np.zeros_like(share_N), where=share_N > 0)
    summed_N: Floats = (np.where(applies_NF, rewards_NF, 0.0) @ weights_F) * scale_N
    return np.where(applies_NF.any(1), summed_N, np.nan)


def group_std(rewards_N: Floats, group: int) -> Floats:
    """Return the unbiased standard deviation of each prompt's completions, [N / G].

    0 for a group of one, for equal rewards (exactly), and where fewer than two have a reward.
    """
    return _std(rewards_N.reshape(-1, group))


def _std(values_PG: Floats) -> Floats:
    """Return the unbiased standard deviation of each row, NaN left out."""
    counts_P = (~np.isnan(values_PG)).sum(1)
    deviations_PG = _centred(values_PG)
    squares_P = np.nansum(deviations_PG**2, axis=1)
    spread_P: Floats = np.sqrt(squares_P / np.maximum(counts_P - 1, 1))
    return spread_P


def _centred(values_PG: Floats) -> Floats:
    """Return values less their row's mean; exactly 0 where a row's values are equal."""
    counts_P1 = np.maximum((~np.isnan(values_PG)).sum(1, keepdims=True), 1)
    mean_P1 = np.nansum(values_PG, axis=1, keepdims=True) / counts_P1
    low_P1 = np.where(np.isnan(values_PG), np.inf, values_PG).min(1, keepdims=True)
    high_P1 = np.where(np.isnan(values_PG), -np.inf, values_PG).max(1, keepdims=True)
    equal_P1 = low_P1 == high_P1
    return np.where(equal_P1 & ~np.isnan(values_PG), 0.0, values_PG - mean_P1)


def advantages(
    rewards_N: Floats, group: int, *, estimator: Estimator = "grpo", scale: Scale = "group"
) -> Floats:
    """Return the advantage of each completion, [N].

    grpo: reward less the group's mean (DeepSeekMath, arXiv 2402.03300). rloo: reward less the mean
    of the group's others (arXiv 2402.14740). reinforce_plus_plus: reward less the group's mean, to
    be scaled over the batch (arXiv 2501.03262).

    Args:
        rewards_N: Total rewards; NaN for a completion that nothing could score, whose advantage is
            0 and which no baseline counts.
        group: Completions for each prompt, G. A group of one has advantage 0.
        estimator: The baseline.
        scale: What the result is divided by: the standard deviation of the group's rewards, of the
            batch's rewards (reinforce_plus_plus: of the advantages), or nothing.
    """
    rewards_PG = rewards_N.reshape(-1, group)
    centred_PG = _centred(rewards_PG)
    if estimator == "rloo":
        counts_P1 = (~np.isnan(rewards_PG)).sum(1, keepdims=True)
        centred_PG = centred_PG * counts_P1 / np.maximum(counts_P1 - 1, 1)
    base_PG = centred_PG if estimator == "reinforce_plus_plus" else rewards_PG
    match scale:
        case "group":
            scaled_PG = centred_PG / (_std(base_PG)[:, None] + EPSILON)
        case "batch":
            scaled_PG = centred_PG / (_std(base_PG.reshape(1, -1)) + EPSILON)
        case "none":
            scaled_PG = centred_PG
        case "gdpo":
            raise ValueError("gdpo scales each reward function by itself: use gdpo_advantages")
    found_N: Floats = np.nan_to_num(scaled_PG.reshape(-1), nan=0.0)
    return found_N


def gdpo_advantages(
    rewards_NF: Floats, weights_F: Floats, group: int, *, epsilon: float = GDPO_EPSILON
) -> Floats:
    """Normalize each reward function within its group, add them up, whiten over the batch, [N].

    GDPO (arXiv 2601.05242): a reward with a large spread does not drown the others.
    """
    normalized_NF = np.empty_like(rewards_NF)
    for f in range(rewards_NF.shape[1]):
        values_PG = rewards_NF[:, f].reshape(-1, group)
        scaled_PG = _centred(values_PG) / (_std(values_PG)[:, None] + epsilon)
        normalized_NF[:, f] = scaled_PG.reshape(-1)
    summed_1N = weighted(normalized_NF, weights_F)[None]
    whitened_N = (_centred(summed_1N) / (_std(summed_1N) + epsilon))[0]
    found_N: Floats = np.nan_to_num(whitened_N, nan=0.0)
    return found_N


def with_kl(rewards_N: Floats, kl_N: Floats, beta: float) -> Floats:
    """Return rewards less beta times each completion's KL, a sum of (old - ref) over its tokens."""
    less_N: Floats = rewards_N - beta * kl_N
    return less_N
