"""What generation keeps of earlier tokens, and attention of one new token a slot over it.

A slot holds one sequence: keys and values by position, and the states of linear attention. Rows
that carry a `Kept` are computed as in training, context parallelism aside, and remembered.

Shapes: T tokens of a row, N slots in one step, K positions that are looked at, G groups of keys,
D head size.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from mcore_core.model.packed import PackedRow

type Place = tuple[str, int]
"""What is kept ("kv", "conv", "recurrent"), and of which HF layer."""


class DecodeState:
    """Tensors of every layer, the slot first; layers allocate them when they first store.

    Args:
        slots: Sequences that can be kept.
        capacity: Tokens of each.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self._kept: dict[Place, tuple[Tensor, ...]] = {}

    def grow(self, slots: int, capacity: int) -> None:
        """Make room for at least so many slots and tokens, keeping what is there."""
        more_slots = max(0, slots - self.slots)
        more_tokens = max(0, capacity - self.capacity)
        self.slots, self.capacity = self.slots + more_slots, self.capacity + more_tokens
        if not (more_slots or more_tokens):
            return
        for place in self._kept:
            wider = [0, 0, 0, more_tokens] if place[0] == "kv" else [0, 0, 0, 0]
            self._kept[place] = tuple(
                F.pad(t, [*wider, *[0] * (2 * (t.dim() - 3)), 0, more_slots])
                for t in self._kept[place]
            )

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy slots `source` over slots `target`, both [n], int64; none is in both."""
        for tensors in self._kept.values():
            for tensor in tensors:
                tensor.index_copy_(0, target, tensor.index_select(0, source))

    def keys_values(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a layer, [slots, G, capacity, D].

        Args:
            layer: The HF layer.
            key: Of this rank's groups, [T, G, D]: gives sizes, dtype and device.
            value: [T, G, size of a value].
        """
        place = ("kv", layer)
        if place not in self._kept:
            self._kept[place] = tuple(
                x.new_zeros(self.slots, x.shape[1], self.capacity, x.shape[2]) for x in (key, value)
            )
        keys, values = self._kept[place]
        return keys, values

    def states(self, name: str, layer: int, like: Tensor) -> Tensor:
        """Return a state of linear attention, [slots, ...], allocated as one slot of `like`."""
        place = (name, layer)
        if place not in self._kept:
            self._kept[place] = (like.new_zeros(self.slots, *like.shape[1:]),)
        return self._kept[place][0]


@dataclass(frozen=True, slots=True)
class Kept:
    """How a row of generation uses the state."""

    state: DecodeState
    slots_T: Tensor
    """Slot of each token, int64. Tokens of the row beyond these are padding, and not kept."""
    positions_T: Tensor
    """Position of each of those tokens in its sequence, int64."""
    keys: int | None = None
    """Of a step, in which slots 0, 1, .. have one token each: how many positions are looked at, at
    least those of the longest sequence with its new token. None: sequences from their beginning."""

    def store(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values of the row, [T, G, D]; return those of all slots."""
        keys, values = self.state.keys_values(layer, key, value)
        kept = len(self.slots_T)
        keys[self.slots_T, :, self.positions_T] = key[:kept]
        values[self.slots_T, :, self.positions_T] = value[:kept]
        return keys, values


def visible(row: "PackedRow", kept: Kept, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return 0 for positions that each slot's token sees, minus infinity else, [N, 1, 1, K].

    Computed once a row.
    """
    name = ("visible", window)
    if name not in row.cache:
        positions_N1 = kept.positions_T.unsqueeze(-1)
        index_K = torch.arange(kept.keys or 0, device=positions_N1.device)
        hidden_NK = index_K > positions_N1
        if window is not None:
            hidden_NK |= index_K < positions_N1 - window
        zeros = torch.zeros(hidden_NK.shape, dtype=dtype, device=positions_N1.device)
        row.cache[name] = zeros.masked_fill_(hidden_NK, float("-inf"))[:, None, None]
    found: Tensor = row.cache[name]
    return found


def attend(
    query: Tensor,
    kept: tuple[Tensor, Tensor],
    seen: Tensor,
    *,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend from one token a slot to what its slot holds.

    The heads that share a group of keys are treated as queries of one head: no key is repeated.

    Args:
        query: [N, heads, D].
        kept: Keys and values of all slots, [slots, G, capacity, D].
        seen: From `visible`, [N, 1, 1, K].
        scale: Multiplies scores.
        sinks: One more logit for each head that carries no value, [heads].

    Returns:
        [N, heads, size of a value].
    """
    number, keys = len(seen), seen.shape[-1]
    key, value = (x[:number, :, :keys] for x in kept)
    groups = key.shape[1]
    grouped = query.view(number, groups, -1, query.shape[-1])
    if query.is_cuda and sinks is None and key.shape[-1] == value.shape[-1]:
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=seen, scale=scale)
    else:
        scores = torch.matmul(grouped, key.transpose(-1, -2)).float()
        scores = scores.mul_(scale).add_(seen)
        if sinks is not None:
            sink = sinks.float().view(1, groups, -1, 1).expand(number, -1, -1, 1)
            scores = torch.cat((scores, sink), -1)
        weights = scores.softmax(-1)[..., :keys].to(value.dtype)
        out = torch.matmul(weights, value)
    return out.reshape(number, -1, value.shape[-1])
