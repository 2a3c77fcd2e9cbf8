"""The `moe` plugin."""

from collections.abc import Iterable
from typing import ClassVar, Literal

from mcore_core import Component, Plugin, hookimpl
from mcore_core.config.compose import RunConfig
from mcore_core.config.group import ConfigGroup
from mcore_core.errors import Problem
from mcore_moe.config import MoEConfig
from mcore_moe.rules import check_experts


class MoEPlugin(Plugin):
    """Mixtures of experts."""

    role: ClassVar[Literal["recipe", "support"]] = "support"
    summary: ClassVar[str] = "mixtures of experts: options, expert parallelism, balancing losses"

    @hookimpl
    def mcore_config_groups(self) -> Iterable[type[ConfigGroup]]:
        """Return the MoE options."""
        return [MoEConfig]

    @hookimpl
    def mcore_dispatchers(self) -> Iterable[Component[object]]:
        """Return the dispatchers; a rank's rows may have any length with each."""
        module = "mcore_core.model.moe.dispatchers"
        yield Component("alltoall", f"{module}:AllToAll", "tokens go to the ranks of their experts")
        yield Component("allgather", f"{module}:AllGather", "all tokens go to all ranks")
        yield Component("flex", f"{module}:Flex", "DeepEP's kernels; needs CUDA and deep_ep")

    @hookimpl
    def mcore_validate_config(self, config: RunConfig) -> Iterable[Problem]:
        """Return what cannot be honoured."""
        return check_experts(config)
