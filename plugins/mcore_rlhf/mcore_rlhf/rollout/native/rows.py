"""Packed rows of generation: whole prompts, and one token a slot.

Shapes: T tokens of the row, padding included; S prompts; N slots.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mcore_core.model.decode import DecodeState, Kept
from mcore_core.model.packed import PackedRow
from mcore_rlhf.rollout.native.steps import Size

if TYPE_CHECKING:
    from mcore_core.model.build import ModelPlan
    from mcore_rlhf.rollout.native.slots import Ints

KEYS = 64
"""On a GPU a step looks at a multiple of so many positions."""
FEWEST = 8
"""On a GPU a step has at least so many rows."""


def row_multiple(plan: "ModelPlan") -> int:
    """Return what the tokens of a row are padded to."""
    tokens = plan.layout.tp if plan.layout.sp else 1
    return math.lcm(tokens, max(1, plan.row_multiple // plan.layout.cp))


@dataclass(frozen=True, slots=True)
class Input:
    """What a pass through the model reads."""

    tokens_T: Tensor
    row: PackedRow


def prompts(
    sequences: Sequence[Sequence[int]],
    slots: "Ints",
    state: DecodeState,
    *,
    multiple: int,
    device: torch.device,
) -> Input:
    """Return the row of some prompts, to be kept in `slots`; padding is a sequence of its own."""
    lengths = [len(s) for s in sequences]
    total = sum(lengths)
    padding = -total % multiple if total else multiple
    if padding:
        lengths.append(padding)
    cu = np.concatenate(([0], np.cumsum(lengths)))
    positions = np.arange(cu[-1]) - np.repeat(cu[:-1], lengths)
    tokens = np.zeros(cu[-1], np.int64)
    tokens[:total] = np.fromiter((t for s in sequences for t in s), np.int64, total)
    owners = np.repeat(slots, lengths[: len(slots)])
    ints = torch.from_numpy(np.stack((tokens, positions))).to(device, non_blocking=True)
    row = PackedRow.build(cu.tolist(), ints[1])
    where = torch.from_numpy(owners).to(device, non_blocking=True)
    row.kept = Kept(state, where, ints[1, :total])
    return Input(ints[0], row)


def step_size(
    number: int, keys: int, *, multiple: int, most: int, capacity: int, few: bool, fused: bool
) -> Size:
    """Return how many rows and positions a step has.

    Args:
        number: Slots in use.
        keys: Tokens of the longest sequence after the last step that is to run.
        multiple: What rows are padded to.
        most: Slots there can be.
        capacity: Tokens a slot has room for.
        few: Let few different sizes come up, for each is recorded, or has kernels chosen for it.
        fused: Attention reads lengths on the device, whatever `keys` says.
    """
    if not few:
        rows = -(-number // multiple) * multiple
        return Size(rows=rows, wanted=number, keys=min(capacity, keys))
    rows = -(-min(max(FEWEST, 2 ** (number - 1).bit_length()), most) // multiple) * multiple
    looked = capacity
    if not fused:
        octave = max(KEYS, 2 ** (keys - 1).bit_length() // 4)
        looked = min(capacity, -(-keys // octave) * octave)
    return Size(rows=rows, wanted=rows, keys=looked)
