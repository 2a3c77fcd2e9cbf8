"""Choose and order the rows of several sources: pick, join, split, interleave."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mcore_core.data.files import Rows
from mcore_core.data.rows import RowError
from mcore_core.errors import usage_error
from mcore_core.protocols import Row, Unit

type Index = NDArray[np.int64]


class Picked(Rows):
    """Some rows of another sequence, in the given order."""

    def __init__(self, rows: Rows, index: Index) -> None:
        self.rows = rows
        self.chosen = np.asarray(index, np.int64)

    def __len__(self) -> int:
        return len(self.chosen)

    def get(self, index: int) -> Row:
        """Return one row."""
        return self.rows.get(int(self.chosen[index]))

    def where(self, index: int) -> str:
        """Return file:line, where there are lines."""
        return self.rows.where(int(self.chosen[index]))

    def columns(self) -> tuple[str, ...]:
        """Return the columns of the whole."""
        return self.rows.columns()

    @staticmethod
    def join(parts: Sequence[Rows]) -> Rows:
        """Return the parts one after the other."""
        return Joined(parts)


class Joined(Rows):
    """Several sequences, one after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = list(parts)
        self.ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def _locate(self, index: int) -> tuple[Rows, int]:
        part = bisect_right(self.ends, index)
        return self.parts[part], index - (self.ends[part - 1] if part else 0)

    def get(self, index: int) -> Row:
        """Return one row."""
        part, at = self._locate(index)
        return part.get(at)

    def read(self, start: int, stop: int) -> Iterator[Row | RowError]:
        """Yield rows of one part after the other."""
        begin = 0
        for part, end in zip(self.parts, self.ends, strict=True):
            first, last = max(start, begin), min(stop, end)
            if first < last:
                yield from part.read(first - begin, last - begin)
            begin = end

    def where(self, index: int) -> str:
        """Return file:line, where there are lines."""
        part, at = self._locate(index)
        return part.where(at)

    def columns(self) -> tuple[str, ...]:
        """Return the columns of the first part."""
        return next((c for part in self.parts if (c := part.columns())), ())


class Units(Sequence[Unit]):
    """Encoded units of several sources, in a chosen order."""

    def __init__(self, parts: Sequence[Sequence[Unit]], index: Index | None = None) -> None:
        """Take the units at `index` of the joined parts; None takes all, in order."""
        self.parts = list(parts)
        self.ends = list(accumulate(len(part) for part in parts))
        self.chosen = np.arange(self.ends[-1] if self.ends else 0) if index is None else index

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = int(self.chosen[index])
        part = bisect_right(self.ends, at)
        return self.parts[part][at - (self.ends[part - 1] if part else 0)]

    def reordered(self, order: Index) -> "Units":
        """Return the units at these positions of this sequence."""
        return Units(self.parts, self.chosen[order])


def split(n: int, ratio: float, seed: int) -> tuple[Index, Index]:
    """Divide n rows into those that train and those that validate; each part keeps its order.

    The validation part has round(n * ratio) rows, at least one where both parts can have one.
    """
    if ratio <= 0 or n < 2:
        return np.arange(n), np.arange(0)
    held = min(max(1, round(n * ratio)), n - 1)
    order = np.random.default_rng([seed, 1]).permutation(n)
    return np.sort(order[held:]), np.sort(order[:held])


def interleave(
    sizes: Sequence[int],
    probabilities: Sequence[float],
    *,
    seed: int,
    stopping: Literal["first_exhausted", "all_exhausted"] = "first_exhausted",
) -> Index:
    """Draw sources at random, taking the rows of each in order.

    Returns:
        Numbers of rows in the joined sources. With first_exhausted it ends with the last row of the
        first source that is used up; with all_exhausted used-up sources begin again, until each has
        been gone through once.

    Raises:
        UsageError: The probabilities do not fit the sources.
    """
    check_probabilities(len(sizes), probabilities)
    rng = np.random.default_rng([seed, 2])
    first = stopping == "first_exhausted"
    shares = np.asarray(probabilities, float) / sum(probabilities)
    sizes_A = np.asarray(sizes, np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes_A)[:-1]])
    draws = np.empty(0, np.int64)
    while True:
        more = rng.choice(len(sizes), size=int(sizes_A.sum()) + 64, p=shares)
        draws = np.concatenate([draws, more])
        taken = np.stack([np.cumsum(draws == k) for k in range(len(sizes))])
        done = taken >= sizes_A[:, None]
        reached = np.flatnonzero(done.any(axis=0) if first else done.all(axis=0))
        if len(reached):
            stop = int(reached[0]) + 1
            draws, taken = draws[:stop], taken[:, :stop]
            nth = taken[draws, np.arange(stop)] - 1
            return np.asarray(starts[draws] + nth % sizes_A[draws], np.int64)


def check_probabilities(count: int, probabilities: Sequence[float]) -> None:
    """Raise a UsageError unless there is one positive probability for each dataset."""
    if len(probabilities) != count:
        raise usage_error(
            "MC409",
            f"--interleave_prob has {len(probabilities)} values for {count} datasets",
            "fix: give one for each --dataset, in their order",
        )
    if any(not p > 0 for p in probabilities) or abs(sum(probabilities) - 1) > 1e-3:
        raise usage_error(
            "MC409",
            f"--interleave_prob {' '.join(map(str, probabilities))}: "
            f"the values must be above 0 and sum to 1, they sum to {sum(probabilities):g}",
            "fix: for example " + " ".join([f"{1 / count:.3g}"] * count),
        )


def digest(index: Index) -> str:
    """Return a hash of chosen row numbers."""
    return hashlib.blake2b(np.ascontiguousarray(index).tobytes(), digest_size=16).hexdigest()
