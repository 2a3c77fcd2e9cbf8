"""What an adapter adds to the output of its layer, on every kind of parallel layer.

T tokens of a row, of which a rank sees a part under sequence parallelism; r rank of an adapter.

Which matrices ranks share: a column-parallel layer's B has the rows of the rank's outputs and A is
whole; a row-parallel layer's A has the columns of the rank's inputs and B is whole. What crosses
ranks is always [T, r], before B or after A.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from mcore_core.model.moe.experts import Counts, grouped_product
from mcore_sft.tuners.lora.matrices import Offsets, Pair, sharded

ALIKE, APART, EXPERTS = "lora-alike", "lora-apart", "lora-experts"
"""Names of random states: ranks of a tensor-parallel group draw alike, or apart; and experts'."""


@dataclass(slots=True)
class Switch:
    """Whether adapters act; all of a model share one."""

    on: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What adapters of a layer share."""

    switch: Switch
    dropout: float
    group: Any
    """The group whose ranks share the layer's weight."""
    sequence_parallel: bool

    @property
    def several(self) -> bool:
        """Whether ranks share the weight."""
        return bool(self.group is not None and self.group.size() > 1)


class Adapter(torch.nn.Module):
    """The adapters of one layer's projections: parameters `<projection>_A` and `_B`.

    Args:
        pairs: The matrices.
        setting: What they share.
        order: For each output channel of the layer, which channel of the projections' outputs, one
            after another, it is; -1 where no projection has it. Empty: as they are.
    """

    def __init__(self, pairs: Sequence[Pair], setting: Setting, order: Sequence[int] = ()) -> None:
        super().__init__()
        self.pairs, self.setting = tuple(pairs), setting
        for pair in pairs:
            self.register_parameter(f"{pair.projection.leaf}_A", pair.a)
            self.register_parameter(f"{pair.projection.leaf}_B", pair.b)
        total = sum(i >= 0 for i in order)
        device = pairs[0].b.device
        scales = [pair.scale for pair in pairs for _ in range(pair.rank)]
        self.scale: float | Tensor = scales[0]
        if len(set(scales)) > 1:
            self.scale = torch.tensor(scales, device=device, dtype=pairs[0].b.dtype)
        self.order: Tensor | None = None
        if list(order) != list(range(total)):
            index = [i if i >= 0 else total for i in order]
            self.order = torch.tensor(index, device=device)

    def matrices(self) -> list[tuple[Tensor, Tensor, float]]:
        """Return A, B and scale of each projection."""
        return [(p.a, p.b, p.scale) for p in self.pairs]

    def dropped(self, x: Tensor, stream: str) -> Tensor:
        """Return x with some values dropped, drawn from a random state of megatron's tracker."""
        if not self.training or self.setting.dropout == 0:
            return x
        with get_cuda_rng_tracker().fork(stream):
            return F.dropout(x, self.setting.dropout)

    def narrow(self, x: Tensor, stream: str) -> Tensor:
        """Return the inputs through every A and scaled, side by side: [..., sum of ranks].

        One product, unless each projection drops values of its own.
        """
        if self.training and self.setting.dropout > 0:
            parts = [F.linear(self.dropped(x, stream), pair.a) for pair in self.pairs]
            found = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        else:
            found = F.linear(x, _joined([pair.a for pair in self.pairs]))
        return found * self.scale

    def added(self, out: Tensor, narrow: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        """Return the layer's output and what `narrow` adds to it through every B, in one product.

        Args:
            out: Output of the layer alone, [..., outputs].
            narrow: As from `narrow`.
            matrices: B of each projection, [outputs of this rank, rank].
        """
        wide = self._side_by_side(matrices)
        sum_TO = torch.addmm(out.flatten(0, -2), narrow.flatten(0, -2), wide.T)
        return sum_TO.view_as(out)

    def _side_by_side(self, matrices: Sequence[Tensor]) -> Tensor:
        """Return one B, [outputs, sum of ranks]: a row is zero beyond its projection's columns."""
        total = sum(b.shape[1] for b in matrices)
        rows, before = [], 0
        for b in matrices:
            rows.append(
                F.pad(b, (before, total - before - b.shape[1])) if total > b.shape[1] else b
            )
            before += b.shape[1]
        if self.order is None:
            return _joined(rows)
        return torch.cat((*rows, rows[0].new_zeros(1, total))).index_select(0, self.order)

    def arranged(self, parts: list[Tensor]) -> Tensor:
        """Return the projections' outputs as channels of the layer."""
        if self.order is None:
            return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        empty = parts[0].new_zeros(*parts[0].shape[:-1], 1)
        return torch.cat((*parts, empty), -1).index_select(-1, self.order)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Offsets = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the matrices for a checkpoint."""
        assert metadata is not None
        found: dict[str, Any] = {}
        for pair in self.pairs:
            key = f"{prefix}{pair.projection.leaf}"
            found |= sharded(pair, f"{key}_A", f"{key}_B", sharded_offsets, metadata)
        return found


def _joined(matrices: Sequence[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))


class ColumnAdapter(Adapter):
    """Of a layer whose ranks have some of the outputs each."""

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """Return the output with the adapters': [T, 1, outputs] from [T, 1, inputs].

        Under sequence parallelism x has this rank's tokens and the output all of them.
        """
        setting = self.setting
        scattered = setting.sequence_parallel and setting.several
        narrow = self.narrow(x, APART if scattered else ALIKE)
        if scattered:
            narrow = gather_from_sequence_parallel_region(narrow, True, group=setting.group)
        elif setting.several:
            narrow = copy_to_tensor_model_parallel_region(narrow, group=setting.group)
        return self.added(out, narrow, [self._mine(pair) for pair in self.pairs])

    def _mine(self, pair: Pair) -> Tensor:
        """Return this rank's rows of B; where all ranks hold it, its gradient is summed."""
        if pair.split_b or not self.setting.several:
            return pair.b
        whole: Tensor = copy_to_tensor_model_parallel_region(pair.b, group=self.setting.group)
        mine = [hf for hf, _ in pair.projection.rows(pair.place.rank, pair.place.size)]
        return whole.index_select(0, torch.tensor(mine, dtype=torch.long, device=whole.device))


class RowAdapter(Adapter):
    """Of a layer whose ranks have some of the inputs each and add up their outputs."""

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """Return the output with the adapters', of all tokens or of this rank's."""
        setting = self.setting
        narrow = self.narrow(x, APART if setting.several else ALIKE)
        if setting.several:
            reduce = (
                reduce_scatter_to_sequence_parallel_region
                if setting.sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
            narrow = reduce(narrow, group=setting.group)
        return self.added(out, narrow, [pair.b for pair in self.pairs])


class WholeAdapter(Adapter):
    """Of a layer that every rank has whole and that sees the rank's own tokens."""

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """Return the output of the same tokens with the adapters'."""
        scattered = self.setting.sequence_parallel and self.setting.several
        narrow = self.narrow(x, APART if scattered else ALIKE)
        return self.added(out, narrow, [pair.b for pair in self.pairs])


class EmbeddingAdapter(Adapter):
    """Of the token embedding, whose ranks have some of the vocabulary each."""

    def forward(self, tokens: Tensor, first: int, *, scattered: bool) -> Tensor:
        """Return what is added to the embeddings.

        Args:
            tokens: Token ids.
            first: Id of the first row that this rank holds.
            scattered: The output is [T / tp, 1, H], of this rank's tokens, instead of [1, T, H].
        """
        ((a, b, scale),) = self.matrices()
        local = tokens - first
        mine = (local >= 0) & (local < len(a))
        narrow = F.embedding(torch.where(mine, local, 0), a) * mine.unsqueeze(-1)
        if scattered:
            narrow = narrow.transpose(0, 1).contiguous()
            narrow = reduce_scatter_to_sequence_parallel_region(narrow, group=self.setting.group)
        elif self.setting.several:
            narrow = reduce_from_tensor_model_parallel_region(narrow, group=self.setting.group)
        return F.linear(narrow, b) * scale


class WeightAdapter(Adapter):
    """Of a layer that reads its weight itself (routers, gates, the output layer)."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with the adapters added: W + scale B A."""
        changes = []
        for pair, (a, b, scale) in zip(self.pairs, self.matrices(), strict=True):
            # each rank's rows contribute to the gradient of an A that all hold
            shared = pair.projection.split == 0 and self.setting.several
            if shared:
                a = copy_to_tensor_model_parallel_region(a, group=self.setting.group)
            changes.append(scale * (b @ a))
        change = changes[0] if len(changes) == 1 else torch.cat(changes)
        return weight + change.to(weight.dtype)


class ExpertsAdapter(Adapter):
    """Of the experts of a rank: tokens come sorted by expert.

    Expert-tensor-parallel ranks see the same tokens, and their outputs are added up afterwards.
    """

    def forward(self, x_TI: Tensor, counts: Counts) -> Tensor:
        """Return what is added to the output, [T, outputs]."""
        parts = []
        for pair, (a, b, scale) in zip(self.pairs, self.matrices(), strict=True):
            if self.setting.several:
                # what all ranks hold gets a part of its gradient on each
                if pair.projection.split == 1:
                    b = copy_to_tensor_model_parallel_region(b, group=self.setting.group)
                else:
                    a = copy_to_tensor_model_parallel_region(a, group=self.setting.group)
            stream = APART if pair.projection.split == 1 and self.setting.several else EXPERTS
            narrow = grouped_product(self.dropped(x_TI, stream), a, counts)
            parts.append(grouped_product(narrow * scale, b, counts))
        return self.arranged(parts)
