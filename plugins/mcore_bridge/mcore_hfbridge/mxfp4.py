"""Experts in mxfp4, as gpt_oss is published: blocks of 32 four-bit floats with one exponent each.

A tensor [expert, in, out] is stored as NAME_blocks [expert, out, in / 32, 16], two values a byte,
the first in the low half, and NAME_scales [expert, out, in / 32], exponents of two, 127 for 1 (OCP
Microscaling Formats 1.0, section 6.3). What it stands for is exact in float32, and in bfloat16.
"""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from mcore_core.model.family import Shape

BLOCKS, SCALES = "_blocks", "_scales"
BLOCK = 32
"""Values that share an exponent."""
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127


def shape_of(blocks: "Shape", scales: "Shape") -> "Shape | None":
    """Return the shape of what blocks and scales stand for; None where they do not belong."""
    if len(blocks) != 4 or blocks[:-1] != scales or blocks[-1] != BLOCK // 2:
        return None
    return (blocks[0], blocks[2] * BLOCK, blocks[1])


def unpacked(
    slices: tuple[slice, ...],
    read_blocks: "Callable[[tuple[slice, ...]], Tensor]",
    read_scales: "Callable[[tuple[slice, ...]], Tensor]",
) -> "Tensor":
    """Return a box [expert, in, out] in float32, reading only the blocks that it touches."""
    experts, inputs, outputs = slices
    first, last = inputs.start // BLOCK, (inputs.stop - 1) // BLOCK + 1
    at = (experts, outputs, slice(first, last))
    packed = read_blocks((*at, slice(0, BLOCK // 2)))
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).long()
    values = torch.tensor((*_POSITIVE, *(-v for v in _POSITIVE)))[codes]
    exponents = read_scales(at).int() - _BIAS
    whole = torch.ldexp(values, exponents.unsqueeze(-1)).flatten(-2)
    skipped = inputs.start - first * BLOCK
    return whole.narrow(-1, skipped, inputs.stop - inputs.start).transpose(1, 2)
