"""Weight decay, gradient clipping and the optimizer's coefficients."""

from typing import ClassVar

from pydantic import Field

from mcore_core.config.group import ConfigGroup


class RegularizationConfig(ConfigGroup):
    """Weight decay, gradient clipping and the optimizer's coefficients."""

    title: ClassVar[str] = "Regularization"
    training: ClassVar[bool] = True

    weight_decay: float = Field(0.1, ge=0)
    """Part of each weight removed a step, times the learning rate; biases and norms are spared."""
    clip_grad: float = Field(1.0, ge=0)
    """Scale gradients down to this norm over all weights; 0: no clipping."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of Adam's mean of gradients, 0 to 1."""
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of Adam's mean of squared gradients, 0 to 1."""
    adam_eps: float = Field(1e-8, gt=0)
    """Added to Adam's denominator, so that tiny gradients do not blow up."""
    sgd_momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of sgd, 0 to 1."""
