"""Units and micro-batches of two answers to one prompt.

A unit is a pair: the tokens of the chosen conversation, then those of the rejected one. A packed
row therefore holds both sides of each of its pairs. T tokens of a row, S sequences, P pairs:
S = 2 P, and sequences 2p and 2p + 1 are the chosen and the rejected answer of pair p.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mcore_core.data.collate import pack_sequences
from mcore_core.data.rows import Conversation, RowDropped, RowError
from mcore_core.data.template import TOO_LONG, Template
from mcore_core.protocols import Batch, Unit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mcore_core.data.template import Encoded

ONE_TOO_LONG = "one answer of the pair, and not the other, is longer than --max_length"
ANSWERS_TOO_LONG = "the answers of the pair alone are longer than --max_length"
SAME = "the chosen and the rejected answer are the same tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatch(Batch):
    """A packed row of pairs."""

    ref_logps_S: Tensor
    """Summed log-probability of each answer under the reference, nats, float64; 0 without one."""
    answer_tokens_S: Tensor
    """Tokens of each answer that train, float64."""
    nll_scale_S: Tensor
    """Pairs of the global batch by the trained tokens of its chosen answers, float64."""


class PairEncoder:
    """Encodes two conversations into one unit; truncation treats both alike."""

    def __init__(self, template: Template) -> None:
        self.max_length = template.max_length
        self.strategy = template.config.truncation_strategy
        self.all_train = template.config.loss_scale.startswith("all")
        self._whole = copy.copy(template)
        self._whole.max_length = None

    def __call__(self, chosen: Conversation, rejected: Conversation) -> Unit:
        """Return `input_ids` and `weights` of both, [L], `chosen_length` and `length`, which is L.

        Raises:
            RowError: Both answers are the same tokens.
            RowDropped: Too long, or nothing to train on. `delete` leaves out a pair whose longer
                side is longer than max_length; `left` takes the same tokens off the common prompt
                of both, or leaves the pair out where the answers alone are too long; `right` cuts
                both answers at the same place, and leaves out a pair of which only one would lose.
        """
        sides = [self._whole.encode(chosen), self._whole.encode(rejected)]
        if np.array_equal(sides[0].input_ids, sides[1].input_ids):
            raise RowError(SAME)
        (a, wa), (b, wb) = self._fitted(*sides)
        return {
            "input_ids": np.concatenate((a, b)),
            "weights": np.concatenate((wa, wb)),
            "chosen_length": len(a),
            "length": len(a) + len(b),
        }

    def _fitted(self, *sides: "Encoded") -> "list[tuple[NDArray[Any], NDArray[Any]]]":
        pairs = [(side.input_ids, side.weights) for side in sides]
        lengths = [len(ids) for ids, _ in pairs]
        limit = self.max_length
        if limit is None or max(lengths) <= limit:
            return pairs
        match self.strategy:
            case "left":
                excess = max(lengths) - limit
                if excess >= self._prompt_length(*sides):  # one token stays, to predict from
                    raise RowDropped(ANSWERS_TOO_LONG)
                cut = [(ids[excess:], weights[excess:].copy()) for ids, weights in pairs]
                for _, weights in cut:
                    weights[0] = 0.0
            case "right":
                if min(lengths) <= limit:
                    raise RowDropped(ONE_TOO_LONG)
                cut = [(ids[:limit], weights[:limit]) for ids, weights in pairs]
                if np.array_equal(cut[0][0], cut[1][0]) or not all(w.any() for _, w in cut):
                    raise RowDropped(ANSWERS_TOO_LONG)
            case _:
                raise RowDropped(TOO_LONG)
        return cut

    def _prompt_length(self, chosen: "Encoded", rejected: "Encoded") -> int:
        """Return how many tokens at the beginning are common, and not part of an answer."""
        size = min(len(chosen.input_ids), len(rejected.input_ids))
        differ = np.flatnonzero(chosen.input_ids[:size] != rejected.input_ids[:size])
        common = int(differ[0]) if len(differ) else size
        if self.all_train:
            return common
        firsts = [int(np.flatnonzero(side.weights)[0]) for side in (chosen, rejected)]
        return min(common, *firsts)


def sides(unit: Unit) -> "list[tuple[NDArray[Any], NDArray[Any]]]":
    """Return ids and weights of the chosen and of the rejected side."""
    ids = np.asarray(unit["input_ids"])
    weights = np.asarray(unit["weights"], np.float32)
    at = unit["chosen_length"]
    return [(ids[:at], weights[:at]), (ids[at:], weights[at:])]


def answer_tokens(weights: "NDArray[Any]") -> int:
    """Return how many tokens of one side train; the first is never predicted."""
    return int(np.count_nonzero(weights[1:]))


def chosen_tokens(units: Sequence[Unit]) -> int:
    """Return how many tokens of all chosen answers train."""
    return sum(answer_tokens(sides(unit)[0][1]) for unit in units)


def sum_sides(unit: Unit, logps: "NDArray[Any]") -> tuple[float, float]:
    """Return the sums of a unit's log-probabilities over its chosen and its rejected answer."""
    at = unit["chosen_length"]
    return float(logps[:at].sum(dtype=np.float64)), float(logps[at:].sum(dtype=np.float64))


def collate_pairs(units: Sequence[Unit]) -> PairBatch:
    """Pack pairs. `ref_logps` (chosen, rejected) and `nll_scale` are what `prepare` attached."""
    sequences = [side for unit in units for side in sides(unit)]
    tokens = [answer_tokens(weights) for _, weights in sequences]
    refs = [value for unit in units for value in unit.get("ref_logps", (0.0, 0.0))]
    scales = [unit.get("nll_scale", 0.0) for unit in units for _ in range(2)]
    return PairBatch(
        **pack_sequences(sequences),
        ref_logps_S=torch.tensor(refs, dtype=torch.float64),
        answer_tokens_S=torch.tensor(tokens, dtype=torch.float64),
        nll_scale_S=torch.tensor(scales, dtype=torch.float64),
    )
