"""The `gkd` plugin."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from mcore_core import Component, Plugin, hookimpl
from mcore_core.config.compose import RunConfig
from mcore_core.config.group import ConfigGroup
from mcore_core.errors import Problem
from mcore_core.protocols import Recipe
from mcore_rlhf.config import RLHFConfig
from mcore_rlhf.gkd.config import GKDConfig
from mcore_rlhf.gkd.rules import check
from mcore_rlhf.rollout.config import GenerationConfig, RolloutConfig
from mcore_rlhf.rollout.native.config import NativeConfig


class GKDPlugin(Plugin):
    """Generalized knowledge distillation."""

    summary: ClassVar[str] = "on-policy and off-policy distillation from a teacher"
    defaults: ClassVar[Mapping[str, Any]] = {
        "loss_scale": "last_round",
        "calculate_per_token_loss": True,
    }
    refuses: ClassVar[Mapping[str, str]] = {
        "calculate_per_token_loss": "the divergence is a mean over tokens",
        "packing": "answers are generated while training, so rows cannot be laid out beforehand",
        "packing_length": "answers are generated while training, so rows cannot be laid out before",
        "async_generate": "answers are generated for the step that trains on them",
        "max_staleness": "answers are generated for the step that trains on them",
        "partial_rollouts": "answers are generated for the step that trains on them",
        "multi_turn_scheduler": "the student answers once",
        "max_turns": "the student answers once",
        "vllm_server_pass_dataset": "rows are not kept beside their tokens",
    }

    @hookimpl
    def mcore_config_groups(self) -> Iterable[type[ConfigGroup]]:
        """Return the options."""
        return [RLHFConfig, GKDConfig, GenerationConfig, RolloutConfig, NativeConfig]

    @hookimpl
    def mcore_validate_config(self, config: RunConfig) -> Iterable[Problem]:
        """Return contradictions."""
        return list(check(config))

    @hookimpl
    def mcore_recipe(self, config: RunConfig) -> Component[Recipe[Any]] | None:
        """Return the recipe."""
        return Component("gkd", "mcore_rlhf.gkd.recipe:GKDRecipe")
