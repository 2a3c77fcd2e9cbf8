"""The `rm` plugin."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from mcore_core import Component, Plugin, hookimpl
from mcore_core.config.compose import RunConfig
from mcore_core.config.group import ConfigGroup
from mcore_core.errors import Problem
from mcore_core.protocols import Recipe
from mcore_rlhf.config import RLHFConfig
from mcore_rlhf.rm.config import RMConfig
from mcore_rlhf.rules import check_method


class RMPlugin(Plugin):
    """Reward models."""

    summary: ClassVar[str] = "reward models: a score for an answer, learned from preferences"
    defaults: ClassVar[Mapping[str, Any]] = {
        "loss_scale": "last_round",
        "calculate_per_token_loss": False,
        "modules_to_save": ["score"],  # with LoRA the new head trains too
    }
    refuses: ClassVar[Mapping[str, str]] = {
        "calculate_per_token_loss": "its loss is over pairs of answers, not tokens",
    }

    @hookimpl
    def mcore_config_groups(self) -> Iterable[type[ConfigGroup]]:
        """Return the options."""
        return [RLHFConfig, RMConfig]

    @hookimpl
    def mcore_validate_config(self, config: RunConfig) -> Iterable[Problem]:
        """Return contradictions."""
        return list(check_method(config, "rm"))

    @hookimpl
    def mcore_recipe(self, config: RunConfig) -> Component[Recipe[Any]] | None:
        """Return the recipe."""
        return Component("rm", "mcore_rlhf.rm.recipe:RMRecipe")
