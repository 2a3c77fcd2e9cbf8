"""What generation keeps of earlier tokens, and attention of one new token a slot over it.

A slot holds one sequence: keys and values by position, and the states of linear attention. Rows
that carry a `Kept` are computed as in training, context parallelism aside, and remembered.

Shapes: T tokens of a row, N slots in one step, K positions that are looked at, G groups of keys,
D head size.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from mcore_core.model.packed import PackedRow

_FLASH: Any = torch.ops.aten._flash_attention_forward
"""The kernel of `scaled_dot_product_attention` and `varlen_attn`, with all that it takes."""

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

    def grow(self, slots: int, capacity: int) -> bool:
        """Make room for at least so many slots and tokens, keeping what is there.

        Returns:
            Whether tensors were replaced by larger ones.
        """
        more_slots = max(0, slots - self.slots)
        more_tokens = max(0, capacity - self.capacity)
        self.slots, self.capacity = self.slots + more_slots, self.capacity + more_tokens
        if not (more_slots or more_tokens):
            return False
        for place in self._kept:
            wider = [0, 0, 0, more_tokens] if place[0] == "kv" else [0, 0, 0, 0]
            self._kept[place] = tuple(
                F.pad(t, [*wider, *[0] * (2 * (t.dim() - 3)), 0, more_slots])
                for t in self._kept[place]
            )
        return bool(self._kept)

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

    def stored(self, name: str, layer: int, slots: int) -> Tensor:
        """Return the first slots of a state that an earlier row has stored."""
        return self._kept[name, layer][0][:slots]


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


def attend_step(
    query: Tensor,
    kept: tuple[Tensor, Tensor],
    row: "PackedRow",
    *,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    fused: bool = True,
) -> Tensor:
    """Attend from one token a slot to what its slot holds, by the kernel where there is one.

    Args:
        query: [N, heads, D].
        kept: Keys and values of all slots, [slots, G, capacity, D].
        row: The step.
        scale: Multiplies scores.
        window: Earlier tokens a query sees; None for all.
        sinks: One more logit for each head that carries no value, [heads].
        fused: Whether the kernel may be used.

    Returns:
        [N, heads, size of a value].
    """
    key, value = kept
    sizes = (key.shape[-1], value.shape[-1])
    if fused and has_kernel(query.dtype, query.device, sizes):
        return _by_kernel(query, kept, row, scale=scale, window=window, sinks=sinks)
    assert row.kept is not None
    seen = visible(row, row.kept, window, query.dtype)
    return attend(query, kept, seen, scale=scale, sinks=sinks)


def has_kernel(dtype: torch.dtype, device: torch.device, sizes: tuple[int, int]) -> bool:
    """Return whether FlashAttention serves a step: it reads each slot's length on the device.

    Args:
        dtype: Of queries.
        device: Where they are.
        sizes: Of keys and values.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    size = sizes[0]
    return device.type == "cuda" and half and sizes == (size, size) and size % 8 == 0 < size <= 256


def _lengths(row: "PackedRow", slot_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return where queries begin, where slots do, and tokens of each slot; once a row, int32."""
    name = ("lengths", slot_rows)
    if name not in row.cache:
        assert row.kept is not None
        positions_N = row.kept.positions_T
        starts = torch.arange(len(positions_N) + 1, dtype=torch.int32, device=positions_N.device)
        used_N = (positions_N + 1).to(torch.int32)
        row.cache[name] = (starts, starts * slot_rows, used_N)
    found: tuple[Tensor, Tensor, Tensor] = row.cache[name]
    return found


def _by_kernel(
    query: Tensor,
    kept: tuple[Tensor, Tensor],
    row: "PackedRow",
    *,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    slots, groups, capacity, _ = kept[0].shape
    # the kernel takes [rows, G, D], in which a slot begins at any row: here every G * capacity rows
    rows = (slots * groups - groups + 1) * capacity
    key, value = (
        x.as_strided((rows, groups, x.shape[-1]), (x.shape[-1], capacity * x.shape[-1], 1))
        for x in kept
    )
    starts, begins, used_N = _lengths(row, groups * capacity)
    out, lse, *_ = _FLASH(
        query.contiguous(),
        key,
        value,
        starts,
        begins,
        1,
        capacity,
        0.0,
        False,
        False,
        scale=scale,
        window_size_left=-1 if window is None else window,
        window_size_right=-1 if window is None else 0,
        seqused_k=used_N,
    )
    result: Tensor = out
    if sinks is not None:  # one more term of the softmax's sum: see model/sinks.py
        share_HN = (lse - sinks.float().unsqueeze(-1)).sigmoid()
        result = (result.float() * share_HN.t().unsqueeze(-1)).to(result.dtype)
    return result


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
