"""Bookkeeping of slots, and where a completion ends."""

import numpy as np
import pytest
from mcore_rlhf.rollout.native import stop
from mcore_rlhf.rollout.native.slots import Pending, Slots

from mcore_core.protocols import Request, Sampling


def pending(name, *, max_tokens=4, stops=(), tokens=()):
    sampling = Sampling(max_tokens=max_tokens)
    return Pending(
        Request(name, (1, 2, 3), sampling), stops, tokens, (0.5,) * len(tokens), (0,) * len(tokens)
    )


def test_what_finishes_is_overwritten_by_the_last():
    slots = Slots()
    names = "abcdefg"
    where = slots.add([pending(n, max_tokens=3 + i) for i, n in enumerate(names)])
    assert where.tolist() == list(range(7))
    for round_ in range(3):
        slots.record(where, 10 * (round_ + 1) + where, -where.astype(np.float32), version=round_)
    source, target = slots.remove(np.array([1, 4, 6]))
    assert list(zip(source.tolist(), target.tolist(), strict=True)) == [(5, 1)]
    kept = [slots.progress(i) for i in range(len(slots))]
    assert [p.request.id for p in kept] == ["a", "f", "c", "d"]
    assert kept[1].tokens == (15, 25, 35)
    assert kept[1].logps == (-5.0,) * 3
    assert kept[1].versions == (0, 1, 2)
    assert slots.position[:4].tolist() == [5] * 4
    assert not slots.position[4:].any(), "rows that fill a step up read position 0"


def test_a_request_goes_on_where_it_was():
    slots = Slots()
    slots.add([pending("x")])
    one = pending("a", tokens=(8, 9), stops=(7, 5))
    (where,) = slots.add([one], multiple=4)
    assert len(slots.last) == 4
    slots.record(np.array([where]), np.array([7]), np.array([-1.0]), version=3)
    found = slots.progress(where)
    assert (found.tokens, found.logps, found.versions) == ((8, 9, 7), (0.5, 0.5, -1.0), (0, 0, 3))
    assert one.prompt == (1, 2, 3, 8, 9)
    assert slots.position[where] == 5
    assert slots.stops[where].tolist() == [7, 5]
    assert slots.stops[0].tolist() == [-1, -1]


def test_completion():
    done = pending("a", tokens=(8, 9)).completion("stop")
    assert done.token_ids == (8, 9)
    assert (done.logps.dtype, done.versions.dtype) == (np.float32, np.int64)
    assert done.trainable.all()
    assert pending("a").completion("cancelled").logps.shape == (0,)


class Words:
    eos_token_id = 2

    def decode(self, ids, skip_special_tokens):
        assert not skip_special_tokens
        return "".join(["a", "</answer", ">", "x"][i] for i in ids)


def test_stop_tokens():
    assert stop.stop_ids(Sampling(max_tokens=1), Words()) == (2,)
    assert stop.stop_ids(Sampling(max_tokens=1, stop_token_ids=(4, 5)), Words()) == (4, 5)
    assert stop.stop_ids(Sampling(max_tokens=1), None) == ()


@pytest.mark.parametrize(
    ("words", "ids", "expected"),
    [
        (("</answer>",), [0, 1, 2], True),
        (("</answer>",), [0, 1], False),
        (("</answer>",), [1, 3], False),
        (("zz", "r>x"), [1, 2, 3], True),
    ],
)
def test_stop_strings_may_span_tokens(words, ids, expected):
    assert stop.hits(words, ids[-stop.reach(words) :], Words()) is expected
