"""Packed rows: what each position predicts."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from mcore_core.data.collate import pack_sequences


def test_targets_and_weights_are_shifted_within_each_sequence():
    got = pack_sequences(
        [
            (np.array([5, 6, 7], np.int32), np.array([0, 0, 1], np.float32)),
            (np.array([8], np.int32), np.array([0], np.float32)),
            (np.array([1, 2], np.int32), np.array([0, 0.5], np.float32)),
        ]
    )
    assert got["tokens_T"].tolist() == [5, 6, 7, 8, 1, 2]
    assert got["targets_T"].tolist() == [6, 7, 0, 0, 2, 0]
    assert got["weights_T"].tolist() == [0, 1, 0, 0, 0.5, 0]
    assert got["lengths"] == (3, 1, 2)
    assert got["tokens_T"].dtype == got["targets_T"].dtype == torch.int64
    assert got["weights_T"].dtype == torch.float32


def test_read_only_arrays_are_copied():
    ids = np.array([1, 2], np.int32)
    ids.flags.writeable = False
    got = pack_sequences([(ids, np.array([0, 1], np.float32))])
    got["tokens_T"][0] = 9
    assert ids.tolist() == [1, 2]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_no_position_predicts_over_a_border(lengths):
    rng = np.random.default_rng(sum(lengths))
    sequences = [
        (rng.integers(1, 99, n), np.r_[0, rng.random(n - 1)].astype(np.float32)) for n in lengths
    ]
    got = pack_sequences(sequences)
    at = 0
    for ids, weights in sequences:
        n = len(ids)
        assert got["targets_T"][at : at + n].tolist() == [*ids[1:].tolist(), 0]
        assert got["weights_T"][at : at + n].tolist() == [*weights[1:].tolist(), 0]
        at += n
