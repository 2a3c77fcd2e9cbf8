"""Options of KTO."""

from typing import ClassVar, Literal

from pydantic import Field

from mcore_core.config.group import ConfigGroup


class KTOConfig(ConfigGroup):
    """Preference optimization from single answers."""

    title: ClassVar[str] = "KTO"

    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """The loss: kto, or apo_zero_unpaired, which needs no estimate of the divergence."""
    beta: float = Field(0.1, gt=0)
    """How strongly the policy is held to the reference."""
    desirable_weight: float = Field(1.0, ge=0)
    """Weight of the losses of good answers. Together with undesirable_weight it should make up for
    a class that is rarer."""
    undesirable_weight: float = Field(1.0, ge=0)
    """Weight of the losses of bad answers."""
