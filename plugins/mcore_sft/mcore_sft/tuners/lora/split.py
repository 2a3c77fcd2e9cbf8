"""Which HF matrices lie in which rows of a fused weight: the LoRA split of a family's table.

A projection is one HF matrix, as PEFT would adapt it: W + scale B A with B [outputs, rank] and
A [rank, inputs]. What a rank holds of B, and where its rows lie in the rank's weight, follows from
the pieces of the weight's rule.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from mcore_core.model.family import Shard

if TYPE_CHECKING:
    from mcore_core.model.family import Piece
    from mcore_sft.tuners.table import Entry

_SIZES = (2, 3, 5, 7, 11, 13)
"""Of groups, tried to see how a weight is shared."""

type Kind = Literal["linear", "embedding", "router", "experts"]


@dataclass(frozen=True, kw_only=True)
class Projection:
    """One HF matrix inside a megatron-core weight."""

    entry: "Entry"
    part: int
    """Which of the entry's HF tensors."""

    @cached_property
    def tensor(self) -> str:
        """Name of the HF tensor."""
        return self.entry.hf[self.part]

    @property
    def name(self) -> str:
        """Path of the HF module, or of the stacked parameter."""
        return self.tensor.removesuffix(".weight")

    @property
    def leaf(self) -> str:
        """Last part of the path."""
        return self.name.rpartition(".")[2]

    @property
    def module(self) -> str:
        """Canonical path of the megatron-core module."""
        return self.entry.weight.rpartition(".")[0]

    @property
    def group(self) -> str:
        """Group whose ranks share the weight."""
        return self.entry.rule.shard.group

    @property
    def experts(self) -> int:
        """Experts that are stacked in the matrix; 0: it is one matrix."""
        return self.entry.experts

    @property
    def kind(self) -> Kind:
        """How it is adapted."""
        if self.experts:
            return "experts"
        if self.entry.weight == "embedding.word_embeddings.weight":
            return "embedding"
        return "router" if self.entry.weight.endswith(".router.weight") else "linear"

    @cached_property
    def _pieces(self) -> "list[Piece]":
        rule = self.entry.rule
        found = rule.transform.pieces(rule.shapes, self.entry.index)
        return [p for p in found if p.hf == self.part]

    @cached_property
    def outputs(self) -> int:
        """Output features: rows of B."""
        return sum(p.size[0] for p in self._pieces)

    @property
    def inputs(self) -> int:
        """Input features: columns of A."""
        return self.entry.rule.shape[1]

    @property
    def is_adaptable(self) -> bool:
        """Whether it is a matrix whose columns are the HF matrix's inputs.

        A score head is none: the recipe's new head trains in full (modules_to_save), as in PEFT.
        """
        rule = self.entry.rule
        if len(rule.shape) != 2 or self.entry.weight == "score.weight":
            return False
        return all(p.size[1] == rule.shape[1] and p.step(1) == 1 for p in self._pieces)

    @property
    def split(self) -> int | None:
        """Dimension of the weight that ranks share: 0 outputs, 1 inputs."""
        return self.entry.rule.shard.dim

    def rows(self, rank: int, size: int, *, height: int | None = None) -> list[tuple[int, int]]:
        """Return (HF row, row of the rank's weight), by HF row, of the rows that a rank holds.

        Args:
            rank: The rank in the weight's group.
            size: The group's size.
            height: Rows of the whole weight where it is padded.
        """
        rule = self.entry.rule
        found = []
        for piece in rule.local_pieces(self.entry.index, height, rank, size):
            if piece.hf != self.part:
                continue
            start, step = piece.at[piece.axes[0]], piece.step(0)
            found += [(start + i * step, piece.to[0] + i) for i in range(piece.size[0])]
        return sorted(found)

    @cached_property
    def sections(self) -> tuple[int, ...]:
        """Lengths of the runs of HF rows that are each shared evenly by the ranks of a group.

        They are the same for every size of it: a fused HF tensor has one for q, k and v.
        """
        if self.split != 0 or self.entry.rule.pad:
            return (self.outputs,)
        found = (self._shared_by(size) for size in _SIZES)
        return next((lengths for lengths in found if lengths), (self.outputs,))

    def is_even(self, size: int) -> bool:
        """Return whether each of `size` ranks holds an equal part of every section of B.

        With fewer query groups than ranks they do not; then each rank has all of B.
        """
        if size == 1 or self.split != 0 or self.entry.rule.pad:
            return True
        if size not in self._even:
            self._even[size] = self._shared_by(size) == self.sections
        return self._even[size]

    @cached_property
    def _even(self) -> dict[int, bool]:
        return {}

    def _shared_by(self, size: int) -> tuple[int, ...]:
        """Return the lengths of the runs that `size` ranks share evenly; empty if they do not."""
        rule = self.entry.rule
        if not rule.shard.divides(rule.shape, size):
            return ()
        held = [[hf for hf, _ in self.rows(rank, size)] for rank in range(size)]
        runs = [list(_runs(rows)) for rows in held]
        if len({len(r) for r in runs}) != 1:
            return ()
        lengths: list[int] = []
        for each in zip(*runs, strict=True):
            start, length = sum(lengths), each[0][1]
            if any(run != (start + r * length, length) for r, run in enumerate(each)):
                return ()
            lengths.append(length * size)
        return tuple(lengths)

    def shard_of_b(self, size: int) -> Shard:
        """Return which part of B a rank of the weight's group holds, of `size` ranks."""
        rule = self.entry.rule
        if self.split != 0 or not self.is_even(size):
            return Shard(group=rule.shard.group)
        sections = self.sections if len(self.sections) > 1 else ()
        return Shard(dim=0, group=rule.shard.group, sections=sections)

    def shard_of_a(self) -> Shard:
        """Return which part of A a rank of the weight's group holds."""
        rule = self.entry.rule
        return Shard(dim=1 if self.split == 1 else None, group=rule.shard.group)


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of the runs of neighbouring numbers."""
    for _, run in groupby(enumerate(rows), key=lambda x: x[1] - x[0]):
        numbers = [row for _, row in run]
        yield numbers[0], len(numbers)


def projections(entries: "Sequence[Entry]") -> list[Projection]:
    """Return every matrix that can have an adapter, in the order of the table.

    Layers of multi-token prediction have none: transformers' models are without them.
    """
    found = [
        Projection(entry=entry, part=part)
        for entry in entries
        if _is_matrix(entry)
        for part in range(len(entry.hf))
    ]
    return [p for p in found if p.is_adaptable]


def _is_matrix(entry: "Entry") -> bool:
    name = entry.weight
    if name.startswith("mtp.") or len(entry.rule.shape) != 2:
        return False
    return name.endswith((".weight", ".gate_weight"))
