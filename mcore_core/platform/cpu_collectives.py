"""What megatron asks of NCCL and gloo refuses, built from what gloo has."""

import functools
from typing import Any

import torch
import torch.distributed as dist


def patch_collectives() -> None:
    """Uneven all_gather and reduce_scatter, tensor split sizes, `barrier(device_ids=...)`."""
    module: Any = dist
    module.barrier = _barrier(module.barrier)
    module.all_to_all_single = _all_to_all_single(module.all_to_all_single)
    module.all_gather = _all_gather(module.all_gather)
    module.reduce_scatter = _reduce_scatter(module.reduce_scatter)


def _barrier(barrier: Any) -> Any:  # noqa: ANN401
    @functools.wraps(barrier)
    def wrapped(group: object = None, async_op: bool = False, device_ids: object = None) -> object:
        return barrier(group=group, async_op=async_op)

    return wrapped


def _all_to_all_single(all_to_all: Any) -> Any:  # noqa: ANN401
    def plain(sizes: Any) -> Any:  # noqa: ANN401
        # the MoE dispatcher turns its split sizes into lists only when it copies them off a GPU
        return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes

    @functools.wraps(all_to_all)
    def wrapped(
        output: object,
        input: object,
        output_split_sizes: object = None,
        input_split_sizes: object = None,
        **kwargs: object,
    ) -> object:
        return all_to_all(
            output, input, plain(output_split_sizes), plain(input_split_sizes), **kwargs
        )

    return wrapped


def _all_gather(all_gather: Any) -> Any:  # noqa: ANN401
    @functools.wraps(all_gather)
    def wrapped(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: object = None,
        async_op: bool = False,
    ) -> object:
        if len({t.shape for t in tensor_list}) < 2:
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        rows = max(t.shape[0] for t in tensor_list)
        padded = tensor.new_zeros((rows, *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        full = [torch.empty_like(padded) for _ in tensor_list]
        all_gather(full, padded, group=group)
        for target, source in zip(tensor_list, full, strict=True):
            target.copy_(source[: target.shape[0]])
        return None

    return wrapped


def _reduce_scatter(reduce_scatter: Any) -> Any:  # noqa: ANN401
    @functools.wraps(reduce_scatter)
    def wrapped(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,  # noqa: ANN401
        group: Any = None,  # noqa: ANN401
        async_op: bool = False,
    ) -> object:
        if len({t.shape for t in input_list}) < 2:
            return reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
        full = torch.cat([t.contiguous() for t in input_list])
        dist.all_reduce(full, op=op, group=group)
        parts = torch.split(full, [t.shape[0] for t in input_list])
        output.copy_(parts[dist.get_rank(group)])
        return None

    return wrapped
