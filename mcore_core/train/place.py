"""Lay a micro-batch out for this rank: pad its sequences, take this rank's tokens, move them.

Shapes: T tokens of the whole row before this module and of this rank's part after it; S sequences.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mcore_core.model.packed import PackedRow, zigzag_index
from mcore_core.parallel.reduce import RowReduce
from mcore_core.protocols import Batch

if TYPE_CHECKING:
    from mcore_core.model.divergence import Teacher
    from mcore_core.parallel.topology import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """What a depth of multi-token prediction reads and predicts."""

    tokens_T: Tensor
    targets_T: Tensor
    weights_T: Tensor
    trained: Tensor
    """As in Placed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """One micro-batch as this rank computes it."""

    batch: Batch
    """Fields ending in `_T` hold this rank's tokens, padding included."""
    row: PackedRow
    reduce: RowReduce
    trained: Tensor
    """Which of this rank's tokens have a weight, as indices."""
    source: Tensor
    """Where each of this rank's tokens stands in the row before padding; -1 where it is padding."""
    tokens: int
    """Tokens of the whole micro-batch, padding not counted."""
    ahead: tuple[Ahead, ...] = ()
    """For each depth of multi-token prediction."""
    teacher: "Teacher | None" = None
    """What the head compares the trained tokens with, on the last pipeline stage."""


def select(batch: Batch, index: Tensor | slice) -> Batch:
    """Return the batch with every per-token field reduced to the tokens of `index`."""
    return _map_tokens(batch, lambda values_T: values_T[index])


def _map_tokens(batch: Batch, function: Any) -> Batch:  # noqa: ANN401
    names = [f.name for f in dataclasses.fields(batch) if f.name.endswith("_T")]
    changed = {n: function(v) for n in names if (v := getattr(batch, n)) is not None}
    return dataclasses.replace(batch, **changed)


def padded_lengths(lengths: tuple[int, ...], layout: "Layout", row_multiple: int = 1) -> list[int]:
    """Return the length of each sequence after padding; at least one sequence, never empty."""
    step = layout.seq_multiple
    row = math.lcm(layout.row_multiple, row_multiple)
    padded = [-(-n // step) * step for n in lengths] or [max(step, row)]
    padded[-1] += -sum(padded) % row
    return padded


def place(
    batch: Batch,
    layout: "Layout",
    device: torch.device,
    *,
    cp_rank: int = 0,
    cp_group: Any = None,  # noqa: ANN401
    dp_group: Any = None,  # noqa: ANN401
    row_multiple: int = 1,
    pin_memory: bool = False,
    depths: int = 0,
) -> Placed:
    """Return this rank's part of a micro-batch, on the device.

    Sequences are padded to `layout.seq_multiple` and the row to `layout.row_multiple` and
    `row_multiple`; every per-token field is 0 on padding, so nothing there counts. `depths` of
    multi-token prediction are prepared.
    """
    padded = padded_lengths(batch.lengths, layout, row_multiple)
    real = list(batch.lengths) or [0]
    cu = [0, *accumulate(padded)]
    every = np.arange(cu[-1])
    sequence = np.repeat(np.arange(len(padded)), padded)
    position = every - np.asarray(cu[:-1])[sequence]
    # before a sequence there is the padding of those before it
    added = np.asarray(cu[:-1]) - np.asarray([0, *accumulate(real)][:-1])
    source = np.where(position < np.asarray(real)[sequence], every - added[sequence], -1)
    if layout.cp > 1:
        mine = zigzag_index(cu, cp_rank, layout.cp).numpy()
        source, position, sequence = source[mine], position[mine], sequence[mine]
    is_real = source >= 0
    source_T = torch.from_numpy(source)
    whole = layout.cp == 1 and cu[-1] == sum(batch.lengths)

    def gather(values_T: Tensor) -> Tensor:
        if whole:
            return values_T
        if not len(values_T):
            return values_T.new_zeros(len(source_T), *values_T.shape[1:])
        picked_T = values_T[source_T.clamp(min=0)]
        picked_T[source_T < 0] = 0
        return picked_T

    routing_TLK = None
    if batch.routing_TLK is not None:
        routing_TLK = torch.where((source_T >= 0)[:, None, None], gather(batch.routing_TLK), -1)
    local = dataclasses.replace(_map_tokens(batch, gather), routing_TLK=None)
    trained = local.weights_T.nonzero().squeeze(-1)

    def move(values: Tensor) -> Tensor:
        if values.device == device:
            return values
        # from pinned memory a copy does not wait for what the device still computes
        return (values.pin_memory() if pin_memory else values).to(device, non_blocking=True)

    numbered = np.where(is_real, sequence + 1, 0)
    row = PackedRow.build(cu, move(torch.from_numpy(position)), move(torch.from_numpy(numbered)))
    if routing_TLK is not None:
        row.routing_TLK = move(routing_TLK)
    owns_S = np.zeros(len(real), dtype=np.bool_)
    owns_S[sequence[(position == 0) & is_real]] = True
    return Placed(
        batch=_move(local, move),
        row=row,
        reduce=RowReduce(
            move(torch.from_numpy(sequence)), move(torch.from_numpy(owns_S)), cp_group, dp_group
        ),
        trained=move(trained),
        source=source_T,
        tokens=sum(batch.lengths),
        ahead=tuple(_ahead(batch, depth, gather, move) for depth in range(1, depths + 1)),
    )


def _ahead(batch: Batch, depth: int, gather: Any, move: Any) -> Ahead:  # noqa: ANN401
    """Return what stands `depth` positions later in each sequence, zeros beyond its end."""
    index = torch.arange(len(batch.tokens_T)) + depth
    ends = torch.repeat_interleave(
        torch.tensor(list(accumulate(batch.lengths)), dtype=torch.long),
        torch.tensor(batch.lengths, dtype=torch.long),
    )
    inside = index < ends
    index = torch.where(inside, index, 0)

    def later(values_T: Tensor) -> Tensor:
        picked: Tensor = gather(torch.where(inside, values_T[index], 0))
        return picked

    weights_T = later(batch.weights_T)
    return Ahead(
        tokens_T=move(later(batch.tokens_T)),
        targets_T=move(later(batch.targets_T)),
        weights_T=move(weights_T),
        trained=move(weights_T.nonzero().squeeze(-1)),
    )


def _move(batch: Batch, move: Callable[[Tensor], Tensor]) -> Batch:
    moved = {
        f.name: move(value)
        for f in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, f.name), Tensor)
    }
    return dataclasses.replace(batch, **moved)  # type: ignore[arg-type]  # tensor fields only
