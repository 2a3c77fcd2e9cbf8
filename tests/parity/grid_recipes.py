"""The training methods of the grid: how each is built, on which data, with which options."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gkd_case
import grpo_case
import preference_case
import sft_case
from mcore_sft.config import SFTConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class GridRecipe:
    """A training method in the grid."""

    build: Callable[..., Any]
    """Options of the run -> recipe."""
    steps: Callable[[], Any]
    """Units of each micro-batch of each global batch."""
    groups: tuple[type, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    steep: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options of some architectures: learning rates with which rounding grows less."""
    frozen: Mapping[str, Any] = field(default_factory=dict)
    engine: Callable[..., Any] | None = None
    relative: float = 1e-5
    absolute: float = 0.0
    """For metrics that are small differences of large sums, as rewards are."""


def preference(name: str, **steep: Mapping[str, Any]) -> GridRecipe:
    """Return dpo, kto or rm, with losses of every kind."""
    return GridRecipe(
        build=partial(preference_case.build, name),
        steps=partial(preference_case.data, name),
        groups=preference_case.GROUPS_OF[name],
        options=preference_case.OPTIONS[name],
        steep=steep,
        absolute=1e-6,
    )


GRPO = {**grpo_case.BASE, "num_iterations": 2, "lr": 0.02}
"""Two rounds of two steps: in the second step of each, ratios differ from 1."""
TEACHER = dataclasses.replace(
    sft_case.SHAPE, vocab_size=sft_case.VOCAB + 8, add_qkv_bias=True, hidden_size=16
)
RECIPES: dict[str, GridRecipe] = {
    "sft": GridRecipe(
        build=sft_case.recipe,
        steps=sft_case.data,
        groups=(SFTConfig,),
        steep={"gdn": {"lr": 0.005}},
    ),
    "dpo": preference("dpo"),
    "kto": preference("kto"),
    "rm": preference("rm", gdn={"lr": 0.003}),
    "grpo": GridRecipe(
        build=grpo_case.build,
        steps=partial(grpo_case.data, GRPO),
        groups=grpo_case.GROUPS,
        options=GRPO,
        engine=grpo_case.FixedEngine,
        absolute=1e-6,
    ),
    "gkd": GridRecipe(
        build=gkd_case.recipe,
        steps=gkd_case.data,
        groups=gkd_case.GROUPS,
        options=gkd_case.PLAIN,
        steep={"gdn": {"lr": 0.005}},
        frozen={"teacher": TEACHER},
    ),
}
