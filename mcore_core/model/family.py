"""A model family as a table: how each HF tensor lies in a megatron-core weight, torch-free.

A rule's transform says which box of an HF tensor is which box of the whole megatron-core weight (a
`Piece`); its shard says which part of that weight a rank holds. `Rule.local_pieces` joins the two.
Loading, exporting, saving, slicing and the coverage check are all derived from those pieces, so a
family never contains code that moves weights. Something new (a transpose, stacked experts) is one
more `Transform` that returns pieces.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal, Protocol

from mcore_core.model.architecture import Architecture

type Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A box of one HF tensor and the box of the megatron-core weight that equals it."""

    hf: int
    """Which of the rule's HF tensors."""
    at: Shape
    """Where the box starts in the HF tensor."""
    to: Shape
    """Where it starts in the megatron-core weight."""
    size: Shape
    """Its size along the weight's axes."""
    axes: Shape
    """For each axis of the weight, the HF axis that runs along it. HF axes not named (the expert
    of a stacked tensor) are fixed at `at`."""
    steps: Shape = ()
    """For each axis of the weight, the distance in the HF tensor between neighbours: 2 where gate
    and up columns take turns. Empty: 1 everywhere."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.size)

    @property
    def fixed(self) -> Shape:
        """HF axes at which the box has size one and which the weight does not have."""
        return tuple(k for k in range(len(self.at)) if k not in self.axes)

    @property
    def hf_slices(self) -> tuple[slice, ...]:
        """The box in the HF tensor."""
        return tuple(
            slice(a, a + (n - 1) * step + 1, step)
            for a, (n, step) in zip(self.at, self._extents(), strict=True)
        )

    @property
    def hf_span(self) -> tuple[slice, ...]:
        """The smallest box without steps that holds it."""
        return tuple(slice(s.start, s.stop) for s in self.hf_slices)

    def _extents(self) -> list[tuple[int, int]]:
        """Length and step along each HF axis."""
        out = [(1, 1)] * len(self.at)
        for axis, k in enumerate(self.axes):
            out[k] = (self.size[axis], self.step(axis))
        return out

    def step(self, axis: int) -> int:
        """Return the distance in the HF tensor between neighbours along the weight's `axis`."""
        return self.steps[axis] if self.steps else 1

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box in the megatron-core weight."""
        return tuple(slice(a, a + n) for a, n in zip(self.to, self.size, strict=True))

    def cut(self, axis: int, start: int, stop: int) -> "Piece | None":
        """Return what lies in [start, stop) of the weight's `axis`, still in its coordinates."""
        low = max(start, self.to[axis])
        high = min(stop, self.to[axis] + self.size[axis])
        if low >= high:
            return None
        skipped = (low - self.to[axis]) * self.step(axis)
        moved = _set(self.at, self.axes[axis], self.at[self.axes[axis]] + skipped)
        return replace(
            self, at=moved, to=_set(self.to, axis, low), size=_set(self.size, axis, high - low)
        )

    def in_rows(self, start: int, stop: int) -> "Piece | None":
        """Return what lies in rows [start, stop) of the HF tensor, counted from `start` there."""
        found: Piece | None = self
        if 0 in self.axes:
            axis = self.axes.index(0)
            first, last = (-((self.at[0] - row) // self.step(axis)) for row in (start, stop))
            found = self.cut(axis, self.to[axis] + first, self.to[axis] + last)
        elif not start <= self.at[0] < stop:
            return None
        return found and replace(found, at=_set(found.at, 0, found.at[0] - start))

    def shift(self, axis: int, by: int) -> "Piece":
        """Return the piece moved along the weight's `axis`."""
        return replace(self, to=_set(self.to, axis, self.to[axis] + by))


class Transform(Protocol):
    """How HF tensors make up one whole megatron-core weight."""

    def shape(self, shapes: Sequence[Shape], /) -> Shape:
        """Return the weight's shape, given the HF tensors'."""

    def pieces(self, shapes: Sequence[Shape], index: Mapping[str, int], /) -> list[Piece]:
        """Return the weight's pieces. `index` holds the values of `{l}` and other wildcards."""


@dataclass(frozen=True, slots=True)
class Stack:
    """HF tensors one after another along `dim`; one of them alone is a plain copy.

    With `groups`, each tensor is cut into that many equal parts and the parts are taken in turn:
    query groups lie in linear_qkv as q heads, k, v of the first group, then of the second.
    """

    dim: int = 0
    groups: int = 1

    def shape(self, shapes: Sequence[Shape], /) -> Shape:
        """Return the first shape with the lengths along `dim` summed."""
        return _set(shapes[0], self.dim, sum(s[self.dim] for s in shapes))

    def pieces(self, shapes: Sequence[Shape], index: Mapping[str, int], /) -> list[Piece]:
        """Return one piece a tensor and group, in the weight's order."""
        start, out = 0, []
        for group in range(self.groups):
            for i, shape in enumerate(shapes):
                length = shape[self.dim] // self.groups
                zero = (0,) * len(shape)
                out.append(
                    Piece(
                        hf=i,
                        at=_set(zero, self.dim, group * length),
                        to=_set(zero, self.dim, start),
                        size=_set(shape, self.dim, length),
                        axes=tuple(range(len(shape))),
                    )
                )
                start += length
        return out


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a whole weight a rank of `group` holds.

    Without `dim` every rank holds all of it. Otherwise `dim` is made of `blocks` equal blocks (gate
    and up), or of blocks of the lengths in `sections`, each split evenly; a rank holds its part of
    every block, one after another. Which experts a rank of an expert-parallel group holds is seen
    from the names of its weights, as with layers and pipeline stages.
    """

    dim: int | None = None
    blocks: int = 1
    group: Literal["tp", "etp"] = "tp"
    sections: Shape = ()

    def local_shape(self, shape: Shape, size: int) -> Shape:
        """Return the shape of one rank's part, given the whole weight's."""
        if self.dim is None:
            return shape
        return _set(shape, self.dim, shape[self.dim] // size)

    def divides(self, shape: Shape, size: int) -> bool:
        """True where the weight can be split over `size` ranks."""
        if self.dim is None:
            return True
        lengths = self._lengths(shape[self.dim])
        return sum(lengths) == shape[self.dim] and not any(n % size for n in lengths)

    def _lengths(self, length: int) -> Shape:
        return self.sections or (length // self.blocks,) * self.blocks

    def local(self, pieces: Sequence[Piece], shape: Shape, rank: int, size: int) -> list[Piece]:
        """Return the pieces of the part that `rank` holds, in that part's coordinates."""
        if self.dim is None:
            return list(pieces)
        block, held = 0, 0
        out = []
        for length in self._lengths(shape[self.dim]):
            part = length // size
            start = block + rank * part
            for piece in pieces:
                if (cut := piece.cut(self.dim, start, start + part)) is not None:
                    out.append(cut.shift(self.dim, held - start))
            block, held = block + length, held + part
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """HF tensors <-> one megatron-core weight (or one a layer, where the names have `{l}`)."""

    hf: tuple[str, ...]
    """Names of the HF tensors."""
    shapes: tuple[Shape, ...]
    """Their shapes, in the same order."""
    mcore: str
    """Name of the weight, with layer numbers of the HF model."""
    transform: Transform = field(default_factory=Stack)
    shard: Shard = field(default_factory=Shard)
    over: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Values of each wildcard in the names: {"l": range(num_layers)}."""
    pad: bool = False
    """The weight may have more rows than the HF tensors: zero on load, dropped on export."""
    optional: bool = False
    """A checkpoint may lack the HF tensors: the weight then keeps what it was drawn as. A score
    head that is trained from a language model."""
    hf_copies: tuple[str, ...] = ()
    """Names under which a checkpoint may hold the (only) HF tensor once more: checked to be equal
    on load and never written. A tied model's lm_head."""
    hf_twins: tuple[str, ...] = ()
    """Names under which a checkpoint holds the (only) HF tensor too: checked to be equal on load,
    and written. The embedding inside a multi-token prediction layer."""

    @property
    def shape(self) -> Shape:
        """Shape of the whole weight, not padded."""
        return self.transform.shape(self.shapes)

    def expand(self) -> "Iterator[tuple[Mapping[str, int], tuple[str, ...], str]]":
        """Yield the wildcards' values, the HF names and the weight's name, for each value."""
        indices: list[dict[str, int]] = [{}]
        for name, values in self.over.items():
            indices = [{**i, name: v} for i in indices for v in values]
        for index in indices:
            yield index, tuple(fill(n, index) for n in self.hf), fill(self.mcore, index)

    def local_pieces(
        self, index: Mapping[str, int], rows: int | None, rank: int, size: int
    ) -> list[Piece]:
        """Return the pieces of one rank's part; `rows` is the whole weight's padded height."""
        shape = self.shape if rows is None else _set(self.shape, 0, rows)
        return self.shard.local(self.transform.pieces(self.shapes, index), shape, rank, size)


@dataclass(frozen=True, slots=True)
class Ignored:
    """HF tensors that are left out on purpose, and why."""

    pattern: str
    """A regular expression matching the whole name."""
    reason: str


ROTARY_BUFFER = Ignored(
    r".*\.rotary_emb\.inv_freq", "rotary frequencies are computed from the config, not stored"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Everything the bridge and the builder know about one model family."""

    name: str
    architectures: tuple[str, ...]
    """Values of `architectures` in the HF config that this family reads."""
    architecture: Callable[[Mapping[str, Any]], Architecture]
    """HF config -> numbers. Raises UsageError for what it cannot honour, all of it at once."""
    rules: Callable[[Architecture], Sequence[Rule]]
    """The table, in the order in which tensors are exported."""
    also_reads: tuple[Callable[[Architecture], Sequence[Rule]], ...] = ()
    """Other tables by which a checkpoint may be laid out (experts stacked in one tensor): read by
    whichever names most of its tensors, never written."""
    notes: tuple[str, ...] = ()
    """Differences from transformers, for the reference page."""
    ignored: tuple[Ignored, ...] = (ROTARY_BUFFER,)
    mtp_key: str = "num_nextn_predict_layers"
    """The key of the HF config that tells of layers of multi-token prediction."""


def fill(name: str, index: Mapping[str, int]) -> str:
    """Replace the wildcards of a name: "{l}" by the layer's number."""
    for key, value in index.items():
        name = name.replace("{" + key + "}", str(value))
    return name


def _set(shape: Shape, axis: int, value: int) -> Shape:
    """Return the shape with one length replaced."""
    return (*shape[:axis], value, *shape[axis + 1 :])
