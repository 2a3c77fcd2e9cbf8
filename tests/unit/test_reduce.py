"""Sums over a sequence's context-parallel parts, and sums over ranks."""

from mcore_core import compat

compat.apply()  # before anything imports megatron

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from mcore_core.parallel import state  # noqa: E402
from mcore_core.parallel.reduce import RowReduce, any_rank, sum_over_data, sum_shares  # noqa: E402
from mcore_core.parallel.topology import Layout  # noqa: E402
from mcore_core.platform import install  # noqa: E402
from mcore_core.testing.ranks import fork_ranks  # noqa: E402

SEQ = torch.tensor([0, 0, 0, 0, 2, 2, 2, 2])
OWNS = torch.tensor([True, False, True])
CPU = torch.device("cpu")
VALUES = torch.arange(1.0, 9.0)


def of_sums(total_S):
    """A loss that is not linear in the sums, so that a gradient counted twice shows."""
    return total_S**2


def test_per_seq_on_one_rank():
    values = VALUES.clone().requires_grad_()
    total = RowReduce(SEQ, OWNS).per_seq(values)
    assert total.tolist() == [10.0, 0.0, 26.0]
    of_sums(total).sum().backward()
    assert values.grad.tolist() == [20.0] * 4 + [52.0] * 4


def test_take():
    reduce = RowReduce(SEQ, OWNS).take(torch.tensor([0, 7]))
    assert reduce.seq_T.tolist() == [0, 2]
    assert reduce.per_seq(torch.tensor([1.0, 5.0])).tolist() == [1.0, 0.0, 5.0]
    assert RowReduce(SEQ, OWNS).take(slice(3, 5)).seq_T.tolist() == [0, 2]


def test_per_seq_under_context_parallelism():
    """Each sequence is counted by its owner; the other rank's tokens get their gradient too."""

    def one_rank(rank):
        mine = torch.tensor([[0, 3, 4, 7], [1, 2, 5, 6]][rank])
        owns = OWNS if rank == 0 else torch.zeros_like(OWNS)
        values = VALUES[mine].clone().requires_grad_()
        reduce = RowReduce(SEQ[mine], owns, dist.group.WORLD)
        total = reduce.per_seq(values)
        of_sums(total)[reduce.owns_S].sum().backward()
        return total.tolist(), values.grad.tolist()

    ranks = fork_ranks(one_rank, 2)
    assert [total for total, _ in ranks] == [[10.0, 0.0, 26.0]] * 2
    assert [grad for _, grad in ranks] == [[20.0, 20.0, 52.0, 52.0]] * 2


def test_sum_shares_takes_one_copy_of_each_share():
    """TP1 of a TP2 x PP2 x DP2 x CP1 layout holds copies; the first stage holds nothing."""

    def one_rank(rank):
        from megatron.core import parallel_state as ps

        state.initialize(install(), Layout(world=8, tp=2, pp=2))
        last = ps.is_pipeline_last_stage()
        dp = ps.get_data_parallel_rank()
        one = torch.ones(())
        shares = {"loss": (one * (dp + 1), one * 10), "b": (one, one)} if last else {}
        agreed, votes = sum_shares(shares, None, CPU, votes=rank == 5)
        told, _ = sum_shares(shares, ["b", "loss", "absent"], CPU)
        mine = sum_over_data(torch.tensor(float(rank)))
        rank_pp = ps.get_pipeline_model_parallel_rank()
        return agreed, told, float(mine), rank_pp, votes

    ranks = fork_ranks(one_rank, 8)
    want = {"b": (2.0, 2.0), "loss": (3.0, 20.0)}
    assert [r[0] for r in ranks] == [want] * 8
    assert [r[1] for r in ranks] == [{**want, "absent": (0.0, 0.0)}] * 8
    assert [r[4] for r in ranks] == [1] * 8
    for rank, (_, _, total, *_) in enumerate(ranks):
        # data-parallel ranks are tp apart: r and r + 2 on each pipeline stage
        first = rank // 4 * 4 + rank % 2
        assert total == first + (first + 2)


def test_any_rank():
    def one_rank(rank):
        return any_rank(rank == 1, CPU), any_rank(False, CPU)

    assert fork_ranks(one_rank, 2) == [(True, False)] * 2


def test_per_seq_of_rows():
    values = torch.stack((VALUES, 10 * VALUES), 1)
    assert RowReduce(SEQ, OWNS).per_seq(values).tolist() == [[10, 100], [0, 0], [26, 260]]


def test_gathered_rows_keep_their_gradient():
    """Ranks with 2, 0 and 3 rows; each counts a function of all rows times its own rank."""
    rows = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(0, 2), torch.ones(3, 2) * 5]
    whole = torch.cat(rows)

    def one_rank(rank):
        mine = rows[rank].clone().requires_grad_()
        reduce = RowReduce(SEQ, OWNS, None, dist.group.WORLD)
        everyone = reduce.gather_seqs(mine)
        ((everyone**2).sum() * (rank + 1)).backward()
        where = reduce.rows_of_gathered(len(mine))
        return everyone.tolist(), mine.grad.tolist(), (where.start, where.stop)

    ranks = fork_ranks(one_rank, 3)
    assert [r[0] for r in ranks] == [whole.tolist()] * 3
    assert [r[1] for r in ranks] == [(2 * r * 6).tolist() for r in rows]  # 1 + 2 + 3 losses
    assert [r[2] for r in ranks] == [(0, 2), (2, 2), (2, 5)]


def test_gather_on_one_rank():
    reduce = RowReduce(SEQ, OWNS)
    assert reduce.gather_seqs(VALUES) is VALUES
    assert reduce.rows_of_gathered(3) == slice(0, 3)
