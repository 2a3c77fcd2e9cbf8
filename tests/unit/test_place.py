"""Laying a micro-batch out: padding counts nowhere, every token is somewhere, once."""

from dataclasses import dataclass

from mcore_core import compat

compat.apply()  # before anything imports megatron

import torch  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from mcore_core.parallel.topology import Layout  # noqa: E402
from mcore_core.protocols import Batch  # noqa: E402
from mcore_core.train.place import padded_lengths, place, select  # noqa: E402

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored(Batch):
    extra_T: torch.Tensor | None = None
    flags_T: torch.Tensor | None = None
    rewards_S: torch.Tensor | None = None


def batch(lengths, seed=0):
    """Tokens are numbered from 1, so that 0 is padding."""
    n = sum(lengths)
    g = torch.Generator().manual_seed(seed)
    return Scored(
        tokens_T=torch.arange(1, n + 1),
        targets_T=torch.arange(1001, n + 1001),
        weights_T=(torch.rand(n, generator=g) < 0.5).float(),
        lengths=tuple(lengths),
        extra_T=torch.rand(n, 2, generator=g) + 1,
        flags_T=torch.ones(n, dtype=torch.bool),
        rewards_S=torch.arange(len(lengths)).float(),
    )


LENGTHS = st.lists(st.integers(1, 20), min_size=0, max_size=6)
LAYOUTS = st.builds(
    lambda tp, cp, sp: Layout(world=tp * cp, tp=tp, cp=cp, sp=sp and tp > 1),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
)


@settings(max_examples=80, deadline=None)
@given(LENGTHS, LAYOUTS)
def test_padding(lengths, layout):
    padded = padded_lengths(tuple(lengths), layout)
    real = lengths or [0]
    assert len(padded) == len(real)
    assert all(p >= n for p, n in zip(padded, real, strict=True))
    assert sum(padded) > 0
    each = sum(padded) // layout.cp
    assert sum(padded) % layout.cp == 0
    if layout.sp:
        assert each % layout.tp == 0
    if layout.cp > 1:
        assert all(p % (2 * layout.cp) == 0 for p in padded)
    for p, n in list(zip(padded, real, strict=True))[:-1]:
        assert p - n < layout.seq_multiple  # no more than needed
    assert padded[-1] - real[-1] < layout.seq_multiple + layout.row_multiple + (not lengths)


@settings(max_examples=80, deadline=None)
@given(LENGTHS, LAYOUTS)
def test_every_token_is_on_one_rank_with_what_belongs_to_it(lengths, layout):
    original = batch(lengths)
    ranks = [place(original, layout, CPU, cp_rank=r) for r in range(layout.cp)]
    tokens = torch.cat([p.batch.tokens_T for p in ranks])
    real = tokens > 0
    assert sorted(tokens[real].tolist()) == original.tokens_T.tolist()
    for placed in ranks:
        b = placed.batch
        here = b.tokens_T > 0
        index = b.tokens_T[here] - 1
        for name in ("targets_T", "weights_T", "extra_T", "flags_T"):
            mine, whole = getattr(b, name), getattr(original, name)
            assert mine.dtype == whole.dtype
            assert len(mine) == len(b.tokens_T)
            assert torch.equal(mine[here], whole[index])
            assert not mine[~here].any()
        assert torch.equal(b.rewards_S, original.rewards_S)
        assert torch.equal(placed.trained, b.weights_T.nonzero().squeeze(-1))
        assert placed.tokens == sum(lengths)


@settings(max_examples=80, deadline=None)
@given(LENGTHS, LAYOUTS)
def test_sequences_and_positions(lengths, layout):
    original = batch(lengths)
    ranks = [place(original, layout, CPU, cp_rank=r) for r in range(layout.cp)]
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n)
    for placed in ranks:
        seq = placed.reduce.seq_T
        tokens = placed.batch.tokens_T
        for t in range(len(tokens)):
            if tokens[t]:
                place_in_sequence = int(tokens[t]) - 1 - starts[int(seq[t])]
                assert int(placed.row.positions_T[t]) == place_in_sequence
                assert 0 <= place_in_sequence < lengths[int(seq[t])]
        assert placed.row.cu == ranks[0].row.cu
    owners = torch.stack([p.reduce.owns_S for p in ranks]).sum(0)
    assert owners.tolist() == ([1] * len(lengths) or [0])
    for placed in ranks:  # the owner holds the first token
        for s in placed.reduce.owns_S.nonzero().squeeze(-1).tolist():
            assert starts[s] + 1 in placed.batch.tokens_T.tolist()


@settings(max_examples=40, deadline=None)
@given(LENGTHS, LAYOUTS)
def test_counts_do_not_depend_on_the_layout(lengths, layout):
    original = batch(lengths)
    ranks = [place(original, layout, CPU, cp_rank=r) for r in range(layout.cp)]
    total = sum(float(p.batch.weights_T.sum()) for p in ranks)
    assert total == float(original.weights_T.sum())
    assert sum(len(p.trained) for p in ranks) == int((original.weights_T > 0).sum())


def test_an_empty_micro_batch_is_a_row_of_padding():
    layout = Layout(world=4, tp=2, cp=2, sp=True)
    placed = place(batch([]), layout, CPU, cp_rank=1)
    assert placed.row.cu == [0, 8]
    assert placed.batch.tokens_T.tolist() == [0, 0, 0, 0]
    assert placed.batch.weights_T.tolist() == [0, 0, 0, 0]
    assert placed.reduce.owns_S.tolist() == [False]
    assert (placed.tokens, len(placed.trained)) == (0, 0)
    assert place(batch([]), Layout(world=2, tp=2, sp=True), CPU).row.cu == [0, 2]
    assert place(batch([]), Layout(), CPU).row.cu == [0, 1]


def test_by_hand():
    """Lengths 3 and 5 on two context-parallel ranks: padded to 4 and 8, zigzag."""
    layout = Layout(world=2, cp=2)
    first, second = (place(batch([3, 5]), layout, CPU, cp_rank=r) for r in (0, 1))
    assert first.row.cu == [0, 4, 12]
    assert first.batch.tokens_T.tolist() == [1, 0, 4, 5, 0, 0]
    assert second.batch.tokens_T.tolist() == [2, 3, 6, 7, 8, 0]
    assert first.row.positions_T.tolist() == [0, 3, 0, 1, 6, 7]
    assert second.reduce.seq_T.tolist() == [0, 0, 1, 1, 1, 1]
    assert first.reduce.owns_S.tolist() == [True, True]
    assert second.reduce.owns_S.tolist() == [False, False]


def test_select_keeps_what_is_not_per_token():
    chosen = select(batch([3, 5]), torch.tensor([1, 6]))
    assert chosen.tokens_T.tolist() == [2, 7]
    assert chosen.extra_T.shape == (2, 2)
    assert chosen.rewards_S.tolist() == [0.0, 1.0]
    assert chosen.lengths == (3, 5)
    assert select(batch([3, 5]), slice(2, 4)).targets_T.tolist() == [1003, 1004]


def test_a_field_that_is_none_stays_none():
    plain = batch([2])
    without = Scored(
        tokens_T=plain.tokens_T,
        targets_T=plain.targets_T,
        weights_T=plain.weights_T,
        lengths=(2,),
    )
    assert place(without, Layout(), CPU).batch.extra_T is None
