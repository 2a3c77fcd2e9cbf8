"""What a command hands to the code that runs it: everything decided before torch is imported."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mcore_core.component import Component
from mcore_core.config.compose import RunConfig
from mcore_core.manager import PluginManager
from mcore_core.plugin import Plugin
from mcore_core.protocols import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedExport:
    """An export, ready to run."""

    config: RunConfig
    manager: PluginManager
    """Holds the active plugins only."""
    plugins: dict[str, Plugin]
    """Active plugins by name, required ones first."""
    names: tuple[str, ...]
    """The plugins that the user named; `plugin` in run.yaml."""
    argv: tuple[str, ...]
    """The command line after the command, as typed."""
    notes: tuple[str, ...] = ()
    """What a user may want to know about derived options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared(PreparedExport):
    """A training run, ready to run."""

    recipe: Component[Recipe[Any]]
    losses: Mapping[str, Component[Any]] = field(default_factory=dict)
    """What loss_type names, where the recipe's losses are components."""
