"""Rerankers that answer yes or no: a unit is a query with its documents, each a prompt.

D documents, Q queries, S sequences: one a document.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mcore_core.component import Component
from mcore_core.config.compose import RunConfig
from mcore_core.data.collate import pack_marked
from mcore_core.data.template import Template
from mcore_core.errors import usage_error
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
from mcore_sft.tasks import documents, reranker_loss
from mcore_sft.tasks.config import RerankerConfig, TaskConfig
from mcore_sft.tasks.documents import Text
from mcore_sft.tasks.reranker_loss import Judged
from mcore_sft.tasks.reranker_prompt import RerankerPrompt
from mcore_sft.tasks.sides import RankedBatch, collate_sides, joined
from mcore_sft.tasks.vectors import POSITIVE

type RerankerLoss = Callable[[Judged, RerankerConfig], tuple[Tensor, Tensor]]


class GenerativeReranker:
    """The log-odds of yes against no, after a prompt that shows a query and a document."""

    frozen: ClassVar[Mapping[str, FrozenModel]] = {}
    fields: ClassVar[frozenset[str]] = documents.PAIR_FIELDS
    formats_help: ClassVar[str] = documents.PAIR_HELP
    columns_example: ClassVar[str] = documents.PAIR_COLUMNS
    recognize = staticmethod(documents.recognize_pair)
    token_local = False

    def __init__(self, config: RunConfig, template: Template) -> None:
        self.options = config[RerankerConfig]
        self.name = config[TaskConfig].loss_type or "pointwise_reranker"
        self._loss: RerankerLoss = reranker_loss.pointwise_reranker
        self._prompt = RerankerPrompt(self.options, template)
        self.head = HeadSpec(output="logits", tokens=self._prompt.answers())

    def use_losses(self, losses: Mapping[str, Component[RerankerLoss]]) -> None:
        """Take the loss of loss_type."""
        (self._loss,) = (component.load() for component in losses.values())

    def encoding_options(self) -> dict[str, Any]:
        """Return what decides, beside the template, what a row becomes."""
        return {"options": self.options.model_dump(), "loss": self.name}

    def encode(self, row: Row) -> Unit | None:
        """Tokenize a prompt for each document; see `joined`."""
        found = documents.documents(row)
        if not found.negatives and self.name == "listwise_reranker":
            raise usage_error(
                "MC384",
                "a row has no negative documents, and --loss_type listwise_reranker needs some",
                "fix: add negatives to every row, or --loss_type pointwise_reranker",
            )
        rng = np.random.default_rng([len(found.query.text), len(found.negatives)])
        kept = (
            _some(found.positives, self.options.max_positive_samples, rng),
            _some(found.negatives, self.options.max_negative_samples, rng),
        )
        return joined([], *([self._prompt(found.query, d) for d in texts] for texts in kept))

    def prepare(self, units: list[Unit], run: StepRun) -> Iterator[list[Unit]]:
        """One optimizer step over the global batch."""
        yield units

    def collate(self, units: list[Unit]) -> RankedBatch:
        """Pack the prompts."""
        sequences, roles, _ = collate_sides(units)
        unit_of = np.repeat(np.arange(len(units)), [len(unit["lengths"]) for unit in units])
        return RankedBatch(
            **pack_marked(sequences), roles_S=torch.tensor(roles), unit_S=torch.from_numpy(unit_of)
        )

    def loss(self, out: HeadOut, batch: RankedBatch, reduce: Reduce, /) -> LossOutput:
        """Return the losses, summed over this rank's documents, and what they count."""
        assert out.values_TN is not None, "the head gives logits"
        logits_S2 = reduce.per_seq(out.values_TN.double())
        judged = Judged(
            logits_D=logits_S2[:, 0] - logits_S2[:, 1],
            suits_D=(batch.roles_S == POSITIVE).double(),
            query_D=batch.unit_S,
            queries=int(batch.unit_S[-1]) + 1 if len(batch.unit_S) else 0,
        )
        mine_Q = (judged.sums_Q(reduce.owns_S.double()) > 0).double()
        loss_Q, count_Q = self._loss(judged, self.options)
        found = reranker_loss.measures(judged)
        return LossOutput(
            (loss_Q * mine_Q).sum(),
            (count_Q * mine_Q).sum(),
            {
                name: ((a_Q * mine_Q).sum(), (b_Q * mine_Q).sum())
                for name, (a_Q, b_Q) in found.items()
            },
        )

    def state_dict(self) -> dict[str, Any]:
        """Nothing changes while training."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def _some(texts: tuple[Text, ...], most: int, rng: np.random.Generator) -> list[Text]:
    """Return all texts, or so many of them at random, in their order; the same in every run."""
    if len(texts) <= most:
        return list(texts)
    return [texts[i] for i in sorted(rng.choice(len(texts), most, replace=False))]
