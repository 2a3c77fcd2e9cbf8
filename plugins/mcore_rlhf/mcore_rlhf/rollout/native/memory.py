"""How many slots the memory for keys and values has room for."""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state

if TYPE_CHECKING:
    from mcore_core.model.build import ModelPlan

CPU_GIB = 4.0
CPU_PROMPT_TOKENS = 4096
MOST_PROMPT_TOKENS = 65536
"""Prompts of more tokens fill a GPU: larger passes are no faster."""
PROMPT_SHARE = 0.1
"""Of a GPU's free memory, what the activations of one pass over prompts may take."""


def slot_bytes(plan: "ModelPlan", layers: range, capacity: int) -> int:
    """Return what a slot of `capacity` tokens takes on a rank that holds these HF layers."""
    shape, tp, size = plan.architecture, plan.layout.tp, plan.dtype.itemsize
    linear = shape.linear_attention
    if shape.mla is not None:
        mla = shape.mla
        heads = shape.num_attention_heads // tp
        each = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim)
    else:
        each = 2 * max(1, shape.num_query_groups // tp) * shape.kv_channels
    total = 0
    for layer in layers:
        if linear is not None and layer in linear.layers:
            keys, values = linear.num_key_heads // tp, linear.num_value_heads // tp
            channels = 2 * keys * linear.key_head_dim + values * linear.value_head_dim
            state = values * linear.key_head_dim * linear.value_head_dim
            total += channels * linear.conv_kernel * size + state * 4
        else:
            total += each * capacity * size
    return total


def prompt_tokens_that_fit(plan: "ModelPlan", device: torch.device) -> int:
    """Return how many tokens of prompts every rank of the model can read in one pass; collective.

    A prompt that is longer is read by itself.
    """
    if device.type != "cuda":
        return CPU_PROMPT_TOKENS
    shape, tp = plan.architecture, plan.layout.tp
    experts = shape.moe.topk * shape.moe.ffn_hidden_size if shape.moe is not None else 0
    heads = (shape.num_attention_heads + 2 * shape.num_query_groups) * shape.kv_channels
    wide = max(shape.ffn_hidden_size, experts)
    each = (8 * shape.hidden_size + (4 * wide + 3 * heads) // tp) * plan.dtype.itemsize
    if shape.moe is not None:
        each += 3 * shape.moe.topk * shape.hidden_size * plan.dtype.itemsize
    fit = int(torch.cuda.mem_get_info(device)[0] * PROMPT_SHARE) // each
    return max(1024, _least(min(fit, MOST_PROMPT_TOKENS), device))


def _least(number: int, device: torch.device) -> int:
    """Return the smallest number that a rank of the model has."""
    found = torch.tensor(number, device=device)
    group = parallel_state.get_model_parallel_group()
    if group.size() > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MIN, group=group)
    return int(found)


def slots_that_fit(
    plan: "ModelPlan", layers: int, capacity: int, gib: float | None, device: torch.device
) -> int:
    """Return the slots that every rank of the model has memory for, at least one; collective."""
    if gib is not None:
        budget = gib * 2**30
    elif device.type == "cuda":
        budget = torch.cuda.mem_get_info(device)[0] / 2
    else:
        budget = CPU_GIB * 2**30
    each = slot_bytes(plan, range(layers), capacity)
    return _least(max(1, int(budget // max(1, each))), device)


def head_sizes(plan: "ModelPlan") -> tuple[int, int]:
    """Return the sizes of a key and of a value."""
    shape = plan.architecture
    if shape.mla is None:
        return shape.kv_channels, shape.kv_channels
    return shape.mla.qk_nope_head_dim + shape.mla.qk_rope_head_dim, shape.mla.v_head_dim
