"""Tuners: which parameters train, what is added to the model, and what is saved of it.

`mcore_core.protocols` has these names too. Typing only: torch is imported for checkers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from mcore_core.config.compose import RunConfig
    from mcore_core.model.architecture import Architecture
    from mcore_core.model.family import Family
    from mcore_core.protocols import Bridge, ModelChunk


@dataclass(frozen=True, slots=True, kw_only=True)
class TunerContext:
    """What a tuner is built from."""

    config: "RunConfig"
    family: "Family"
    architecture: "Architecture"
    bridge: "Bridge | None" = None
    """Reads and writes files; None where there are none, as in tests of layouts."""


class Tuner(Protocol):
    """Decides which parameters train and what is saved."""

    partial: bool
    """True where checkpoints hold only what trains: the rest is the model that the run names."""
    mergeable: bool
    """True where `merged` gives a model of the same architecture."""

    def __init__(self, context: TunerContext, /) -> None:
        """Read the options. Raises UsageError naming every problem."""

    def apply(self, chunks: "Sequence[ModelChunk]") -> None:
        """Freeze parameters, or add some, before weights are loaded and the optimizer exists."""

    def load(self, chunks: "Sequence[ModelChunk]") -> None:
        """Fill what was added from what the run starts from, once weights are there; collective."""

    def disabled(self, chunks: "Sequence[ModelChunk]") -> "AbstractContextManager[None]":
        """Let the model compute what it computed before it was tuned, for a while."""

    def merged(self, chunks: "Sequence[ModelChunk]") -> "Mapping[str, Tensor]":
        """Return this rank's weights by canonical name, as if the tuned model had no other parts.

        The model's own are left as they are. Values may be computed when they are asked for.
        """

    def absorb(self, chunks: "Sequence[ModelChunk]") -> None:
        """Put what `merged` returns in the place of the weights, for good: before an export."""

    def export(self, chunks: "Sequence[ModelChunk]", path: Path) -> None:
        """Write the trained part in its interchange format, if it has one; collective."""

    def identity(self) -> dict[str, Any]:
        """Return what two runs must share for one to go on from the other's checkpoint, as JSON."""
