"""Rewards of a completion's form: tags, repetition, length."""

import re
from collections.abc import Sequence

from mcore_core.config.compose import RunConfig
from mcore_core.protocols import Rollout
from mcore_rewards.config import RewardsConfig

TAGS = re.compile(
    r"\s*<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>\s*", re.DOTALL
)


def think_answer(rollouts: Sequence[Rollout], /) -> list[float]:
    """Return 1 where the whole text is <think>...</think><answer>...</answer>, else 0."""
    return [float(bool(TAGS.fullmatch(rollout.text))) for rollout in rollouts]


class Repetition:
    """(1 - unique / all n-grams of tokens) times repetition_max_penalty (arXiv 2502.03373)."""

    def __init__(self, config: RunConfig) -> None:
        options = config[RewardsConfig]
        self.n, self.penalty = options.repetition_n_grams, options.repetition_max_penalty

    def __call__(self, rollouts: Sequence[Rollout], /) -> list[float]:
        """Return the penalties; 0 for less than n tokens."""
        return [self._score(rollout.token_ids) for rollout in rollouts]

    def _score(self, ids: Sequence[int]) -> float:
        if len(ids) < self.n:
            return 0.0
        grams = list(zip(*(ids[i:] for i in range(self.n)), strict=False))
        repeated = 1 - len(set(grams)) / len(grams)
        return repeated * self.penalty if repeated else 0.0


class SoftOverlong:
    """min(0, -(length - (limit - cache)) / cache) in tokens (DAPO, arXiv 2503.14476)."""

    def __init__(self, config: RunConfig) -> None:
        options = config[RewardsConfig]
        self.limit = options.soft_max_length or config.get("max_completion_length")
        assert options.soft_cache_length is not None, "checked with the options"
        self.cache = options.soft_cache_length

    def __call__(self, rollouts: Sequence[Rollout], /) -> list[float]:
        """Return the penalties."""
        start = self.limit - self.cache
        return [min(0.0, -(len(r.token_ids) - start) / self.cache) for r in rollouts]
