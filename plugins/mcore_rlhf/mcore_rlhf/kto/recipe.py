"""KTO: a unit is one answer, good or bad.

T tokens of a row, S sequences in it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mcore_core.config.compose import RunConfig
from mcore_core.data.collate import pack_sequences
from mcore_core.data.template import Template
from mcore_core.errors import usage_error
from mcore_core.protocols import (
    Batch,
    FrozenModel,
    HeadOut,
    LossOutput,
    Reduce,
    Row,
    StepRun,
    Unit,
)
from mcore_rlhf.kto.config import KTOConfig
from mcore_rlhf.kto.loss import Answers, losses
from mcore_rlhf.kto.mismatch import mismatched
from mcore_rlhf.reference import REFERENCE, ReferenceScores, reference_model
from mcore_rlhf.rows import LABEL_COLUMNS, LABEL_FIELDS, LABEL_HELP, labelled, recognize_label
from mcore_rlhf.tokens import HEAD, token_metrics

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mcore_core.data.store import UnitTable


@dataclass(frozen=True, slots=True, kw_only=True)
class KTOBatch(Batch):
    """A packed row of answers."""

    ref_logps_S: Tensor
    """Summed log-probability of each answer under the reference, nats, float64."""
    good_S: Tensor
    """True where the answer is desirable."""
    kl_S: Tensor
    """The estimate of the divergence, of the global batch, float64."""
    margin_S: Tensor
    """What each reward is multiplied by in the difference of the two classes' means, float64."""
    share_S: Tensor
    """One by the answers of the global batch where it has both classes, else 0, float64."""


class KTORecipe:
    """Losses of single answers against a reference and the batch's divergence from it."""

    fields: ClassVar[frozenset[str]] = LABEL_FIELDS
    formats_help: ClassVar[str] = LABEL_HELP
    columns_example: ClassVar[str] = LABEL_COLUMNS
    recognize = staticmethod(recognize_label)
    token_local = False

    def __init__(self, config: RunConfig, template: Template) -> None:
        self.options = config[KTOConfig]
        self.head = HEAD
        self.frozen: dict[str, FrozenModel] = {REFERENCE: reference_model(config)}
        self._template = template
        self._reference = ReferenceScores(config, _summed)

    def encode(self, row: Row) -> Unit | None:
        """Tokenize the conversation; the prompt ends where its first trained token stands."""
        talk, good = labelled(row, system=self._template.system)
        encoded = self._template.encode(talk)
        return {
            "input_ids": encoded.input_ids,
            "weights": encoded.weights,
            "prompt_length": int(np.flatnonzero(encoded.weights)[0]),
            "label": int(good),
            "length": len(encoded.input_ids),
        }

    def check_data(self, tables: "Sequence[UnitTable]") -> None:
        """Refuse data of one class: nothing would be told apart.

        Raises:
            UsageError: All answers are good, or all are bad.
        """
        labels = np.concatenate([table.column("label") for table in tables])
        good = int(labels.sum())
        if good in (0, len(labels)):
            have, lack = ("desirable", "undesirable") if good else ("undesirable", "desirable")
            raise usage_error(
                "MC333",
                f"all {len(labels):,} answers are {have}: there is nothing {lack} to compare with",
                "their 'label' is " + ("true" if good else "false"),
                f"fix: add {lack} answers, or use --plugin sft to learn good ones",
            )

    def prepare(self, units: list[Unit], run: StepRun) -> Iterator[list[Unit]]:
        """Attach the reference's log-probabilities and the estimate; one step."""
        kl = self._divergence(units, run) if self.options.loss_type == "kto" else 0.0
        refs = self._reference(units, run)
        counts = run.gather((sum(unit["label"] for unit in units), len(units)))
        good, all_of_it = (sum(c[i] for c in counts) for i in range(2))
        bad = all_of_it - good
        both = good > 0 and bad > 0
        yield [
            {
                **unit,
                "ref_logps": ref,
                "kl": kl,
                "margin": (1 / good if unit["label"] else -1 / bad) if both else 0.0,
                "share": 1 / all_of_it if both else 0.0,
            }
            for unit, (ref,) in zip(units, refs, strict=True)
        ]

    def _divergence(self, units: list[Unit], run: StepRun) -> float:
        """Return max(0, mean over the global batch of policy minus reference, mismatched)."""
        others = mismatched(units, run, max_length=self._template.max_length)
        policy, ref = (run.score(name, others) for name in ("policy", REFERENCE))
        gaps = [_sum(p) - _sum(r) for p, r in zip(policy, ref, strict=True)]
        everyone: list[float] = [gap for part in run.gather(gaps) for gap in part]
        return max(0.0, sum(everyone) / len(everyone))

    def collate(self, units: list[Unit]) -> KTOBatch:
        """Pack the answers, with what `prepare` attached."""

        def numbers(name: str) -> Tensor:
            return torch.tensor([unit.get(name, 0.0) for unit in units], dtype=torch.float64)

        return KTOBatch(
            **pack_sequences([(np.asarray(u["input_ids"]), u["weights"]) for u in units]),
            ref_logps_S=numbers("ref_logps"),
            good_S=numbers("label") > 0,
            kl_S=numbers("kl"),
            margin_S=numbers("margin"),
            share_S=numbers("share"),
        )

    def loss(self, out: HeadOut, batch: KTOBatch, reduce: Reduce, /) -> LossOutput:
        """Return the weighted losses, summed over this rank's answers, and their number."""
        logps_S = reduce.per_seq(out.logps_T.double())
        ratio_S, mine_S = logps_S - batch.ref_logps_S, reduce.owns_S.double()
        answers = Answers(ratio_S=ratio_S, good_S=batch.good_S, kl_S=batch.kl_S)
        total = (losses(answers, self.options) * mine_S).sum()
        metrics = _metrics(self.options.beta * ratio_S.detach(), logps_S.detach(), batch, mine_S)
        metrics |= token_metrics(out, batch.good_S[reduce.seq_T])
        if self.options.loss_type == "kto":
            metrics["kl"] = ((batch.kl_S * mine_S).sum(), mine_S.sum())
        return LossOutput(total, mine_S.sum(), metrics)

    def state_dict(self) -> dict[str, Any]:
        """Return what the reference said about the units so far."""
        return {"reference": self._reference.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self._reference.load_state_dict(state["reference"])


def _metrics(
    rewards_S: Tensor, logps_S: Tensor, batch: KTOBatch, mine_S: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return shares of TRL's metrics; each class's are means over the class."""
    found = {}
    for name, class_S in (("chosen", batch.good_S), ("rejected", ~batch.good_S)):
        counted_S = mine_S * class_S
        found[f"rewards/{name}"] = ((rewards_S * counted_S).sum(), counted_S.sum())
        found[f"logps/{name}"] = ((logps_S * counted_S).sum(), counted_S.sum())
    margin = (rewards_S * batch.margin_S * mine_S).sum()
    found["rewards/margins"] = (margin, (batch.share_S * mine_S).sum())
    return found


def _sum(logps: "NDArray[np.float32]") -> float:
    return float(logps.sum(dtype=np.float64))


def _summed(unit: Unit, logps: "NDArray[np.float32]") -> tuple[float, ...]:
    return (_sum(logps),)
