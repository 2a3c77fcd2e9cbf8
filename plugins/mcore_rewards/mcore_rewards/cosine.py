"""Accuracy by length: short right answers are worth most, short wrong ones least."""

import math
from collections.abc import Sequence

from mcore_core.config.compose import RunConfig
from mcore_core.protocols import Rollout
from mcore_rewards.accuracy import Accuracy
from mcore_rewards.config import RewardsConfig


class Cosine:
    """Half a cosine from the value at no length to that at cosine_max_len (arXiv 2502.03373)."""

    each = True

    def __init__(self, config: RunConfig) -> None:
        self._options = config[RewardsConfig]
        self._longest = self._options.cosine_max_len or config.get("max_completion_length")
        self._accuracy = Accuracy(config)

    def __call__(self, rollouts: Sequence[Rollout], /) -> list[float | None]:
        """Return the rewards; None where accuracy does not apply."""
        found = self._accuracy(list(rollouts))
        return [
            None if right is None else self._value(len(rollout.token_ids), right=right > 0)
            for rollout, right in zip(rollouts, found, strict=True)
        ]

    def _value(self, length: int, *, right: bool) -> float:
        options = self._options
        if right:
            start, end = options.cosine_min_len_value_correct, options.cosine_max_len_value_correct
        else:
            start, end = options.cosine_min_len_value_wrong, options.cosine_max_len_value_wrong
        part = min(1.0, length / self._longest)
        return end + (start - end) * (1 + math.cos(part * math.pi)) / 2
