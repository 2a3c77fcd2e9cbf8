"""The `rewards` plugin."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from mcore_core import Component, Plugin, hookimpl
from mcore_core.config.compose import RunConfig
from mcore_core.config.group import ConfigGroup
from mcore_core.errors import Problem
from mcore_rewards.config import RewardsConfig

SUMMARIES: Mapping[str, tuple[str, str]] = {
    "accuracy": (
        "mcore_rewards.accuracy:Accuracy",
        "1 where the answer equals the row's `solution`, as mathematics",
    ),
    "format": (
        "mcore_rewards.form:think_answer",
        "1 for <think>...</think><answer>...</answer>",
    ),
    "cosine": (
        "mcore_rewards.cosine:Cosine",
        "accuracy, worth more for short right and long wrong answers",
    ),
    "repetition": ("mcore_rewards.form:Repetition", "a penalty for repeated n-grams of tokens"),
    "soft_overlong": (
        "mcore_rewards.form:SoftOverlong",
        "a penalty that grows as the length nears its limit",
    ),
    "reasoning_gym": (
        "mcore_rewards.gym:score",
        "the score of a reasoning-gym task, for rows of reasoning_gym://",
    ),
    "reward_model": (
        "mcore_rewards.model:RewardModel",
        "the score of a sequence-classification model: --reward_model DIR",
    ),
}


class RewardsPlugin(Plugin):
    """Rewards that can be checked by a program, and reasoning-gym's tasks."""

    role: ClassVar = "support"
    summary: ClassVar[str] = "rewards for grpo: accuracy, format, length, repetition, reasoning-gym"

    @hookimpl
    def mcore_config_groups(self) -> Iterable[type[ConfigGroup]]:
        """Return the options."""
        return [RewardsConfig]

    @hookimpl
    def mcore_rewards(self) -> Iterable[Component[Any]]:
        """Return the rewards."""
        return [Component(name, target, text) for name, (target, text) in SUMMARIES.items()]

    @hookimpl
    def mcore_datasets(self) -> Iterable[Component[Any]]:
        """Return reasoning-gym as a dataset."""
        return [
            Component(
                "reasoning_gym",
                "mcore_rewards.gym:rows",
                "generated tasks: reasoning_gym://TASK?size=1000&seed=1",
            )
        ]

    @hookimpl
    def mcore_validate_config(self, config: RunConfig) -> Iterable[Problem]:
        """Return options that lack what they need, or that no reward reads."""
        if "reward_funcs" not in config.names:
            return [
                Problem(
                    "MC321",
                    f"--{name} does nothing: no recipe here has rewards",
                    [f"fix: leave out --{name}"],
                )
                for name in RewardsConfig.model_fields
                if config.changed(name)
            ]
        used = {name.rpartition(":")[2] for name in config.get("reward_funcs")}
        problems = []
        for name in RewardsConfig.model_fields:
            reward = {"soft": "soft_overlong"}.get(name.split("_")[0], name.split("_")[0])
            if config.changed(name) and reward not in used:
                problems.append(
                    Problem(
                        "MC321",
                        f"--{name} does nothing: the reward {reward} is not used",
                        [f"fix: --reward_funcs {reward}, or leave out --{name}"],
                    )
                )
        if "reward_model" in used:
            problems.append(
                Problem(
                    "MC344",
                    "--reward_funcs reward_model does not say which model",
                    ["fix: --reward_model DIR instead"],
                )
            )
        if "soft_overlong" in used and config.get("soft_cache_length") is None:
            problems.append(
                Problem(
                    "MC340",
                    "the reward soft_overlong needs to know where its penalty begins",
                    ["fix: --soft_cache_length N, tokens before the limit"],
                )
            )
        return problems
