"""Weights in fp8 with one scale a block of rows and columns, as DeepSeek-V3 publishes them."""

from pathlib import Path
from typing import TYPE_CHECKING

from mcore_core.errors import usage_error
from mcore_core.model.resolve import read_hf_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from mcore_core.model.family import Shape


def read_block(folder: Path) -> "Shape":
    """Return the block that shares a scale, from the folder's config.json."""
    quantization = read_hf_config(folder).get("quantization_config") or {}
    block = quantization.get("weight_block_size")
    if isinstance(block, list) and len(block) == 2 and all(type(n) is int for n in block):
        return tuple(block)
    raise usage_error(
        "MC536",
        f"{folder} holds fp8 weights, and its config.json does not say their weight_block_size",
        f"found: quantization_config = {quantization!r}",
        "fix: copy config.json again from where the model came from",
    )


def dequantized(
    box: "Tensor",
    slices: tuple[slice, ...],
    block: "Shape",
    read_scale: "Callable[[tuple[slice, ...]], Tensor]",
) -> "Tensor":
    """Return a box of an fp8 matrix in float32, reading only the scales of its blocks."""
    scales = read_scale(
        tuple(
            slice(s.start // n, (s.stop - 1) // n + 1) for s, n in zip(slices, block, strict=True)
        )
    ).float()
    for axis, (s, n) in enumerate(zip(slices, block, strict=True)):
        scales = scales.repeat_interleave(n, dim=axis)
        scales = scales.narrow(axis, s.start % n, s.stop - s.start)
    return box.float() * scales
