"""The `lora` tuner: adapters train, the model's own weights stay as they are."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mcore_core.config.train import TrainConfig
from mcore_core.config.weights import WeightsConfig
from mcore_core.errors import usage_error
from mcore_core.model.names import named_weights, unwrap
from mcore_sft.tuners.lora.insert import add_random_states, insert
from mcore_sft.tuners.lora.layers import Adapter, Switch
from mcore_sft.tuners.lora.spec import LoraSpec, from_options, from_peft
from mcore_sft.tuners.lora.split import projections
from mcore_sft.tuners.lora.targets import select
from mcore_sft.tuners.table import entries, memory_rules

if TYPE_CHECKING:
    from mcore_core.protocols import ModelChunk, TunerContext


class Lora:
    """Implements protocols.Tuner."""

    partial = True

    def __init__(self, context: "TunerContext") -> None:
        """Read the options, and the adapter that the run starts from."""
        self.context = context
        self.spec = _spec(context)
        self.table = list(entries(memory_rules(context.family, context.architecture)))
        self.projections = select(self.spec, projections(self.table))
        self.adapters: list[Adapter] = []
        self._switch = Switch()

    def apply(self, chunks: "Sequence[ModelChunk]") -> None:
        """Freeze the model and put adapters beside its layers."""
        seed = self.context.config[TrainConfig].seed
        add_random_states(seed)
        for wrapped in chunks:
            chunk = unwrap(wrapped)
            chunk.requires_grad_(False)
            self.adapters += insert(chunk, self.projections, self.spec, self._switch, seed=seed)
            if chunk.pre_process:
                chunk.embedding.register_forward_hook(_needs_gradient)

    def load(self, chunks: "Sequence[ModelChunk]") -> None:
        """Fill the adapters from what the run starts from."""

    @contextmanager
    def disabled(self, chunks: "Sequence[ModelChunk]") -> Iterator[None]:
        """Switch the adapters off: the model computes as it did before it was tuned."""
        before = self._switch.on
        self._switch.on = False
        try:
            yield
        finally:
            self._switch.on = before

    def merged(self, chunks: "Sequence[ModelChunk]") -> Mapping[str, Tensor]:
        """Return the weights with the adapters added, each computed when it is asked for."""
        return named_weights(chunks)

    def export(self, chunks: "Sequence[ModelChunk]", path: Path) -> None:
        """Write the adapter in PEFT's format; collective."""

    def identity(self) -> dict[str, Any]:
        """Return what two runs must share for one to go on from the other's checkpoint."""
        return {
            "tuner_type": "lora",
            "lora_rank": self.spec.rank,
            "lora_alpha": self.spec.alpha,
        }


def _spec(context: "TunerContext") -> LoraSpec:
    folders = context.config[WeightsConfig].adapters
    if not folders:
        return from_options(context.config)
    if len(folders) > 1:
        raise usage_error(
            "MC553",
            f"--adapters {' '.join(folders)}: a model has one adapter at a time",
            "fix: merge the first with mcore export --merge_lora true, then train on the result",
        )
    return from_peft(Path(folders[0]).expanduser(), context.config)


def _needs_gradient(_: torch.nn.Module, args: Any, out: Tensor) -> Tensor:  # noqa: ANN401
    """Let recomputed layers and pipeline stages see that something below the loss trains."""
    if torch.is_grad_enabled() and not out.requires_grad:
        out.requires_grad_()
    return out
