"""The `dpo` plugin."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from mcore_core import Component, Plugin, hookimpl
from mcore_core.config.compose import RunConfig
from mcore_core.config.group import ConfigGroup
from mcore_core.errors import Problem
from mcore_core.protocols import Recipe
from mcore_rlhf.config import ReferenceConfig, RLHFConfig
from mcore_rlhf.dpo.config import DPOConfig
from mcore_rlhf.dpo.rules import check

SUMMARIES: Mapping[str, str] = {
    "sigmoid": "DPO; with label_smoothing conservative DPO",
    "robust": "DPO that is unbiased under a share of flipped pairs",
    "hinge": "SLiC",
    "ipo": "IPO, on means per token",
    "exo_pair": "EXO",
    "nca_pair": "NCA",
    "bco_pair": "BCO, with a running mean of the rewards",
    "sppo_hard": "SPPO with hard labels",
    "aot": "alignment by optimal transport, sorted margins",
    "aot_unpaired": "the same for answers that need not be pairs",
    "apo_zero": "APO: chosen answers become likelier, rejected ones less likely",
    "apo_down": "APO: both become less likely, rejected ones more so",
    "discopop": "DiscoPOP",
    "sft": "negative log-likelihood of the chosen answers",
    "sigmoid_norm": "DPO on means per token",
    "cpo": "CPO: no reference, with the NLL of the chosen answers",
    "simpo": "SimPO: no reference, means per token, a margin",
    "orpo": "ORPO: NLL and odds ratio, no reference",
}


class DPOPlugin(Plugin):
    """Direct preference optimization."""

    summary: ClassVar[str] = "direct preference optimization, and its relatives by loss_type"
    defaults: ClassVar[Mapping[str, Any]] = {
        "loss_scale": "last_round",
        "calculate_per_token_loss": False,
    }
    refuses: ClassVar[Mapping[str, str]] = {
        "calculate_per_token_loss": "its losses are over pairs of answers, not tokens",
    }

    @hookimpl
    def mcore_config_groups(self) -> Iterable[type[ConfigGroup]]:
        """Return the options."""
        return [RLHFConfig, DPOConfig, ReferenceConfig]

    @hookimpl
    def mcore_losses(self) -> Iterable[Component[Any]]:
        """Return the losses over pairs."""
        return [
            Component(name, f"mcore_rlhf.dpo.loss:{name}", summary, recipe="dpo")
            for name, summary in SUMMARIES.items()
        ]

    @hookimpl
    def mcore_validate_config(self, config: RunConfig) -> Iterable[Problem]:
        """Return contradictions."""
        return list(check(config))

    @hookimpl
    def mcore_recipe(self, config: RunConfig) -> Component[Recipe[Any]] | None:
        """Return the recipe."""
        return Component("dpo", "mcore_rlhf.dpo.recipe:DPORecipe")
