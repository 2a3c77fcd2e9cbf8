"""Bin packing."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_core.data import pack as module
from mcore_core.data.pack import fill, pack
from mcore_core.errors import UsageError


@given(
    st.integers(1, 300).flatmap(
        lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=200))
    )
)
def test_each_sample_is_in_one_pack_and_none_is_over_full(case):
    capacity, lengths = case
    packs = pack(lengths, capacity)
    assert sorted(i for p in packs for i in p) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in p) <= capacity for p in packs)
    assert all(p == sorted(p) for p in packs) and packs == sorted(packs)
    # best fit leaves at most one pack half empty
    assert sum(2 * sum(lengths[i] for i in p) <= capacity for p in packs) <= 1


def test_known_packs():
    assert pack([6, 4, 5, 5, 10, 1], 10) == [[0, 1], [2, 3], [4], [5]]
    assert pack([3, 3, 3, 3], 10) == [[0, 1, 2], [3]] or pack([3] * 4, 10) == [[0], [1, 2, 3]]
    assert pack([], 10) == []


def test_a_realistic_distribution_is_filled_quickly():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.5, 0.9, 200_000), 8, 4096).astype(int)
    start = time.perf_counter()
    packs = pack(lengths, 4096)
    assert time.perf_counter() - start < 3
    assert fill(lengths, len(packs), 4096) > 0.99


def test_windows_keep_neighbours_together_and_processes_change_nothing(monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 64)
    lengths = np.random.default_rng(1).integers(1, 50, 1000)
    packs = pack(lengths, 100)
    assert max(p[-1] - p[0] for p in packs) < 64
    assert sorted(i for p in packs for i in p) == list(range(1000))
    assert pack(lengths, 100, num_proc=2) == packs


def test_a_sample_longer_than_a_pack_is_an_error():
    with pytest.raises(UsageError) as caught:
        pack([5, 12], 10)
    assert str(caught.value) == (
        "error[MC418]: --packing_length 10 is shorter than the longest sample, 12 tokens; packing "
        "never splits a sample\n  fix: --packing_length 12, or --max_length 10"
    )
