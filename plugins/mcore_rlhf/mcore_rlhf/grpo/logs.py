"""Numbers of a round of completions, under TRL's names. N completions."""

import numpy as np
from numpy.typing import NDArray

from mcore_rlhf.grpo.advantages import group_std
from mcore_rlhf.grpo.sample import Sampled

type Floats = NDArray[np.float64]


def describe(sampled: Sampled, rewards_N: Floats, step: int) -> dict[str, float]:
    """Return rewards, lengths, and how old the weights were that sampled the tokens."""
    logs = {
        "reward": _mean(rewards_N),
        "reward_std": _std(rewards_N),
        "frac_reward_zero_std": float((group_std(rewards_N, sampled.copies) == 0).mean()),
    }
    for f, name in enumerate(sampled.names):
        logs[f"rewards/{name}/mean"] = _mean(sampled.rewards_NF[:, f])
        logs[f"rewards/{name}/std"] = _std(sampled.rewards_NF[:, f])
    said = sampled.trajectories
    lengths = np.array([len(t.token_ids) for t in said], np.float64)
    ended = np.array([t.finished for t in said])
    logs |= {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(1 - ended.mean()),
    }
    if ended.any():
        logs["completions/mean_terminated_length"] = float(lengths[ended].mean())
    if any(t.turns > 1 for t in said):
        logs["completions/mean_turns"] = float(np.mean([t.turns for t in said]))
    ages = np.array([step - 1 - v for t in said for v in t.versions if v >= 0])
    if len(ages) and ages.any():
        logs["rollout/staleness_mean"] = float(ages.mean())
        logs["rollout/staleness_max"] = float(ages.max())
    return logs


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _std(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else 0.0
