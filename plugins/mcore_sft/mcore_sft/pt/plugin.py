"""The `pt` plugin."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from mcore_core import Component, Plugin, hookimpl
from mcore_core.config.compose import RunConfig
from mcore_core.config.group import ConfigGroup
from mcore_core.protocols import Recipe
from mcore_sft.config import SFTConfig


class PTPlugin(Plugin):
    """Pre-training on plain text: the machinery of sft, with every token trained."""

    summary: ClassVar[str] = "pre-training, from the start or continued, on plain text"
    defaults: ClassVar[Mapping[str, Any]] = {
        "calculate_per_token_loss": True,
        "loss_scale": "all",
        "truncation_strategy": "split",
        "use_chat_template": False,
    }
    refuses: ClassVar[Mapping[str, str]] = {
        "loss_scale": "every token of a text trains",
        "use_chat_template": "texts are taken as they are, messages are joined without a template; "
        "the plugin sft trains on conversations",
    }

    @hookimpl
    def mcore_config_groups(self) -> Iterable[type[ConfigGroup]]:
        """Return the options that sft has too."""
        return [SFTConfig]

    @hookimpl
    def mcore_recipe(self, config: RunConfig) -> Component[Recipe[Any]] | None:
        """Return the recipe."""
        return Component("pt", "mcore_sft.pt.recipe:PTRecipe")
