"""Supervised fine-tuning: a unit is one sample."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from mcore_core.config.compose import RunConfig
from mcore_core.config.train import TrainConfig
from mcore_core.data.collate import pack_sequences
from mcore_core.data.rows import conversation
from mcore_core.data.template import Template
from mcore_core.protocols import (
    FrozenModel,
    HeadOut,
    HeadSpec,
    LossOutput,
    Reduce,
    Row,
    StepRun,
    Unit,
)
from mcore_sft.batch import SFTBatch
from mcore_sft.loss import cross_entropy


class SFTRecipe:
    """Cross-entropy on the tokens that the template marks.

    With `calculate_per_token_loss` (the default) every trained token of the global batch counts
    alike; without, every sample does, whatever its length.
    """

    frozen: ClassVar[Mapping[str, FrozenModel]] = {}
    token_local = True
    loss_is_nll: ClassVar[bool] = True

    def __init__(self, config: RunConfig, template: Template) -> None:
        self.head = HeadSpec()
        self.per_token = config[TrainConfig].calculate_per_token_loss is not False
        self._template = template

    def encode(self, row: Row) -> Unit | None:
        """Tokenize a conversation or a text: `input_ids` and `weights`, both [L], and `length`."""
        encoded = self._template.encode(conversation(row, system=self._template.system))
        return {
            "input_ids": encoded.input_ids,
            "weights": encoded.weights,
            "length": len(encoded.input_ids),
        }

    def prepare(self, units: list[Unit], run: StepRun) -> Iterator[list[Unit]]:
        """One optimizer step over the global batch."""
        yield units

    def collate(self, units: list[Unit]) -> SFTBatch:
        """Pack the samples; where samples count alike, divide each one's weights by their sum."""
        sequences, counts = [], []
        for unit in units:
            weights = np.asarray(unit["weights"], np.float32)
            if not self.per_token:
                total = weights.sum(dtype=np.float64)
                counts.append(_first(weights))
                weights = (weights / total).astype(np.float32) if total > 0 else weights
            sequences.append((np.asarray(unit["input_ids"]), weights))
        fields = pack_sequences(sequences)
        count_T = fields["weights_T"]
        if not self.per_token:
            count_T = torch.from_numpy(np.concatenate([np.append(c[1:], c[:1]) for c in counts]))
        return SFTBatch(**fields, count_T=count_T)

    def loss(self, out: HeadOut, batch: SFTBatch, reduce: Reduce, /) -> LossOutput:
        """Return this micro-batch's share of the cross-entropy."""
        return cross_entropy(out, batch, reduce)

    def state_dict(self) -> dict[str, Any]:
        """Nothing changes while training."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def _first(weights: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Return 1 at the first trained token, 0 elsewhere."""
    first = np.zeros(len(weights), np.float32)
    trains = np.flatnonzero(weights > 0)
    first[trains[:1]] = 1.0
    return first
