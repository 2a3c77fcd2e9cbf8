"""The `sft` plugin."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from mcore_core import Component, Plugin, hookimpl
from mcore_core.config.compose import RunConfig
from mcore_core.config.group import ConfigGroup
from mcore_core.errors import Problem
from mcore_core.protocols import Recipe
from mcore_sft.config import SFTConfig
from mcore_sft.tasks import components, rules
from mcore_sft.tasks.config import EmbeddingConfig, RerankerConfig, TaskConfig


class SFTPlugin(Plugin):
    """Supervised fine-tuning."""

    summary: ClassVar[str] = "supervised fine-tuning on conversations and texts"
    defaults: ClassVar[Mapping[str, Any]] = {"calculate_per_token_loss": True}

    @hookimpl
    def mcore_config_groups(self) -> Iterable[type[ConfigGroup]]:
        """Return the SFT options."""
        return [SFTConfig, TaskConfig, EmbeddingConfig, RerankerConfig]

    @hookimpl
    def mcore_tasks(self) -> Iterable[Component[Any]]:
        """Return what a model may learn other than the next token."""
        return components.TASKS

    @hookimpl
    def mcore_losses(self) -> Iterable[Component[Any]]:
        """Return cross-entropy, and the losses of the tasks."""
        return [
            Component(
                "cross_entropy", "mcore_sft.loss:cross_entropy", "token cross-entropy", recipe="sft"
            ),
            *components.LOSSES,
        ]

    @hookimpl
    def mcore_validate_config(self, config: RunConfig) -> Iterable[Problem]:
        """Return contradictions between the task and other options."""
        return list(rules.check(config))

    @hookimpl
    def mcore_recipe(self, config: RunConfig) -> Component[Recipe[Any]] | None:
        """Return the recipe of the task."""
        task = config[TaskConfig].task_type
        if task == components.CAUSAL_LM:
            return Component("sft", "mcore_sft.recipe:SFTRecipe")
        return components.named(task)
