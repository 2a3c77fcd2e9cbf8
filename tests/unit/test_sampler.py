"""Global batches, and each rank's share."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_core.data.sampler import GlobalBatches, Share


@given(n=st.integers(1, 60), batch=st.integers(1, 40), seed=st.integers(0, 3))
def test_every_epoch_has_every_item_once_without_a_gap(n, batch, seed):
    batches = GlobalBatches(n, batch, seed=seed)
    steps = -(-3 * n // batch)
    flat = np.concatenate([batches.indices(s) for s in range(steps)])
    for epoch in range(3):
        assert sorted(flat[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_a_step_does_not_depend_on_the_steps_before():
    batches = GlobalBatches(10, 4, seed=1)
    forward = [batches.indices(s).tolist() for s in range(20)]
    fresh = GlobalBatches(10, 4, seed=1)
    assert [fresh.indices(s).tolist() for s in reversed(range(20))] == forward[::-1]
    assert pickle.loads(pickle.dumps(batches)).indices(7).tolist() == forward[7]


def test_epochs_differ_and_seeds_differ():
    batches = GlobalBatches(50, 50, seed=1)
    first = batches.indices(0).tolist()
    assert first != list(range(50))
    assert batches.indices(1).tolist() != first
    assert GlobalBatches(50, 50, seed=2).indices(0).tolist() != first


def test_without_shuffling_the_order_is_kept_in_every_epoch():
    batches = GlobalBatches(5, 3, shuffle=False)
    assert [batches.indices(s).tolist() for s in range(4)] == [
        [0, 1, 2],
        [3, 4, 0],
        [1, 2, 3],
        [4, 0, 1],
    ]


def test_epochs_are_counted_in_items():
    batches = GlobalBatches(10, 4)
    assert batches.steps_per_epoch == 2.5
    assert batches.epoch(5) == 2.0


def test_group_by_length_batches_near_equal_lengths_and_keeps_every_item():
    lengths = np.random.default_rng(0).integers(1, 1000, 400)
    grouped = GlobalBatches(400, 8, seed=0, lengths=lengths)
    plain = GlobalBatches(400, 8, seed=0)

    def spread(batches):
        return np.mean([np.ptp(lengths[batches.indices(s)]) for s in range(50)])

    assert spread(grouped) < spread(plain) / 10
    assert sorted(np.concatenate([grouped.indices(s) for s in range(50)])) == list(range(400))
    starts = [lengths[grouped.indices(s)].max() for s in range(50)]
    assert starts != sorted(starts, reverse=True)


@pytest.mark.parametrize(("dp", "mbs"), [(1, 1), (1, 4), (2, 2), (4, 1), (2, 4)])
def test_the_shares_of_all_ranks_are_the_global_batch(dp, mbs):
    batch = np.arange(100, 108)
    shares = [Share(global_batch_size=8, micro_batch_size=mbs, rank=r, size=dp) for r in range(dp)]
    taken = [s.take(batch) for s in shares]
    for r, parts in enumerate(taken):
        assert len(parts) == shares[r].num_microbatches == 8 // (dp * mbs)
        for j, part in enumerate(parts):
            at = (j * dp + r) * mbs
            assert part.tolist() == batch[at : at + mbs].tolist()
    assert sorted(np.concatenate([p for parts in taken for p in parts])) == batch.tolist()


def test_no_items_is_an_error():
    with pytest.raises(ValueError, match="there are no items"):
        GlobalBatches(0, 1)
