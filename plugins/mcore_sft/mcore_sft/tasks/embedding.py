"""Embeddings: a unit is a query with its documents, and each text is read at its last token.

S sequences, Q queries, R queries of an evaluation, H numbers of an embedding.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mcore_core.component import Component
from mcore_core.config.compose import RunConfig
from mcore_core.config.dataloader import DataLoaderConfig
from mcore_core.config.train import TrainConfig
from mcore_core.data.collate import pack_marked
from mcore_core.data.rows import RowError
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
from mcore_sft.tasks import documents, embedding_loss, retrieval
from mcore_sft.tasks.components import LABELLED
from mcore_sft.tasks.config import EmbeddingConfig, TaskConfig
from mcore_sft.tasks.labels import number
from mcore_sft.tasks.model_files import sentence_transformer
from mcore_sft.tasks.sides import SidesBatch, collate_sides, joined
from mcore_sft.tasks.texts import TextEncoder
from mcore_sft.tasks.vectors import QUERY, Vectors, vectors

if TYPE_CHECKING:
    from mcore_core.model.architecture import Architecture

type EmbeddingLoss = Callable[[Vectors, EmbeddingConfig], Tensor]
ALONE = (
    "a query is compared with the documents of its micro-batch, and these micro-batches have one "
    "query without negatives"
)


class Embedding:
    """Vectors for texts, from the last token's hidden state."""

    frozen: ClassVar[Mapping[str, FrozenModel]] = {}
    fields: ClassVar[frozenset[str]] = documents.PAIR_FIELDS
    formats_help: ClassVar[str] = documents.PAIR_HELP
    columns_example: ClassVar[str] = documents.PAIR_COLUMNS
    recognize = staticmethod(documents.recognize_pair)
    token_local = False

    def __init__(self, config: RunConfig, template: Template) -> None:
        self.head = HeadSpec(output="hidden")
        self.options = config[EmbeddingConfig]
        self.name = config[TaskConfig].loss_type or "infonce"
        self._loss: EmbeddingLoss = embedding_loss.infonce
        self._alone = (
            self.name == "infonce"
            and config[TrainConfig].micro_batch_size == 1
            and not config[DataLoaderConfig].packing
        )
        self._texts = TextEncoder(template)

    def use_losses(self, losses: Mapping[str, Component[EmbeddingLoss]]) -> None:
        """Take the loss of loss_type."""
        (self._loss,) = (component.load() for component in losses.values())

    def encoding_options(self) -> dict[str, Any]:
        """Return what decides, beside the template, what a row becomes."""
        return {"loss": self.name, "negatives": self.options.infonce_hard_negatives}

    def encode(self, row: Row) -> Unit | None:
        """Tokenize the texts of a row; see `joined`. `label` is 0 where the row has none."""
        found = documents.documents(row)
        if len(found.positives) > 1:
            raise RowError(f"there are {len(found.positives)} positives, and only one is learned")
        has = any(row.get(key) is not None for key in documents.LABELS)
        label = self._label(row) if self.name in LABELLED or (has and ":" in self.name) else 0.0
        encode = self._texts.plain
        sides = [encode(text.joined) for text in (found.query, *found.positives)]
        negatives = [encode(text.joined) for text in found.negatives]
        return joined(sides[:1], sides[1:], self._chosen(negatives)) | {"label": label}

    def _label(self, row: Row) -> float:
        value = number(documents.similarity(row))
        if self.name == "cosine_similarity" and not -1 <= value <= 1:
            fix = "fix: divide the labels, so that they are similarities"
            raise usage_error("MC383", f"the label {value:g} is no cosine, from -1 to 1", fix)
        if self.name in LABELLED - {"cosine_similarity"} and value not in (0, 1):
            fix = "fix: --loss_type cosine_similarity, or labels 0 (unlike) and 1 (alike)"
            raise usage_error("MC383", f"the label {value:g} is neither 0 nor 1", fix)
        return value

    def _chosen(self, negatives: list[Any]) -> list[Any]:
        """Return as many negatives as infonce_hard_negatives asks for."""
        wanted = self.options.infonce_hard_negatives
        if not negatives and (wanted is not None or not self.options.infonce_use_batch):
            if self.name == "infonce":
                option = f"--infonce_hard_negatives {wanted}"
                option = "--infonce_use_batch false" if wanted is None else option
                fix = "fix: add negatives to every row, or leave the option out"
                raise usage_error("MC384", f"a row has no negatives, and {option} needs some", fix)
            return []
        if wanted is None:
            return negatives
        more = max(0, wanted - len(negatives))
        rng = np.random.default_rng(sum(map(len, negatives)))  # the same in every run
        again = [negatives[i] for i in rng.integers(0, max(1, len(negatives)), more)]
        return [*negatives[:wanted], *again]

    def prepare(self, units: list[Unit], run: StepRun) -> Iterator[list[Unit]]:
        """One optimizer step over the global batch. Raises UsageError where none has a negative."""
        if self._alone and run.dp[1] == 1 and all(len(unit["lengths"]) == 2 for unit in units):
            raise usage_error(
                "MC384", ALONE, "fix: --micro_batch_size 8, or rows with negative documents"
            )
        yield units

    def collate(self, units: list[Unit]) -> SidesBatch:
        """Pack the texts."""
        sequences, roles, labels = collate_sides(units)
        return SidesBatch(
            **pack_marked(sequences),
            roles_S=torch.tensor(roles),
            labels_S=torch.tensor(labels, dtype=torch.float32),
        )

    def loss(self, out: HeadOut, batch: SidesBatch, reduce: Reduce, /) -> LossOutput:
        """Return the losses, summed over this rank's queries, and their number."""
        assert out.values_TN is not None, "the head gives hidden states"
        hidden_SH = reduce.per_seq(out.values_TN)
        asks_S = batch.roles_S == QUERY
        found = vectors(hidden_SH, batch.roles_S, batch.labels_S, reduce)
        mine = reduce.rows_of_gathered(int(asks_S.sum()))
        counted_Q = reduce.owns_S[asks_S].double()
        count = counted_Q.sum()

        def share(value_Q: Tensor) -> tuple[Tensor, Tensor]:
            return (value_Q[mine].double() * counted_Q).sum(), count

        total, _ = share(self._summed(found))
        metrics, rows = retrieval.measures(found, mine)
        if self.name in LABELLED:
            cosine_Q = found.cosine_Q().detach()[mine]
            return LossOutput(total, count, rows=torch.stack([cosine_Q, found.labels_Q[mine]], 1))
        shares = {name: share(value_Q) for name, value_Q in metrics.items()}
        return LossOutput(total, count, shares, rows=rows)

    def _summed(self, found: Vectors) -> Tensor:
        """Return the loss of each query, of all sizes of the embedding together."""
        dims = self.options.mrl_dims
        if dims is None:
            return self._loss(found, self.options)
        size = found.queries_QH.shape[1]
        if max(dims) > size:
            raise usage_error(
                "MC385",
                f"--mrl_dims {max(dims)}: the embeddings of this model have {size} numbers",
                f"fix: sizes up to {size}",
            )
        weights = self.options.mrl_weights or [1.0] * len(dims)
        losses = [self._loss(found.first(size), self.options) for size in dims]
        return torch.stack([w * x for w, x in zip(weights, losses, strict=True)]).sum(0)

    def summarize(self, rows_RN: Tensor) -> dict[str, float]:
        """Return how well labels are followed, or how well positives are found among all rows."""
        if self.name in LABELLED:
            return retrieval.correlations(rows_RN)
        return retrieval.found(rows_RN)

    def export_files(self, architecture: "Architecture") -> dict[str, str]:
        """Return the files by which sentence-transformers opens the model."""
        return sentence_transformer(architecture.hidden_size, self._texts.max_length)

    def state_dict(self) -> dict[str, Any]:
        """Nothing changes while training."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
