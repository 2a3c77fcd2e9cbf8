"""Dividing a global batch among ranks: a permutation, even, and the loss does not change."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_core.data.balance import balanced
from mcore_core.data.sampler import Share


def whole(lengths, micro, ranks):
    """All ranks' positions, [micro-batches of a rank, ranks, micro]."""
    return np.stack([balanced(lengths, micro, rank=r, ranks=ranks) for r in range(ranks)], 1)


@given(st.data())
def test_it_is_a_permutation_in_the_asked_shape(data):
    micro, ranks, each = (data.draw(st.integers(1, 4)) for _ in range(3))
    number = micro * ranks * each
    lengths = data.draw(st.lists(st.integers(0, 999), min_size=number, max_size=number))
    order = whole(lengths, micro, ranks)
    assert order.shape == (each, ranks, micro)
    assert sorted(order.ravel().tolist()) == list(range(number))
    assert np.array_equal(order, whole(lengths, micro, ranks))
    # each rank takes its longest first
    sums = np.asarray(lengths)[order].sum(2)
    assert (np.diff(sums, axis=0) <= 0).all()


@pytest.mark.parametrize(("micro", "ranks"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_it_is_even_where_chance_is_not(micro, ranks):
    rng = np.random.default_rng(0)
    worst, by_chance = [], []
    for _ in range(50):
        lengths = rng.lognormal(6, 1, 64).astype(int)
        totals = lengths[whole(lengths, micro, ranks)].sum((0, 2))
        chance = lengths.reshape(-1, ranks, micro).sum((0, 2))
        best = max(totals.mean(), lengths.max())  # no division can do better
        worst.append(totals.max() / best - 1)
        by_chance.append(chance.max() / best - 1)
    assert np.mean(worst) < 0.03
    if ranks > 1:
        assert np.mean(by_chance) > 4 * np.mean(worst)


def test_shares_are_the_whole_batch():
    lengths = np.array([9, 1, 8, 2, 7, 3, 6, 4])
    batch = np.arange(100, 108)
    parts = []
    for rank in range(2):
        share = Share(global_batch_size=8, micro_batch_size=2, rank=rank, size=2)
        mine = share.take(batch, lengths)
        assert [len(m) for m in mine] == [2, 2]
        parts.append(sum(int(lengths[m - 100].sum()) for m in mine))
        parts.append(mine)
    assert parts[0] == parts[2] == 20
    both = np.concatenate([*parts[1], *parts[3]])
    assert sorted(both.tolist()) == batch.tolist()
