"""Options of supervised fine-tuning and pre-training; the kernel's groups have the others."""

from typing import ClassVar

from mcore_core.config.group import ConfigGroup


class SFTConfig(ConfigGroup):
    """What the loss of sft and pt is. What trains is chosen by loss_scale, of the templates."""

    title: ClassVar[str] = "SFT"

    enable_dft_loss: bool = False
    """Dynamic fine-tuning: multiply each token's loss by the probability that the model gives the
    token, so that what it finds unlikely pulls less."""
    enable_channel_loss: bool = False
    """Report the loss of each channel, loss/NAME, beside the loss of all: the rows' column
    `channel` names it."""
