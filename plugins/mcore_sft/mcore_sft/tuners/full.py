"""The `full` tuner: the model's own weights train, but for those that options freeze."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mcore_core.model.names import named_weights

if TYPE_CHECKING:
    from mcore_core.protocols import ModelChunk, TunerContext


class Full:
    """Implements protocols.Tuner."""

    partial = False

    def __init__(self, context: "TunerContext") -> None:
        """Keep the options."""
        self.context = context

    def apply(self, chunks: "Sequence[ModelChunk]") -> None:
        """Freeze what the options name."""

    def load(self, chunks: "Sequence[ModelChunk]") -> None:
        """There is nothing beside the weights."""

    @contextmanager
    def disabled(self, chunks: "Sequence[ModelChunk]") -> Iterator[None]:
        """Refuse: the weights that the run started from are gone."""
        raise RuntimeError("a fully trained model cannot be switched back to what it was")
        yield

    def merged(self, chunks: "Sequence[ModelChunk]") -> Mapping[str, Tensor]:
        """Return the weights."""
        return named_weights(chunks)

    def export(self, chunks: "Sequence[ModelChunk]", path: Path) -> None:
        """There is no adapter."""

    def identity(self) -> dict[str, Any]:
        """Return what two runs must share for one to go on from the other's checkpoint."""
        return {"tuner_type": "full"}
