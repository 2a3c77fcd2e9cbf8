"""The `rollout` plugin: what generates completions, for every recipe."""

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from mcore_core import Component, Plugin, hookimpl


class RolloutPlugin(Plugin):
    """Engines of this package."""

    role: ClassVar[Literal["recipe", "support"]] = "support"
    summary: ClassVar[str] = "engines that generate completions"

    @hookimpl
    def mcore_rollout_engines(self) -> Iterable[Component[Any]]:
        """Return the engines."""
        return [
            Component(
                "native",
                "mcore_rlhf.rollout.native.engine:NativeEngine",
                "generates with the training weights themselves",
            ),
            Component(
                "vllm",
                "mcore_rlhf.rollout.vllm.choose:engine",
                "vLLM servers that `mcore rollout` starts, or vLLM in the training processes",
            ),
        ]
