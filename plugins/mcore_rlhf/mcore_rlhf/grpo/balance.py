"""Divide the completions of a step into micro-batches with about as many tokens each."""

import heapq
from collections.abc import Sequence


def balanced(lengths: Sequence[int], cells: int) -> list[list[int]]:
    """Return the numbers of the completions in each cell.

    Cells differ by at most one completion; the longest are dealt out first, each to the cell with
    the fewest tokens that has room. The result depends on the lengths alone.
    """
    number = len(lengths)
    sizes = [number // cells + (i < number % cells) for i in range(cells)]
    open_cells = [(0, i) for i in range(cells) if sizes[i]]
    heapq.heapify(open_cells)
    found: list[list[int]] = [[] for _ in range(cells)]
    for item in sorted(range(number), key=lambda i: (-lengths[i], i)):
        tokens, cell = heapq.heappop(open_cells)
        found[cell].append(item)
        if len(found[cell]) < sizes[cell]:
            heapq.heappush(open_cells, (tokens + lengths[item], cell))
    return [sorted(cell) for cell in found]


def of_rank(cells: Sequence[list[int]], dp: tuple[int, int]) -> list[list[int]]:
    """Return the cells of a data-parallel rank: every n-th, as the sampler deals them out."""
    rank, size = dp
    return [list(cell) for cell in cells[rank::size]]
