"""What experts need to know about the tokens of a packed row, for this rank's part of it.

Shapes: T tokens of this rank in the experts' layer, L layers with experts, K chosen experts.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from mcore_core.model.packed import PackedRow

_SEQUENCE = 2**32
"""A token's place in its row is its sequence times this plus its position."""


@dataclass(frozen=True, slots=True)
class RowTokens:
    """The tokens that a rank sends to experts."""

    sequence_T: Tensor
    """The sequence of each token, from 1, and 0 for padding."""
    order_T: Tensor
    """A number that grows along the row, whatever rank a token is on."""
    replay_TK: Tensor | None = None
    """Experts to take instead of choosing, -1 where the router chooses; None: everywhere."""

    @property
    def real_T1(self) -> Tensor:
        """True for what is not padding, [T, 1]."""
        return (self.sequence_T > 0).unsqueeze(-1)


def row_tokens(
    row: "PackedRow",
    device: torch.device,
    *,
    layer: int | None,
    part: int = 0,
    parts: int = 1,
) -> RowTokens | None:
    """Return this rank's tokens of a row; None where the row does not say.

    Args:
        row: The packed row.
        device: Where the experts are.
        layer: Which of the row's replayed layers this is; None for none.
        part: Which part of the context-parallel rank's tokens this tensor-parallel rank takes.
        parts: Into how many they are divided; filled up with padding to a multiple of it.
    """
    if row.sequence_T is None or row.positions_T is None:
        return None
    more = -len(row.sequence_T) % parts

    def mine(values_T: Tensor, filler: int = 0) -> Tensor:
        pad = [0, 0] * (values_T.dim() - 1) + [0, more]
        return F.pad(values_T, pad, value=filler).chunk(parts)[part].to(device)

    sequence_T = mine(row.sequence_T)
    replay = None
    if layer is not None and row.routing_TLK is not None:
        replay = mine(row.routing_TLK[:, layer].long(), -1)
    order_T = sequence_T * _SEQUENCE + mine(row.positions_T)
    return RowTokens(sequence_T, order_T, replay)


def one_sequence(tokens: int, device: torch.device) -> RowTokens:
    """Return the description of tokens of which nothing is known: one sequence, no padding."""
    ones_T = torch.ones(tokens, dtype=torch.long, device=device)
    return RowTokens(ones_T, _SEQUENCE + torch.arange(tokens, device=device))
