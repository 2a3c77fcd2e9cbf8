"""The only reductions: over a sequence's context-parallel parts, over sequences, over ranks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


class _SumOverRanks(torch.autograd.Function):
    """All-reduce forward and backward: every rank's loss may depend on the sum."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:  # type: ignore[override]  # noqa: ANN401
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]  # noqa: ANN401
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks, one rank after another; backward sums the ranks' gradients of them."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,  # noqa: ANN401
        rows_SN: Tensor,
        sizes: list[int],
        group: Any,  # noqa: ANN401
    ) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        padded = rows_SN.new_zeros(max(sizes), *rows_SN.shape[1:])
        padded[: len(rows_SN)] = rows_SN
        everyone = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(everyone, padded, group=group)
        return torch.cat([rows[:n] for rows, n in zip(everyone, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]  # noqa: ANN401
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        start = sum(ctx.sizes[: ctx.group.rank()])
        return grad[start : start + ctx.sizes[ctx.group.rank()]], None, None


def _sizes(rows: int, group: Any, device: torch.device) -> list[int]:  # noqa: ANN401
    """Return how many rows each rank of the group has; collective."""
    mine = torch.tensor([rows], device=device)
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    return [int(n) for n in torch.cat(everyone).tolist()]


@dataclass(frozen=True, slots=True)
class RowReduce:
    """Implements protocols.Reduce for one micro-batch."""

    seq_T: Tensor
    owns_S: Tensor
    cp_group: Any = None
    dp_group: Any = None

    def per_seq(self, values_T: Tensor) -> Tensor:
        """Sum over each sequence, also where context parallelism splits it.

        Takes [T] or [T, N]; returns [S] or [S, N].
        """
        zeros_S = values_T.new_zeros(len(self.owns_S), *values_T.shape[1:])
        total_S = zeros_S.index_add(0, self.seq_T, values_T)
        if self.cp_group is not None and self.cp_group.size() > 1:
            total_S = _SumOverRanks.apply(total_S, self.cp_group)  # type: ignore[no-untyped-call]
        return total_S

    def gather_seqs(self, values_SN: Tensor) -> Tensor:
        """Return the rows of all data-parallel ranks, in rank order; differentiable, collective."""
        if self.dp_group is None or self.dp_group.size() == 1:
            return values_SN
        sizes = _sizes(len(values_SN), self.dp_group, values_SN.device)
        gathered: Tensor = _GatherRows.apply(values_SN, sizes, self.dp_group)  # type: ignore[no-untyped-call]
        return gathered

    def rows_of_gathered(self, rows: int) -> slice:
        """Return which rows of what `gather_seqs` returns are this rank's; collective."""
        if self.dp_group is None or self.dp_group.size() == 1:
            return slice(0, rows)
        start = sum(_sizes(rows, self.dp_group, self.owns_S.device)[: self.dp_group.rank()])
        return slice(start, start + rows)

    def take(self, index: slice | Tensor) -> "RowReduce":
        """Return the same for a selection of this rank's tokens."""
        return RowReduce(self.seq_T[index], self.owns_S, self.cp_group, self.dp_group)


def gather_rows(rows_RN: Tensor) -> Tensor:
    """Return the rows of all data-parallel ranks, in rank order; collective over these."""
    group = parallel_state.get_data_parallel_group()
    return RowReduce(rows_RN, rows_RN, dp_group=group).gather_seqs(rows_RN)


def sum_over_data(values: Tensor) -> Tensor:
    """Sum over data- and context-parallel ranks, in place; every pipeline stage has its own."""
    _all_reduce(values, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return values


def sum_shares(
    shares: Mapping[str, tuple[Tensor | float, Tensor | float]],
    names: list[str] | None,
    device: torch.device,
    *,
    votes: int = 0,
) -> tuple[dict[str, tuple[float, float]], int]:
    """Sum every rank's (sum, count) shares, and its votes; collective over all ranks.

    Of shares only tensor-parallel rank 0 of the last pipeline stage contributes, since the others
    hold copies or nothing; every rank has its own votes. `names` is the agreed order where the
    caller knows it; None: rank 0 of the last stage tells it.
    """
    if names is None:
        names = from_last_stage(sorted(shares))
    nothing: tuple[float, float] = (0.0, 0.0)
    mine = shares if _contributes() else {}
    numbers = [*(x for name in names for x in mine.get(name, nothing)), float(votes)]
    on_device = [i for i, x in enumerate(numbers) if isinstance(x, Tensor)]
    known = [0.0 if isinstance(x, Tensor) else x for x in numbers]
    flat = torch.tensor(known, dtype=torch.float64, device=device)
    if on_device:
        flat[on_device] = torch.stack([torch.as_tensor(numbers[i]).double() for i in on_device])
    _all_reduce(flat)
    *pairs, voted = flat.tolist()
    return {n: (pairs[2 * i], pairs[2 * i + 1]) for i, n in enumerate(names)}, int(voted)


def largest_shares(values: Mapping[str, Tensor], device: torch.device) -> dict[str, float]:
    """Return the largest of every rank's numbers, by name; collective over all ranks.

    A name for which no rank has a number is left out.
    """
    names = from_last_stage(sorted(values))
    if not names:
        return {}
    flat = torch.full((len(names),), -torch.inf, dtype=torch.float64, device=device)
    if _contributes():
        for i, name in enumerate(names):
            flat[i] = values.get(name, -torch.inf)
    _all_reduce(flat, op=dist.ReduceOp.MAX)
    found = zip(names, flat.tolist(), strict=True)
    return {name: value for name, value in found if value != -math.inf}


def _contributes() -> bool:
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    return bool(last and parallel_state.get_tensor_model_parallel_rank() == 0)


def from_last_stage[T](value: T) -> T:
    """Return the value that the last pipeline stage has; picklable, collective over the stages."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=dist.get_process_group_ranks(group)[-1], group=group)
    return box[0]


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set on some rank; collective."""
    if dist.get_world_size() == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def _all_reduce(
    values: Tensor,
    *,
    group: Any = None,  # noqa: ANN401
    op: Any = dist.ReduceOp.SUM,  # noqa: ANN401
) -> None:
    """Reduce in place; not within a group of one, where gloo takes a tenth of a millisecond."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(values, op=op, group=group)
