"""Direct preference optimization: a unit is a pair of answers.

T tokens of a row, S = 2 P sequences, P pairs.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mcore_core.component import Component
from mcore_core.config.compose import RunConfig
from mcore_core.data.template import Template
from mcore_core.protocols import (
    FrozenModel,
    HeadOut,
    LossOutput,
    Reduce,
    Row,
    StepRun,
    Unit,
)
from mcore_rlhf.dpo.config import DPOConfig
from mcore_rlhf.dpo.loss import LOSSES, PairLoss, log_odds
from mcore_rlhf.dpo.pairs import Pairs
from mcore_rlhf.dpo.rules import needs_reference
from mcore_rlhf.dpo.running import RunningMean
from mcore_rlhf.pairs import PairBatch, PairEncoder, chosen_tokens, collate_pairs, sum_sides
from mcore_rlhf.reference import REFERENCE, ReferenceScores, reference_model
from mcore_rlhf.rows import PAIR_COLUMNS, PAIR_FIELDS, PAIR_HELP, pair, recognize_pair
from mcore_rlhf.tokens import HEAD, token_metrics

SORTING = frozenset({"aot", "aot_unpaired"})
"""Losses that compare the pairs of a micro-batch, those of all data-parallel ranks."""
PER_TOKEN = frozenset({"simpo", "orpo"})
"""Losses whose rewards are means per token."""


class DPORecipe:
    """Losses over pairs of answers, one or several with weights."""

    fields: ClassVar[frozenset[str]] = PAIR_FIELDS
    formats_help: ClassVar[str] = PAIR_HELP
    columns_example: ClassVar[str] = PAIR_COLUMNS
    recognize = staticmethod(recognize_pair)
    token_local = False

    def __init__(self, config: RunConfig, template: Template) -> None:
        self.options = config[DPOConfig]
        self.head = HEAD
        self.losses: dict[str, PairLoss | Component[PairLoss]] = {
            name: LOSSES[name] for name in self.options.losses if name in LOSSES
        }
        self.frozen: dict[str, FrozenModel] = {}
        if needs_reference(self.options):
            self.frozen[REFERENCE] = reference_model(config)
        self._system = template.system
        self._encoder = PairEncoder(template)
        self._reference = ReferenceScores(config, sum_sides)
        self._mean = RunningMean()

    def use_losses(self, losses: Mapping[str, Component[PairLoss]]) -> None:
        """Take the losses of loss_type; those of others are imported when they are first called."""
        self.losses = {name: LOSSES.get(name, component) for name, component in losses.items()}

    def encode(self, row: Row) -> Unit | None:
        """Tokenize both conversations of a row; see PairEncoder."""
        return self._encoder(*pair(row, system=self._system))

    def prepare(self, units: list[Unit], run: StepRun) -> Iterator[list[Unit]]:
        """Attach the reference's log-probabilities; one step over the global batch."""
        extra: list[dict[str, Any]] = [{} for _ in units]
        if self._uses_nll:
            shares = run.gather((len(units), chosen_tokens(units)))
            scale = sum(p for p, _ in shares) / max(1, sum(t for _, t in shares))
            extra = [{"nll_scale": scale} for _ in units]
        if self.frozen:
            for each, sums in zip(extra, self._reference(units, run), strict=True):
                each["ref_logps"] = sums
        yield [{**unit, **each} for unit, each in zip(units, extra, strict=True)]

    @property
    def _uses_nll(self) -> bool:
        return bool(self.options.rpo_alpha) or not {"sft", "cpo", "orpo"}.isdisjoint(self.losses)

    def collate(self, units: list[Unit]) -> PairBatch:
        """Pack the pairs."""
        return collate_pairs(units)

    def loss(self, out: HeadOut, batch: PairBatch, reduce: Reduce, /) -> LossOutput:
        """Return the weighted losses, summed over this rank's pairs, and their number."""
        pairs = _pairs(out, batch, reduce)
        mine_P = reduce.owns_S[0::2].double()
        total_P = sum(
            weight * self._one(name, pairs, reduce)
            for name, weight in zip(self.losses, self.options.weights, strict=True)
        )
        if self.options.rpo_alpha:
            total_P = total_P + self.options.rpo_alpha * LOSSES["sft"](pairs, self.options)
        assert isinstance(total_P, Tensor)
        metrics = self._metrics(pairs, mine_P)
        metrics |= token_metrics(out, reduce.seq_T % 2 == 0, accuracy=True)
        return LossOutput((total_P * mine_P).sum(), mine_P.sum(), metrics)

    def _one(self, name: str, pairs: Pairs, reduce: Reduce) -> Tensor:
        """Return one loss of each pair."""
        loss = self.losses[name]
        if isinstance(loss, Component):
            loss = self.losses[name] = loss.load()
        if name in SORTING:
            # every pair gets the mean over all ranks' pairs, so that the sum over pairs is the sum
            # of the sorted losses
            return loss(pairs.gathered(reduce), self.options).mean().expand(len(pairs.chosen_P))
        if name == "bco_pair":
            ratios_P2 = torch.stack((pairs.chosen_ratio_P, pairs.rejected_ratio_P), -1)
            if ratios_P2.requires_grad:  # a training pass
                rewards_P2 = self.options.beta * ratios_P2.detach()
                self._mean.update(reduce.gather_seqs(rewards_P2).mean())
            pairs = pairs.with_delta(self._mean.value.to(pairs.chosen_P.device))
        return loss(pairs, self.options)

    def _metrics(self, pairs: Pairs, mine_P: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return shares of TRL's metrics; rewards are beta times policy minus reference."""
        chosen_P, rejected_P = pairs.chosen_ratio_P.detach(), pairs.rejected_ratio_P.detach()
        if set(self.losses) <= PER_TOKEN:
            chosen_P = chosen_P / pairs.chosen_tokens_P
            rejected_P = rejected_P / pairs.rejected_tokens_P
        beta, count = self.options.beta, mine_P.sum()
        values = {
            "rewards/chosen": beta * chosen_P,
            "rewards/rejected": beta * rejected_P,
            "rewards/margins": beta * (chosen_P - rejected_P),
            "rewards/accuracies": (chosen_P > rejected_P).double(),
            "logps/chosen": pairs.chosen_P.detach(),
            "logps/rejected": pairs.rejected_P.detach(),
        }
        if "orpo" in self.losses:
            odds_P = log_odds(pairs).detach()
            values |= {"log_odds_chosen": odds_P, "log_odds_ratio": F.logsigmoid(odds_P)}
        metrics = {name: ((value_P * mine_P).sum(), count) for name, value_P in values.items()}
        if self._uses_nll:
            tokens = (pairs.chosen_tokens_P * mine_P).sum()
            metrics["nll_loss"] = (-(pairs.chosen_P.detach() * mine_P).sum(), tokens)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return BCO's running mean, and what the reference said about the units so far."""
        return {"mean": self._mean.state_dict(), "reference": self._reference.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both."""
        self._mean.load_state_dict(state["mean"])
        self._reference.load_state_dict(state["reference"])


def _pairs(out: HeadOut, batch: PairBatch, reduce: Reduce) -> Pairs:
    """Return sums over answers, in float64."""
    logps_S = reduce.per_seq(out.logps_T.double())
    tokens_S = batch.answer_tokens_S.clamp(min=1)
    return Pairs(
        chosen_P=logps_S[0::2],
        rejected_P=logps_S[1::2],
        ref_chosen_P=batch.ref_logps_S[0::2],
        ref_rejected_P=batch.ref_logps_S[1::2],
        chosen_tokens_P=tokens_S[0::2],
        rejected_tokens_P=tokens_S[1::2],
        nll_scale_P=batch.nll_scale_S[0::2],
        delta=logps_S.new_zeros(()),
    )
