"""Options of supervised fine-tuning alone; the kernel's groups have the others."""

from typing import ClassVar

from mcore_core.config.group import ConfigGroup


class SFTConfig(ConfigGroup):
    """Supervised fine-tuning. What trains is chosen by loss_scale, of the kernel's templates."""

    title: ClassVar[str] = "SFT"
