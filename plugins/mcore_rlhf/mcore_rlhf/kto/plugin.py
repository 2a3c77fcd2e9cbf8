"""The `kto` plugin."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from mcore_core import Component, Plugin, hookimpl
from mcore_core.config.compose import RunConfig
from mcore_core.config.group import ConfigGroup
from mcore_core.errors import Problem
from mcore_core.protocols import Recipe
from mcore_rlhf.config import ReferenceConfig, RLHFConfig
from mcore_rlhf.kto.config import KTOConfig
from mcore_rlhf.rules import check_method, check_reference


class KTOPlugin(Plugin):
    """Preference optimization from single answers."""

    summary: ClassVar[str] = "preference optimization from single answers, good or bad"
    defaults: ClassVar[Mapping[str, Any]] = {
        "loss_scale": "last_round",
        "calculate_per_token_loss": False,
    }
    refuses: ClassVar[Mapping[str, str]] = {
        "calculate_per_token_loss": "its losses are over answers, not tokens",
    }

    @hookimpl
    def mcore_config_groups(self) -> Iterable[type[ConfigGroup]]:
        """Return the options."""
        return [RLHFConfig, KTOConfig, ReferenceConfig]

    @hookimpl
    def mcore_validate_config(self, config: RunConfig) -> Iterable[Problem]:
        """Return contradictions."""
        return list(_check(config))

    @hookimpl
    def mcore_recipe(self, config: RunConfig) -> Component[Recipe[Any]] | None:
        """Return the recipe."""
        return Component("kto", "mcore_rlhf.kto.recipe:KTORecipe")


def _check(config: RunConfig) -> Iterator[Problem]:
    options = config[KTOConfig]
    yield from check_method(config, "kto")
    yield from check_reference(config, used=True)
    alone = config.get("global_batch_size") == 1 and not config.get("packing")
    if alone and options.loss_type == "kto":
        yield Problem(
            "MC332",
            "a global batch of one answer: kto compares each prompt with the answer to another",
            ["fix: --global_batch_size 2 or more, or --loss_type apo_zero_unpaired"],
        )
    if options.desirable_weight == options.undesirable_weight == 0:
        yield Problem(
            "MC320",
            "--desirable_weight 0 and --undesirable_weight 0 leave nothing to train on",
            ["fix: give one of them another value"],
        )
