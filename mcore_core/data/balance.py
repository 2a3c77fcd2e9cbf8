"""Which rank takes which items of a global batch, so that no rank waits long for another.

The global batch stays what it is and every micro-batch keeps its number of items: a loss that is a
sum over the global batch does not change. Items go to ranks, and a rank's items to its
micro-batches: longest first, each to the least filled place with room (Graham, Bounds on
multiprocessing timing anomalies, 1969), then items change places as long as that lowers the
fullest.
"""

import heapq
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

SWAPS = 64
"""At most so many swaps in one division: the first few are nearly all that is to be had."""
EVEN = 0.005
"""Share of the mean by which the fullest place may be above it before items are swapped."""


def balanced(
    lengths: "Sequence[int] | NDArray[np.int64]", micro_batch_size: int, *, rank: int, ranks: int
) -> "NDArray[np.int64]":
    """Return a rank's positions in the global batch, [its micro-batches, micro_batch_size].

    The micro-batches that run at the same time on all ranks are of similar length: each rank takes
    its longest first. It depends on nothing but the arguments.
    """
    sizes = np.asarray(lengths, np.int64)
    mine = divide(sizes, ranks)[rank]
    micros = mine[divide(sizes[mine], len(mine) // micro_batch_size)]
    order = np.argsort(-sizes[micros].sum(1), kind="stable")
    return np.sort(micros[order], axis=1)


def divide(sizes: "NDArray[np.int64]", bins: int) -> "NDArray[np.int64]":
    """Put items into bins of equally many, sums as even as may be; return positions [bins, n]."""
    room = len(sizes) // bins
    found: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0, i) for i in range(bins)]
    for item in np.argsort(-sizes, kind="stable").tolist():
        total, least = heapq.heappop(heap)
        found[least].append(item)
        if len(found[least]) < room:
            heapq.heappush(heap, (total + int(sizes[item]), least))
    placed = np.array(found, np.int64).reshape(bins, room)
    for _ in range(SWAPS if bins > 1 and room > 1 else 0):
        if not _swap(sizes, placed):
            break
    return placed


def _swap(sizes: "NDArray[np.int64]", placed: "NDArray[np.int64]") -> bool:
    """Swap the two items that lower the fullest bin and the one it swaps with most."""
    values = sizes[placed]
    sums = values.sum(1)
    full = int(sums.argmax())
    if sums[full] <= (1 + EVEN) * sums.mean():
        return False
    # moving d from the fullest to bin b leaves max(full - d, b + d): best where d halves the gap
    gaps = sums[full] - sums
    moved = values[full][:, None, None] - values[None]
    left = np.maximum(-moved, moved - gaps[None, :, None])
    left[:, full] = 0
    best = int(left.argmin())
    i, other, j = np.unravel_index(best, left.shape)
    if left[i, other, j] >= 0:
        return False
    placed[full, i], placed[other, j] = placed[other, j], placed[full, i]
    return True
