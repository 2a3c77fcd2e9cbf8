"""Segments as batches: every token has one place, few places are padding, gradients are exact."""

import random
from itertools import accumulate

import pytest

from mcore_core import compat

compat.apply()  # before anything imports megatron

import torch  # noqa: E402

from mcore_core.model.packed import segments_of  # noqa: E402
from mcore_core.model.padded import WASTE, batches_of  # noqa: E402

CPU = torch.device("cpu")


def arranged(lengths):
    cu = list(accumulate(lengths, initial=0))
    found = batches_of(segments_of(cu), CPU)
    assert found is not None
    return cu, found


@pytest.mark.parametrize("seed", range(8))
def test_each_segment_stands_at_the_beginning_of_one_line_of_one_batch(seed):
    rng = random.Random(seed)
    lengths = [rng.choice((1, 2, 3, 7, 30, 31, 33, 200)) for _ in range(rng.randint(2, 60))]
    cu, found = arranged(lengths)
    lines = [
        line.tolist()
        for part, (_, length) in zip(
            found.index.split([b * n for b, n in found.shapes]), found.shapes, strict=True
        )
        for line in part.view(-1, length)
    ]
    wanted = {start: n for start, n in zip(cu, lengths, strict=False)}
    assert sorted(line[0] for line in lines) == sorted(wanted)
    for line in lines:
        n = wanted[line[0]]
        assert line[:n] == list(range(line[0], line[0] + n))
        assert set(line[n:]) <= {line[n - 1]}
    assert found.index[found.inverse_T].tolist() == list(range(cu[-1]))
    assert len(found.index) <= WASTE * cu[-1]


def test_segments_of_one_length_make_one_batch():
    _, found = arranged([5] * 40)
    assert found.shapes == ((40, 5),)


def test_spread_and_collect_undo_each_other_and_padding_has_no_gradient():
    _, found = arranged([10, 9, 3, 10])
    values = torch.randn(32, 2, requires_grad=True)
    spread = found.spread(values)
    torch.testing.assert_close(found.collect(spread), values, rtol=0, atol=0)
    weight = torch.randn(32, 2)
    (found.collect(spread * 2) * weight).sum().backward()
    torch.testing.assert_close(values.grad, 2 * weight)


def test_segments_that_see_more_than_themselves_make_none():
    assert batches_of(segments_of([0, 8, 16], 0, 2), CPU) is None
