"""The tuner of a run: found among those that plugins bring, and built."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mcore_core.config.tuner import TunerConfig
from mcore_core.errors import usage_error
from mcore_core.manager import PluginManager
from mcore_core.model.names import named_weights

if TYPE_CHECKING:
    from mcore_core.checkpoint.folders import Checkpoint
    from mcore_core.component import Catalogue
    from mcore_core.protocols import ModelChunk, Tuner, TunerContext

FULL = "full"


class AllWeights:
    """Trains every parameter: what `--tuner_type full` is where no plugin knows more."""

    partial = False
    mergeable = True

    def __init__(self, context: "TunerContext") -> None:
        """Keep the options."""
        self.context = context

    def apply(self, chunks: "Sequence[ModelChunk]") -> None:
        """Leave everything as it is."""

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

    def absorb(self, chunks: "Sequence[ModelChunk]") -> None:
        """There is nothing beside the weights."""

    def export(self, chunks: "Sequence[ModelChunk]", path: Path) -> None:
        """There is no adapter."""

    def identity(self) -> dict[str, Any]:
        """Return what two runs must share for one to go on from the other's checkpoint."""
        return {"tuner_type": FULL}


def build_tuner(tuners: "Catalogue[Any]", context: "TunerContext") -> "Tuner":
    """Return the tuner that `--tuner_type` names. Raises UsageError where there is none."""
    name = context.config[TunerConfig].tuner_type
    if name == FULL and FULL not in {c.name for _, c in tuners}:
        return AllWeights(context)
    build: Any = tuners.find(name, "--tuner_type").load()
    tuner: Tuner = build(context)
    return tuner


def installed_tuners() -> "Catalogue[Any]":
    """Return the tuners of every installed plugin."""
    manager = PluginManager()
    manager.load_installed()
    return manager.catalogue("mcore_tuners")


def check_same_tuner(checkpoint: "Checkpoint", tuner: "Tuner") -> None:
    """Raise UsageError where a checkpoint is of a run that trained something else."""
    have = checkpoint.training.get("tuner", {"tuner_type": FULL})
    want = json.loads(json.dumps(tuner.identity()))
    differ = [k for k in {**want, **have} if have.get(k) != want.get(k)]
    if differ:
        raise usage_error(
            "MC707",
            f"{checkpoint.path} is a checkpoint of a run that trained something else",
            *(f"{k}: {have.get(k)} there, {want.get(k)} in this run" for k in differ[:6]),
            "fix: the same tuner options as in its run.yaml",
        )
