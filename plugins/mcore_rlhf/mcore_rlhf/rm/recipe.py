"""Reward models: a unit is a pair of answers, and the score of each is read at its last token.

K tokens that are read, S = 2 P sequences, P pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

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
from mcore_rlhf.pairs import PairEncoder, sides
from mcore_rlhf.rm.config import RMConfig
from mcore_rlhf.rm.loss import pair_loss
from mcore_rlhf.rows import PAIR_COLUMNS, PAIR_FIELDS, PAIR_HELP, margin, pair, recognize_pair


@dataclass(frozen=True, slots=True, kw_only=True)
class RMBatch(Batch):
    """A packed row of pairs; the last token of each answer has weight 1."""

    margin_S: Tensor
    """By how much the chosen answer of the pair is better, float64."""


class RMRecipe:
    """Bradley-Terry over the scores of two answers."""

    fields: ClassVar[frozenset[str]] = PAIR_FIELDS
    formats_help: ClassVar[str] = PAIR_HELP
    columns_example: ClassVar[str] = PAIR_COLUMNS
    recognize = staticmethod(recognize_pair)
    token_local = False

    def __init__(self, config: RunConfig, template: Template) -> None:
        self.options = config[RMConfig]
        self.head = HeadSpec(output="scores", scores=1)
        self.frozen: dict[str, FrozenModel] = {}
        self._system = template.system
        self._pad_id: int | None = template.tokenizer.pad_token_id
        self._encoder = PairEncoder(template)

    def encode(self, row: Row) -> Unit | None:
        """Tokenize both conversations of a row; see PairEncoder."""
        return {**self._encoder(*pair(row, system=self._system)), "margin": margin(row)}

    def prepare(self, units: list[Unit], run: StepRun) -> Iterator[list[Unit]]:
        """One optimizer step over the global batch."""
        yield units

    def collate(self, units: list[Unit]) -> RMBatch:
        """Pack the pairs and mark where scores are read."""
        ids = [ids for unit in units for ids, _ in sides(unit)]
        margins = [unit.get("margin", 0.0) for unit in units for _ in range(2)]
        return RMBatch(
            **pack_marked([(each, last_token(each, self._pad_id)) for each in ids]),
            margin_S=torch.tensor(margins, dtype=torch.float64),
        )

    def loss(self, out: HeadOut, batch: RMBatch, reduce: Reduce, /) -> LossOutput:
        """Return the losses, summed over this rank's pairs, and their number."""
        assert out.values_TN is not None, "the head gives scores"
        scores_S = reduce.per_seq(out.values_TN.double()).squeeze(-1)
        chosen_P, rejected_P = scores_S[0::2], scores_S[1::2]
        mine_P = reduce.owns_S[0::2].double()
        loss_P = pair_loss(
            chosen_P,
            rejected_P,
            margin_P=batch.margin_S[0::2],
            center=self.options.center_rewards_coefficient,
        )
        count = mine_P.sum()
        chosen_P, rejected_P = chosen_P.detach(), rejected_P.detach()
        values = {
            "accuracy": (chosen_P > rejected_P).double(),
            "margin": chosen_P - rejected_P,
            "mean_reward": (chosen_P + rejected_P) / 2,
            "rewards/chosen": chosen_P,
            "rewards/rejected": rejected_P,
        }
        metrics = {name: ((value_P * mine_P).sum(), count) for name, value_P in values.items()}
        mine_S, scores_S = reduce.owns_S, scores_S.detach()
        infinite_S = torch.full_like(scores_S, torch.inf)
        return LossOutput(
            (loss_P * mine_P).sum(),
            count,
            metrics,
            highest={"max_reward": torch.where(mine_S, scores_S, -infinite_S).amax()},
            lowest={"min_reward": torch.where(mine_S, scores_S, infinite_S).amin()},
        )

    def state_dict(self) -> dict[str, Any]:
        """Nothing changes while training."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
