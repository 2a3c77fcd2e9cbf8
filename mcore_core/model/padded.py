"""Segments of a packed row as batches of equal length: attention is then few calls, not one each.

Segments of about the same length are padded to the longest of them: with a causal mask what stands
behind a sequence changes nothing in it. Both ways are gathers, in the backward pass too: slices
would each fill a gradient of the whole row.

Shapes: T tokens of the row, B segments of a batch, L tokens of the longest of them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcore_core.model.packed import Segment

WASTE = 1.15
"""Padding included, a batch has at most so many times the tokens of its segments."""


@dataclass(frozen=True, slots=True)
class Batches:
    """How the tokens of a row are arranged in batches, and back."""

    shapes: tuple[tuple[int, int], ...]
    """(B, L) of each batch."""
    index: Tensor
    """Which token of the row stands at each place of all batches, one after another, int64. Places
    of padding repeat the segment's last token."""
    inverse_T: Tensor
    """At which of those places each token of the row stands, int64."""

    def spread(self, values: Tensor) -> Tensor:
        """Return [T, ...] at the places of the batches, [places, ...]."""
        found: Tensor = _Gather.apply(values, self.index, self.inverse_T)  # type: ignore[no-untyped-call]
        return found

    def collect(self, values: Tensor) -> Tensor:
        """Return [places, ...] in the order of the row, [T, ...]."""
        found: Tensor = values.index_select(0, self.inverse_T)
        return found


class _Gather(torch.autograd.Function):
    """index_select whose gradient is one as well: places of padding have none."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, inverse: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(inverse)
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


def batches_of(segments: "Sequence[Segment]", device: torch.device) -> Batches | None:
    """Return the batches, the shortest segments first; None where a segment sees more than itself.

    Args:
        segments: What the row consists of, in its order.
        device: Of the indices.
    """
    if any(s.q_start != s.k_start or s.q_len != s.k_len for s in segments):
        return None
    ordered = sorted(segments, key=lambda s: (s.q_len, s.q_start))
    groups: list[list[Segment]] = []
    tokens = 0
    for segment in ordered:
        tokens += segment.q_len
        if groups and (len(groups[-1]) + 1) * segment.q_len <= WASTE * tokens:
            groups[-1].append(segment)
        else:
            groups.append([segment])
            tokens = segment.q_len
    index, inverse = [], torch.empty(sum(s.q_len for s in segments), dtype=torch.long)
    base = 0
    for group in groups:
        longest = group[-1].q_len
        starts = torch.tensor([s.q_start for s in group])[:, None]
        lengths = torch.tensor([s.q_len for s in group])[:, None]
        offsets = torch.arange(longest)[None]
        places = base + torch.arange(len(group) * longest).view(len(group), longest)
        tokens_BL = starts + torch.minimum(offsets, lengths - 1)
        real = offsets < lengths
        inverse[tokens_BL[real]] = places[real]
        index.append(tokens_BL.flatten())
        base += len(group) * longest
    return Batches(
        shapes=tuple((len(g), g[-1].q_len) for g in groups),
        index=torch.cat(index).to(device),
        inverse_T=inverse.to(device),
    )
