"""Options of reward models."""

from typing import ClassVar

from pydantic import Field

from mcore_core.config.group import ConfigGroup


class RMConfig(ConfigGroup):
    """Reward models."""

    title: ClassVar[str] = "RM"

    center_rewards_coefficient: float | None = Field(None, ge=0)
    """Weight of the mean of (chosen + rejected)^2, which keeps scores around 0. none: not added."""
