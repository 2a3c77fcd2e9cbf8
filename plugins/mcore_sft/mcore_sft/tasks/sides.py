"""Units of several texts: a query, documents that suit it and that do not. L tokens, K texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from mcore_core.protocols import Batch, Unit
from mcore_sft.tasks.vectors import NEGATIVE, POSITIVE, QUERY

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class SidesBatch(Batch):
    """A packed row of units: of each the query, its positive documents, its negative ones."""

    roles_S: Tensor
    """What each sequence is, int64; see vectors."""
    labels_S: Tensor
    """The label of each sequence's unit, float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedBatch(Batch):
    """A packed row of units: of each the positive documents, then the negative ones."""

    roles_S: Tensor
    """What each sequence is, int64; see vectors."""
    unit_S: Tensor
    """Index of the unit that each sequence belongs to, int64."""


type Sides = "Sequence[NDArray[np.int32]]"
type Marked = "tuple[NDArray[Any], NDArray[Any]]"


def joined(queries: Sides, positives: Sides, negatives: Sides) -> Unit:
    """Return a unit of token ids.

    Returns:
        `input_ids` and `weights`, [L], of all texts; each one's last token has weight 1.
        `lengths` and `roles`, [K]. `length`, which is L.
    """
    texts = [*queries, *positives, *negatives]
    lengths = np.array([len(ids) for ids in texts], np.int32)
    counts = [len(queries), len(positives), len(negatives)]
    weights = np.zeros(int(lengths.sum()), np.float32)
    weights[np.cumsum(lengths) - 1] = 1.0
    return {
        "input_ids": np.concatenate(texts),
        "weights": weights,
        "lengths": lengths,
        "roles": np.repeat(np.array([QUERY, POSITIVE, NEGATIVE], np.int32), counts),
        "length": int(lengths.sum()),
    }


def collate_sides(units: Sequence[Unit]) -> tuple[list[Marked], list[int], list[float]]:
    """Return ids and marks, role and label of each text of these units."""
    sequences: list[Marked] = []
    roles: list[int] = []
    labels: list[float] = []
    for unit in units:
        cuts = np.cumsum(np.asarray(unit["lengths"]))[:-1]
        ids = np.split(np.asarray(unit["input_ids"]), cuts)
        marks = np.split(np.asarray(unit["weights"], np.float32), cuts)
        sequences += zip(ids, marks, strict=True)
        roles += np.asarray(unit["roles"]).tolist()
        labels += [float(unit.get("label", 0.0))] * len(ids)
    return sequences, roles, labels
