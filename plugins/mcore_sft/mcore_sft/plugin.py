"""The `sft` plugin."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from mcore_core import Component, Plugin, hookimpl
from mcore_core.config.compose import RunConfig
from mcore_core.config.group import ConfigGroup
from mcore_core.protocols import LossFn, Recipe
from mcore_sft.config import SFTConfig


class SFTPlugin(Plugin):
    """Supervised fine-tuning."""

    summary: ClassVar[str] = "supervised fine-tuning on conversations and texts"
    defaults: ClassVar[Mapping[str, Any]] = {"calculate_per_token_loss": True}

    @hookimpl
    def mcore_config_groups(self) -> Iterable[type[ConfigGroup]]:
        """Return the SFT options."""
        return [SFTConfig]

    @hookimpl
    def mcore_losses(self) -> Iterable[Component[LossFn]]:
        """Return cross-entropy."""
        return [Component("cross_entropy", "mcore_sft.loss:cross_entropy", "token cross-entropy")]

    @hookimpl
    def mcore_recipe(self, config: RunConfig) -> Component[Recipe[Any]] | None:
        """Return the SFT recipe."""
        return Component("sft", "mcore_sft.recipe:SFTRecipe")
