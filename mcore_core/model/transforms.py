"""Runs of rows: fused, interleaved, permuted and stacked HF tensors as pieces of one weight."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mcore_core.model.family import Piece, Shape


@dataclass(frozen=True, slots=True)
class Run:
    """Some rows of one HF tensor, at equal distances."""

    hf: int
    """Which of the rule's HF tensors."""
    start: int
    count: int
    step: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Runs of HF rows, one after another along the weight's `dim`.

    With `pick`, the first axis of every HF tensor is not in the weight: the weight takes the entry
    of that number, or of the wildcard of that name (`"e"`: experts stacked in one tensor). With
    `transpose`, the two axes that remain are exchanged; runs count along the weight's axis.
    """

    runs: tuple[Run, ...] = ()
    """Empty: the whole first tensor."""
    dim: int = 0
    pick: str | int | None = None
    transpose: bool = False

    def shape(self, shapes: Sequence[Shape], /) -> Shape:
        """Return the weight's shape."""
        whole = self._turned(shapes[0])
        if not self.runs:
            return whole
        return _set(whole, self.dim, sum(run.count for run in self.runs))

    def pieces(self, shapes: Sequence[Shape], index: Mapping[str, int], /) -> list[Piece]:
        """Return one piece a run."""
        first = () if self.pick is None else (self._picked(index),)
        axes = tuple(range(len(first), len(shapes[0])))
        axes = axes[::-1] if self.transpose else axes
        start, out = 0, []
        for run in self.runs or (Run(0, 0, self._turned(shapes[0])[self.dim]),):
            size = _set(self._turned(shapes[run.hf]), self.dim, run.count)
            at = (*first, *(0,) * len(size))
            ones = (1,) * len(size)
            out.append(
                Piece(
                    hf=run.hf,
                    at=_set(at, axes[self.dim], run.start),
                    to=_set((0,) * len(size), self.dim, start),
                    size=size,
                    axes=axes,
                    steps=_set(ones, self.dim, run.step) if run.step != 1 else (),
                )
            )
            start += run.count
        return out

    def _turned(self, shape: Shape) -> Shape:
        kept = shape if self.pick is None else shape[1:]
        return kept[::-1] if self.transpose else kept

    def _picked(self, index: Mapping[str, int]) -> int:
        assert self.pick is not None
        return self.pick if isinstance(self.pick, int) else index[self.pick]


def spread(hf: int, start: int, count: int, every: int, times: int) -> list[Run]:
    """Return `times` runs of `count` rows, the first at `start` and each `every` rows on."""
    return [Run(hf, start + i * every, count) for i in range(times)]


def _set(shape: Shape, axis: int, value: int) -> Shape:
    return (*shape[:axis], value, *shape[axis + 1 :])
