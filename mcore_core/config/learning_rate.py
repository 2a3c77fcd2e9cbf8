"""The learning rate over the run."""

from typing import ClassVar, Literal

from pydantic import Field

from mcore_core.config.group import ConfigGroup

LARGEST_LR = 1e6
"""Far above what trains, and such that updates still are numbers of single precision."""


class LearningRateConfig(ConfigGroup):
    """The learning rate over the run."""

    title: ClassVar[str] = "Learning Rate"
    training: ClassVar[bool] = True

    lr: float | None = Field(None, gt=0, le=LARGEST_LR)
    """Peak learning rate. none: 1e-5 when all weights train, 1e-4 for LoRA."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from lr to min_lr after the warm-up."""
    lr_decay_iters: int | None = Field(None, ge=1)
    """Steps until min_lr is reached. none: the whole run."""
    lr_warmup_iters: int = Field(0, ge=0)
    """Steps over which the learning rate rises from 0 to lr. Give this or lr_warmup_fraction."""
    lr_warmup_fraction: float | None = Field(None, ge=0, le=1)
    """Part of lr_decay_iters used for the warm-up, 0 to 1."""
    min_lr: float = Field(0, ge=0, le=LARGEST_LR)
    """Learning rate at the end of the decay."""
