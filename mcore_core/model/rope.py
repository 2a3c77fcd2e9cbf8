"""Rotary position embeddings for packed rows: one table of cosines and sines a row.

Frequencies come from transformers' `ROPE_INIT_FUNCTIONS`, so every `rope_scaling` type means what
it means there. Types whose frequencies depend on the sequence length (dynamic, longrope) are
undefined in a packed row: they are fixed for the run by `max_length`.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mcore_core.errors import usage_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcore_core.model.architecture import Architecture
    from mcore_core.model.packed import PackedRow


def rope_frequencies(architecture: "Architecture", max_length: int | None) -> tuple[Tensor, float]:
    """Return the inverse frequencies [D/2], float32, and the factor on cosine and sine."""
    size, percent = architecture.kv_channels, architecture.rotary_percent
    if architecture.mla is not None:  # only a part of each head has positions, and all of that part
        size, percent = architecture.mla.qk_rope_head_dim, 1.0
    from transformers import PretrainedConfig  # noqa: PLC0415  (slow to import)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: PLC0415

    scaling = dict(architecture.rope_scaling or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    dim = int(size * percent)
    if kind == "default":
        exponent = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        return 1.0 / (architecture.rotary_base**exponent), 1.0
    if kind not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(["default", *sorted(ROPE_INIT_FUNCTIONS)])
        raise usage_error("MC502", f"unknown rope type {kind!r} in rope_scaling", f"known: {known}")
    parameters = scaling | {
        "rope_type": kind,
        "rope_theta": architecture.rotary_base,
        "partial_rotary_factor": percent,
    }
    fields: dict[str, Any] = {
        "hidden_size": architecture.hidden_size,
        "num_attention_heads": architecture.num_attention_heads,
        "head_dim": size,
        "max_position_embeddings": architecture.max_position_embeddings,
        "rope_parameters": parameters,
    }
    config: Any = PretrainedConfig(**fields)
    config.standardize_rope_params()
    inverse, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=max_length)
    return inverse.float(), float(factor)


def rotate(x: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate the first D channels of x [T, heads, head size] by their positions' angles."""
    size = cos_TD.shape[-1]
    rotated, rest = x[..., :size], x[..., size:]
    a, b = rotated.chunk(2, dim=-1)
    turned = torch.cat((-b, a), dim=-1)
    out = rotated * cos_TD.unsqueeze(1) + turned * sin_TD.unsqueeze(1)
    return torch.cat((out, rest), dim=-1) if rest.shape[-1] else out


def rotate_neighbours(x: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate as `rotate` does, where channels 2i and 2i + 1 are a pair, not i and i + D / 2."""
    size = cos_TD.shape[-1]
    rotated, rest = x[..., :size], x[..., size:]
    turned = torch.stack((-rotated[..., 1::2], rotated[..., ::2]), dim=-1).flatten(-2)
    out = rotated * cos_TD.unsqueeze(1) + turned * sin_TD.unsqueeze(1)
    return torch.cat((out, rest), dim=-1) if rest.shape[-1] else out


def rotate_pair(q: Tensor, k: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys."""
    return rotate(q, cos_TD, sin_TD), rotate(k, cos_TD, sin_TD)


def rotate_pair_neighbours(
    q: Tensor, k: Tensor, cos_TD: Tensor, sin_TD: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, neighbouring channels together."""
    return rotate_neighbours(q, cos_TD, sin_TD), rotate_neighbours(k, cos_TD, sin_TD)


class Rope:
    """The rotary table of one model, or of those of its layers that share a base."""

    def __init__(
        self, architecture: "Architecture", *, max_length: int | None, fused: bool = True
    ) -> None:
        self.inverse, self.factor = rope_frequencies(architecture, max_length)
        self.interleaved = architecture.rotary_interleaved
        self._plain = rotate_pair_neighbours if self.interleaved else rotate_pair
        self._apply: Callable[..., Any] = self._plain
        self._fused = fused

    def tables(self, row: "PackedRow", dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosine and sine [T, D] of this rank's tokens, computed once a row."""
        key = ("rope", id(self))
        if key not in row.cache:
            assert row.positions_T is not None
            positions_T = row.positions_T
            self.inverse = self.inverse.to(positions_T.device)  # copied once, not every row
            angles = torch.outer(positions_T.float(), self.inverse)
            angles = angles.repeat_interleave(2, 1) if self.interleaved else angles.repeat(1, 2)
            row.cache[key] = (
                (angles.cos() * self.factor).to(dtype),
                (angles.sin() * self.factor).to(dtype),
            )
        found: tuple[Tensor, Tensor] = row.cache[key]
        return found

    def apply(self, q: Tensor, k: Tensor, row: "PackedRow") -> tuple[Tensor, Tensor]:
        """Return q and k [T, heads, head size] rotated by the positions of the row."""
        cos_TD, sin_TD = self.tables(row, q.dtype)
        if q.is_cuda and self._fused:
            if self._apply is self._plain:
                self._apply = torch.compile(self._plain, dynamic=True)
            rotated: tuple[Tensor, Tensor] = self._apply(q, k, cos_TD, sin_TD)
            return rotated
        return self._plain(q, k, cos_TD, sin_TD)
