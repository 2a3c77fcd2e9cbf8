"""Supervised fine-tuning: a unit is one sample."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from mcore_core.config.compose import RunConfig
from mcore_core.config.train import TrainConfig
from mcore_core.data.collate import pack_sequences
from mcore_core.data.rows import FIELDS, conversation
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
from mcore_sft.channels import COLUMN, Channels
from mcore_sft.config import SFTConfig
from mcore_sft.loss import cross_entropy, dynamic_fine_tuning

if TYPE_CHECKING:
    from mcore_core.data.store import UnitTable


class SFTRecipe:
    """Cross-entropy, or dynamic fine-tuning, on the tokens that the template marks.

    With `calculate_per_token_loss` (the default) every trained token of the global batch counts
    alike; without, every sample does, whatever its length.
    """

    frozen: ClassVar[Mapping[str, FrozenModel]] = {}
    token_local = True

    def __init__(self, config: RunConfig, template: Template) -> None:
        options = config[SFTConfig]
        self.head = HeadSpec()
        self.per_token = config[TrainConfig].calculate_per_token_loss is not False
        self.loss_is_nll = not options.enable_dft_loss
        """Whether the exponential of a mean loss is a perplexity."""
        self._token_loss = dynamic_fine_tuning if options.enable_dft_loss else cross_entropy
        self._channels = Channels() if options.enable_channel_loss else None
        self.fields = FIELDS | {COLUMN} if options.enable_channel_loss else FIELDS
        """The columns that are read."""
        self._template = template

    def encoding_options(self) -> dict[str, Any]:
        """Return what decides, beside the template, what a row becomes."""
        return {"channels": self._channels is not None}

    def encode(self, row: Row) -> Unit | None:
        """Tokenize a conversation or a text: `input_ids` and `weights`, both [L], and `length`."""
        (unit,) = self._units(row)
        return unit

    def _units(self, row: Row) -> list[Unit]:
        """Return what becomes of a row: one unit, or one of each piece."""
        talk = conversation(row, system=self._template.system)
        more = {} if self._channels is None else {COLUMN: self._channels.read(row)}
        return [
            {
                "input_ids": piece.input_ids,
                "weights": piece.weights,
                "length": len(piece.input_ids),
                **more,
            }
            for piece in self._template.encode_pieces(talk)
        ]

    def check_data(self, tables: "Sequence[UnitTable]") -> None:
        """Raise UsageError where channels are asked for and the tokenized data has none."""
        if self._channels is not None:
            self._channels.check(tables)

    def prepare(self, units: list[Unit], run: StepRun) -> Iterator[list[Unit]]:
        """One optimizer step over the global batch."""
        if self._channels is not None:
            self._channels.meet(units, run)
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
        batch = SFTBatch(**fields, count_T=count_T)
        if self._channels is None:
            return batch
        channel_T = self._channels.per_token(units)
        return replace(batch, channel_T=channel_T, channels=self._channels.names)

    def loss(self, out: HeadOut, batch: SFTBatch, reduce: Reduce, /) -> LossOutput:
        """Return this micro-batch's share of the loss."""
        return self._token_loss(out, batch, reduce)

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
