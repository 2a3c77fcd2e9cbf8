"""A packed row as attention sees it: segments of queries and the keys they may look at.

Everything is a list of *segments* (q_start, q_len, k_start, k_len), causal, aligned to the
bottom right: query i of a segment sees keys 0 .. k_len - q_len + i. A sequence is one segment;
under context parallelism (zigzag: rank r holds chunks r and 2 * cp - 1 - r of every sequence)
it is two, each seeing the sequence's keys up to the end of its chunk.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from mcore_core.model.padded import Batches, batches_of

if TYPE_CHECKING:
    from mcore_core.model.decode import Kept


class Segment(NamedTuple):
    """Queries [q_start, q_start + q_len) that see keys [k_start, k_start + k_len)."""

    q_start: int
    q_len: int
    k_start: int
    k_len: int


class VarlenPlan(NamedTuple):
    """Arguments of `torch.nn.attention.varlen.varlen_attn` for one row, on the device."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    key_index: Tensor | None
    """Which keys each segment sees, in order; None where keys stand as queries do."""


def zigzag_order(cu_seqlens: list[int], cp_size: int) -> Tensor:
    """Return the index that puts [rank 0's tokens, rank 1's, ...] back into sequence order."""
    local = cu_seqlens[-1] // cp_size
    order = torch.empty(cu_seqlens[-1], dtype=torch.long)
    base = 0
    for start, end in pairwise(cu_seqlens):
        n = (end - start) // (2 * cp_size)
        for rank in range(cp_size):
            for half, chunk in ((0, rank), (1, 2 * cp_size - 1 - rank)):
                source, target = rank * local + base + half * n, start + chunk * n
                order[target : target + n] = torch.arange(source, source + n)
        base += 2 * n
    return order


def zigzag_index(cu_seqlens: list[int], cp_rank: int, cp_size: int) -> Tensor:
    """Return the positions of the full row that this context-parallel rank holds, in its order."""
    if cp_size == 1:
        return torch.arange(cu_seqlens[-1])
    parts = []
    for start, end in pairwise(cu_seqlens):
        n = (end - start) // (2 * cp_size)
        for chunk in (cp_rank, 2 * cp_size - 1 - cp_rank):
            parts.append(torch.arange(start + chunk * n, start + (chunk + 1) * n))
    return torch.cat(parts)


def segments_of(cu_seqlens: list[int], cp_rank: int = 0, cp_size: int = 1) -> list[Segment]:
    """Return this rank's segments, with keys in full sequence order."""
    if cp_size == 1:
        return [Segment(a, b - a, a, b - a) for a, b in pairwise(cu_seqlens) if b > a]
    found, base = [], 0
    for start, end in pairwise(cu_seqlens):
        n = (end - start) // (2 * cp_size)
        for half, chunk in ((0, cp_rank), (1, 2 * cp_size - 1 - cp_rank)):
            found.append(Segment(base + half * n, n, start, (chunk + 1) * n))
        base += 2 * n
    return [s for s in found if s.q_len]


@dataclass
class PackedRow(PackedSeqParams):  # type: ignore[misc]
    """Megatron's packed sequence parameters plus what our attention caches for all layers."""

    cu: list[int] = field(default_factory=list)
    """Offsets of the padded sequences in the full row."""
    positions_T: Tensor | None = None
    """Position of each of this rank's tokens in its own sequence, int64."""
    sequence_T: Tensor | None = None
    """Which sequence each of this rank's tokens is of, from 1, and 0 for padding."""
    routing_TLK: Tensor | None = None
    """Experts that each of this rank's tokens goes to in each layer with experts, instead of those
    that the router would choose; -1 where it chooses."""
    kept: "Kept | None" = None
    """Where generation keeps what the layers compute; None in training."""
    cache: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def build(
        cls, cu: list[int], positions_T: Tensor, sequence_T: Tensor | None = None
    ) -> "PackedRow":
        """Return the parameters of a row whose (padded) sequences start at `cu`."""
        offsets = torch.tensor(cu, dtype=torch.int32, device=positions_T.device)
        longest = max((b - a for a, b in pairwise(cu)), default=0)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=offsets,
            cu_seqlens_kv=offsets,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            cu=cu,
            positions_T=positions_T,
            sequence_T=sequence_T,
        )

    def segments(self, cp_rank: int, cp_size: int) -> list[Segment]:
        """Return this rank's segments, computed once a row."""
        if "segments" not in self.cache:
            self.cache["segments"] = segments_of(self.cu, cp_rank, cp_size)
        found: list[Segment] = self.cache["segments"]
        return found

    def batches(self, cp_rank: int, cp_size: int) -> Batches | None:
        """Return the segments as batches, computed once a row; None where they overlap."""
        if "batches" not in self.cache:
            assert self.positions_T is not None
            self.cache["batches"] = batches_of(
                self.segments(cp_rank, cp_size), self.positions_T.device
            )
        found: Batches | None = self.cache["batches"]
        return found

    def key_order(self, cp_size: int) -> Tensor:
        """Return `zigzag_order` on the device, computed once a row."""
        if "order" not in self.cache:
            assert self.positions_T is not None
            self.cache["order"] = zigzag_order(self.cu, cp_size).to(self.positions_T.device)
        found: Tensor = self.cache["order"]
        return found

    def varlen(self, cp_rank: int, cp_size: int) -> VarlenPlan:
        """Return the arguments of `varlen_attn`, computed once a row."""
        if "varlen" not in self.cache:
            assert self.positions_T is not None
            self.cache["varlen"] = varlen_plan(
                self.segments(cp_rank, cp_size), self.positions_T.device
            )
        found: VarlenPlan = self.cache["varlen"]
        return found


def varlen_plan(segments: list[Segment], device: torch.device) -> VarlenPlan:
    """Return the cumulative lengths, and the key index where segments overlap."""
    q = torch.tensor([s.q_len for s in segments], dtype=torch.int32)
    k = torch.tensor([s.k_len for s in segments], dtype=torch.int32)
    index = None
    if any(s.q_start != s.k_start or s.q_len != s.k_len for s in segments):
        index = torch.cat([torch.arange(s.k_start, s.k_start + s.k_len) for s in segments])
        index = index.to(device, non_blocking=True)
    cumulative = [F.pad(n.cumsum(0, dtype=torch.int32), (1, 0)).to(device) for n in (q, k)]
    return VarlenPlan(cumulative[0], cumulative[1], int(q.max()), int(k.max()), index)
