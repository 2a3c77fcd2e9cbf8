"""Zigzag order, segments and the arguments of varlen attention."""

from itertools import accumulate, pairwise

from mcore_core import compat

compat.apply()  # before anything imports megatron

import torch  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from mcore_core.model.packed import (  # noqa: E402
    PackedRow,
    Segment,
    segments_of,
    varlen_plan,
    zigzag_index,
    zigzag_order,
)

LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=6)
CP = st.sampled_from([1, 2, 3, 4])


def offsets(lengths, cp):
    """Row offsets of sequences padded for this context-parallel size."""
    return [0, *accumulate(n * 2 * cp for n in lengths)]


@settings(max_examples=60, deadline=None)
@given(LENGTHS, CP)
def test_every_token_is_on_one_rank(lengths, cp):
    cu = offsets(lengths, cp)
    held = torch.cat([zigzag_index(cu, r, cp) for r in range(cp)])
    assert sorted(held.tolist()) == list(range(cu[-1]))
    assert {len(zigzag_index(cu, r, cp)) for r in range(cp)} == {cu[-1] // cp}


@settings(max_examples=60, deadline=None)
@given(LENGTHS, CP)
def test_order_undoes_index(lengths, cp):
    cu = offsets(lengths, cp)
    row = torch.randn(cu[-1])
    gathered = torch.cat([row[zigzag_index(cu, r, cp)] for r in range(cp)])
    assert torch.equal(gathered[zigzag_order(cu, cp)], row)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, CP)
def test_segments_see_exactly_the_keys_before_them(lengths, cp):
    """Query by query: its own sequence, up to and including its own position."""
    cu = offsets(lengths, cp)
    start_of = {i: a for a, b in pairwise(cu) for i in range(a, b)}
    for rank in range(cp):
        mine = zigzag_index(cu, rank, cp).tolist()
        seen = {}
        for s in segments_of(cu, rank, cp):
            assert s.q_len > 0
            for i in range(s.q_len):
                assert s.q_start + i not in seen
                seen[s.q_start + i] = range(s.k_start, s.k_start + s.k_len - s.q_len + i + 1)
        assert sorted(seen) == list(range(len(mine)))
        for query, keys in seen.items():
            place = mine[query]
            assert keys == range(start_of[place], place + 1)


def test_zigzag_by_hand():
    """Two ranks, sequences of 4 and 8: rank 0 holds the outer chunks, rank 1 the inner ones."""
    cu = [0, 4, 12]
    assert zigzag_index(cu, 0, 2).tolist() == [0, 3, 4, 5, 10, 11]
    assert zigzag_index(cu, 1, 2).tolist() == [1, 2, 6, 7, 8, 9]
    assert segments_of(cu, 0, 2) == [
        Segment(0, 1, 0, 1),
        Segment(1, 1, 0, 4),
        Segment(2, 2, 4, 2),
        Segment(4, 2, 4, 8),
    ]
    assert segments_of(cu, 1, 2) == [
        Segment(0, 1, 0, 2),
        Segment(1, 1, 0, 3),
        Segment(2, 2, 4, 4),
        Segment(4, 2, 4, 6),
    ]
    assert segments_of([0, 0, 3]) == [Segment(0, 3, 0, 3)]


def varlen_reference(q, k, v, cu_q, cu_k, *, scale, window):
    """What varlen_attn computes: per segment, causal from the bottom right, within the window."""
    out = []
    for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * scale
        i = torch.arange(b - a)[:, None] + (d - c) - (b - a)
        j = torch.arange(d - c)[None]
        allowed = (j <= i) & (j >= i - window if window >= 0 else j >= 0)
        weights = torch.softmax(scores.masked_fill(~allowed, float("-inf")), -1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v[c:d]))
    return torch.cat(out)


def full_attention(q, k, v, cu, *, scale, window):
    cu = torch.tensor(cu).tolist()
    return varlen_reference(q, k, v, cu, cu, scale=scale, window=window)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), CP, st.sampled_from([-1, 0, 2, 50]))
def test_varlen_plan(lengths, cp, window):
    """Following the plan on every rank gives what one rank computes on the whole row."""
    cu = offsets(lengths, cp)
    g = torch.Generator().manual_seed(sum(lengths))
    q, k, v = (torch.randn(cu[-1], 2, 4, generator=g, dtype=torch.float64) for _ in range(3))
    whole = full_attention(q, k, v, cu, scale=0.4, window=window)
    for rank in range(cp):
        mine = zigzag_index(cu, rank, cp)
        plan = varlen_plan(segments_of(cu, rank, cp), torch.device("cpu"))
        assert plan.cu_q.dtype is plan.cu_k.dtype is torch.int32
        assert (plan.key_index is None) == (cp == 1)
        keys, values = (k, v) if plan.key_index is None else (k[plan.key_index], v[plan.key_index])
        cu_q, cu_k = plan.cu_q.tolist(), plan.cu_k.tolist()
        assert plan.max_q == max(b - a for a, b in pairwise(cu_q))
        assert plan.max_k == max(b - a for a, b in pairwise(cu_k))
        assert (cu_q[-1], cu_k[-1]) == (len(mine), len(keys))
        out = varlen_reference(q[mine], keys, values, cu_q, cu_k, scale=0.4, window=window)
        assert torch.allclose(out, whole[mine], atol=1e-12)


def test_a_row_computes_each_once():
    positions = torch.tensor([0, 1, 0, 1, 2])
    row = PackedRow.build([0, 2, 5], positions)
    assert (row.qkv_format, row.max_seqlen_q, row.max_seqlen_kv) == ("thd", 3, 3)
    assert row.cu_seqlens_q.tolist() == row.cu_seqlens_kv.tolist() == [0, 2, 5]
    assert row.cu_seqlens_q.dtype is torch.int32
    assert row.segments(0, 1) is row.segments(0, 1)
    assert row.varlen(0, 1) is row.varlen(0, 1)
    even = PackedRow.build([0, 4], torch.tensor([0, 3]))
    assert even.key_order(2) is even.key_order(2)
    assert even.key_order(2).tolist() == [0, 2, 3, 1]
    other = PackedRow.build([0, 5], torch.arange(5))
    assert other.cache == {}
