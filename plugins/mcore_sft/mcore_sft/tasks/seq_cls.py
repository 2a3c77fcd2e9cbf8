"""Classification and regression: a unit is a text, and its scores are read at its last token.

S texts, N labels, R texts of an evaluation.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mcore_core.config.compose import RunConfig
from mcore_core.data.collate import last_token, pack_marked
from mcore_core.data.template import Template
from mcore_core.protocols import (
    Batch,
    FrozenModel,
    HeadOut,
    HeadSpec,
    LossOutput,
    Reduce,
    Row,
    StepRun,
    Unit,
)
from mcore_sft.tasks import documents, seq_cls_loss
from mcore_sft.tasks.config import TaskConfig
from mcore_sft.tasks.correlation import pearson, spearman
from mcore_sft.tasks.labels import labels
from mcore_sft.tasks.texts import TextEncoder


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledBatch(Batch):
    """A packed row of texts; the token that is read of each has weight 1."""

    labels_S: Tensor
    """[S, N], or [S, 1] for classes, float64."""


class SequenceClassification:
    """Labels for texts, by a linear layer on the hidden state of the last token."""

    frozen: ClassVar[Mapping[str, FrozenModel]] = {}
    fields: ClassVar[frozenset[str]] = documents.TEXT_FIELDS
    formats_help: ClassVar[str] = documents.TEXT_HELP
    columns_example: ClassVar[str] = documents.TEXT_COLUMNS
    recognize = staticmethod(documents.recognize_text)
    token_local = False

    def __init__(self, config: RunConfig, template: Template) -> None:
        options = config[TaskConfig]
        assert options.num_labels is not None, "rules.check asks for it"
        self.num_labels = options.num_labels
        self.problem = options.problem
        self.head = HeadSpec(output="scores", scores=self.num_labels)
        self.export_config = {"problem_type": self.problem}
        self._system = template.system
        self._pad_id: int | None = template.tokenizer.pad_token_id
        self._texts = TextEncoder(template)

    def encoding_options(self) -> dict[str, Any]:
        """Return what decides, beside the template, what a row becomes."""
        return {"num_labels": self.num_labels, "problem": self.problem}

    def encode(self, row: Row) -> Unit | None:
        """Tokenize a text or a conversation: `input_ids` and `weights`, [L], `labels`, [N]."""
        found = labels(row, self.problem, self.num_labels)
        talk = documents.labelled_text(row, system=self._system)
        ids = self._texts.chat(talk) if talk.text is None else self._texts.plain(talk.text)
        return {
            "input_ids": ids,
            "weights": last_token(ids, self._pad_id),
            "labels": found,
            "length": len(ids),
        }

    def prepare(self, units: list[Unit], run: StepRun) -> Iterator[list[Unit]]:
        """One optimizer step over the global batch."""
        yield units

    def collate(self, units: list[Unit]) -> LabelledBatch:
        """Pack the texts."""
        texts = [(np.asarray(u["input_ids"]), np.asarray(u["weights"])) for u in units]
        wanted = np.stack([np.asarray(unit["labels"], np.float64) for unit in units])
        return LabelledBatch(**pack_marked(texts), labels_S=torch.from_numpy(wanted))

    def loss(self, out: HeadOut, batch: LabelledBatch, reduce: Reduce, /) -> LossOutput:
        """Return the losses, summed over this rank's texts, and their number."""
        assert out.values_TN is not None, "the head gives scores"
        scores_SN = reduce.per_seq(out.values_TN.double())
        mine_S = reduce.owns_S.double()
        count = mine_S.sum()
        loss_S = seq_cls_loss.loss(scores_SN, batch.labels_S, self.problem)
        measures = seq_cls_loss.measures(scores_SN.detach(), batch.labels_S, self.problem)
        return LossOutput(
            (loss_S * mine_S).sum(),
            count,
            {name: ((each_S * mine_S).sum(), count) for name, each_S in measures.items()},
            rows=seq_cls_loss.rows(scores_SN, batch.labels_S),
        )

    def summarize(self, rows_RN: Tensor) -> dict[str, float]:
        """Return the correlations of predicted and true numbers, means over the labels."""
        if self.problem != "regression":
            return {}
        rows = rows_RN.double().cpu().numpy()
        pairs = [(rows[:, i], rows[:, self.num_labels + i]) for i in range(self.num_labels)]
        return {
            "pearson": float(np.mean([pearson(*pair) for pair in pairs])),
            "spearman": float(np.mean([spearman(*pair) for pair in pairs])),
        }

    def state_dict(self) -> dict[str, Any]:
        """Nothing changes while training."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
