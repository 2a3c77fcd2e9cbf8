"""The `grpo` plugin."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from mcore_core import Component, Plugin, hookimpl
from mcore_core.config.compose import RunConfig
from mcore_core.config.group import ConfigGroup
from mcore_core.errors import Problem
from mcore_core.protocols import Recipe
from mcore_rlhf.config import ReferenceConfig, RLHFConfig
from mcore_rlhf.grpo.config import GRPOConfig
from mcore_rlhf.grpo.rules import check
from mcore_rlhf.rollout.config import GenerationConfig, RolloutConfig
from mcore_rlhf.rollout.native.config import NativeConfig

SUMMARIES: Mapping[str, str] = {
    "grpo": "clipped; a mean over completions of means over their tokens",
    "bnpo": "clipped; a mean over the tokens of each micro-batch",
    "dr_grpo": "clipped; divided by completions times max_completion_length",
    "dapo": "clipped; a mean over the tokens of the global batch",
    "cispo": "the ratio is cut off and not differentiated; a mean over tokens",
    "sapo": "the ratio passes a soft gate; means as grpo",
}


class GRPOPlugin(Plugin):
    """Group relative policy optimization."""

    summary: ClassVar[str] = "reinforcement learning with rewards: GRPO and its relatives"
    defaults: ClassVar[Mapping[str, Any]] = {
        "calculate_per_token_loss": False,
        "remove_unused_columns": False,
        "truncation_strategy": "left",
        "loss_scale": "last_round",
    }
    refuses: ClassVar[Mapping[str, str]] = {
        "calculate_per_token_loss": "loss_type says what is counted; dapo counts tokens",
        "packing": "the data are prompts; completions are always packed into rows",
        "packing_length": "the data are prompts; completions are always packed into rows",
        "loss_scale": "what the model wrote trains, and nothing else",
    }

    @hookimpl
    def mcore_config_groups(self) -> Iterable[type[ConfigGroup]]:
        """Return the options."""
        return [
            RLHFConfig,
            GRPOConfig,
            GenerationConfig,
            RolloutConfig,
            NativeConfig,
            ReferenceConfig,
        ]

    @hookimpl
    def mcore_losses(self) -> Iterable[Component[Any]]:
        """Return the losses of the family."""
        return [
            Component(name, f"mcore_rlhf.grpo.loss:{name}", summary)
            for name, summary in SUMMARIES.items()
        ]

    @hookimpl
    def mcore_validate_config(self, config: RunConfig) -> Iterable[Problem]:
        """Return contradictions."""
        return list(check(config))

    @hookimpl
    def mcore_recipe(self, config: RunConfig) -> Component[Recipe[Any]] | None:
        """Return the recipe."""
        return Component("grpo", "mcore_rlhf.grpo.recipe:GRPORecipe")
