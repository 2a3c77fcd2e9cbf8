"""Options of the rewards here."""

from typing import ClassVar

from pydantic import Field

from mcore_core.config.group import ConfigGroup


class RewardsConfig(ConfigGroup):
    """Constants of cosine, repetition and soft_overlong."""

    title: ClassVar[str] = "Rewards"
    training: ClassVar[bool] = True

    cosine_min_len_value_wrong: float = -0.5
    """cosine: reward of a wrong completion of no length."""
    cosine_max_len_value_wrong: float = 0.0
    """cosine: reward of a wrong completion of cosine_max_len tokens or more."""
    cosine_min_len_value_correct: float = 1.0
    """cosine: reward of a right completion of no length."""
    cosine_max_len_value_correct: float = 0.5
    """cosine: reward of a right completion of cosine_max_len tokens or more."""
    cosine_max_len: int | None = Field(None, ge=1)
    """cosine: tokens at which the reward stops changing. none: max_completion_length."""
    repetition_n_grams: int = Field(3, ge=1)
    """repetition: tokens of the sequences whose repetitions are counted."""
    repetition_max_penalty: float = Field(-1.0, le=0)
    """repetition: reward of a completion that only repeats itself."""
    soft_max_length: int | None = Field(None, ge=1)
    """soft_overlong: tokens at which the reward is -1. none: max_completion_length."""
    soft_cache_length: int | None = Field(None, ge=1)
    """soft_overlong: over how many tokens before that the reward falls from 0. Required by it."""
