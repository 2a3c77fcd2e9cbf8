"""Bin packing: which samples share a packed row. No sample is ever split.

Best fit decreasing within windows of consecutive samples. Samples of equal length and bins with
equal room are moved together, so the cost grows with the number of distinct lengths, not of
samples.
"""

from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import numpy as np

from mcore_core.data.processes import start_method
from mcore_core.errors import usage_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

WINDOW = 65536
"""Samples that are packed together: a pack's samples are at most this far apart."""


def pack(
    lengths: "Sequence[int] | NDArray[Any]", capacity: int, *, num_proc: int = 1
) -> list[list[int]]:
    """Return packs: lists of sample numbers whose lengths sum to at most `capacity`.

    Every sample is in exactly one pack; numbers ascend within a pack, and packs are ordered by
    their first sample. The result does not depend on `num_proc`.

    Raises:
        UsageError: A sample is longer than the capacity.
    """
    lengths_N = np.asarray(lengths, np.int64)
    if len(lengths_N) and int(lengths_N.max()) > capacity:
        raise usage_error(
            "MC418",
            f"--packing_length {capacity} is shorter than the longest sample, "
            f"{int(lengths_N.max())} tokens; packing never splits a sample",
            f"fix: --packing_length {int(lengths_N.max())}, or --max_length {capacity}",
        )
    windows = [lengths_N[i : i + WINDOW] for i in range(0, len(lengths_N), WINDOW)]
    work = partial(_pack_window, capacity=capacity)
    if num_proc > 1 and len(windows) > 1:
        context = get_context(start_method())
        with ProcessPoolExecutor(min(num_proc, len(windows)), context) as pool:
            parts = list(pool.map(work, windows))
    else:
        parts = [work(window) for window in windows]
    packs: list[list[int]] = []
    for number, bin_of in enumerate(parts):
        order = np.argsort(bin_of, kind="stable") + number * WINDOW
        borders = np.cumsum(np.bincount(bin_of))[:-1]
        packs.extend(sorted(part.tolist() for part in np.split(order, borders)))
    return packs


def fill(lengths: "Sequence[int] | NDArray[Any]", packs: int, capacity: int) -> float:
    """Return the share of the packs' room that is used."""
    return float(np.sum(lengths)) / (packs * capacity) if packs else 0.0


def _pack_window(lengths_N: "NDArray[np.int64]", capacity: int) -> "NDArray[np.int64]":
    """Return the bin of each sample."""
    order = np.argsort(-lengths_N, kind="stable")
    values, counts = np.unique(lengths_N, return_counts=True)
    bin_of = np.empty(len(lengths_N), np.int64)
    room: defaultdict[int, list[int]] = defaultdict(list)  # room left -> bins
    have = 0  # bit r is set where room[r] has bins
    next_bin = at = 0
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            fitting = have >> length
            if not fitting:
                each = capacity // max(length, 1)
                opened = -(-count // each)
                room[capacity].extend(range(next_bin, next_bin + opened))
                have |= 1 << capacity
                next_bin += opened
                continue
            left = length + (fitting & -fitting).bit_length() - 1
            each = left // length if length else count
            needed = -(-count // each)
            bins = room[left][-needed:]
            del room[left][-needed:]
            if not room[left]:
                have ^= 1 << left
            placed = min(count, len(bins) * each)
            bin_of[order[at : at + placed]] = np.repeat(bins, each)[:placed]
            at += placed
            count -= placed
            spare = len(bins) * each - placed  # samples that the last bin has room for still
            rooms = [left - each * length] * (len(bins) - 1) + [left - (each - spare) * length]
            for bin_, rest in zip(bins, rooms, strict=True):
                room[rest].append(bin_)
                have |= 1 << rest
    return bin_of
