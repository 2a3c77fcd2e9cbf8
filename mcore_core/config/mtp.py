"""Multi-token prediction."""

from typing import ClassVar

from pydantic import Field

from mcore_core.config.group import ConfigGroup


class MTPConfig(ConfigGroup):
    """Layers that learn to predict more than the next token."""

    title: ClassVar[str] = "MTP"

    mtp_num_layers: int | None = Field(None, ge=0)
    """Layers of multi-token prediction to train; the checkpoint must have them. 0 leaves them out.
    none: as many as the checkpoint has."""
    mtp_loss_scaling_factor: float = Field(0.1, ge=0)
    """Weight of their loss, a mean over the layers, beside the main loss."""
