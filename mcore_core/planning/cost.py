"""A rough time of one optimizer step, to rank layouts that fit: arithmetic, traffic and bubbles.

The numbers below are of one H100 with NVLink inside a machine and 400 Gb/s between machines, as
training reaches them. They are for comparing layouts of one run, not for promising seconds.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mcore_core.planning.memory import micro_batches, recompute_of, row_tokens
from mcore_core.planning.weights import model_parameters

if TYPE_CHECKING:
    from mcore_core.config.compose import RunConfig
    from mcore_core.model.architecture import Architecture
    from mcore_core.parallel.topology import Layout

FLOPS = 400e12
"""Operations a second in 16-bit matrix products of ordinary size."""
NEAR, FAR = 250e9, 40e9
"""Bytes a second and GPU inside a machine, and between machines."""
HIDDEN = 0.7
"""Part of the gradients' reduction that hides behind the backward pass."""
THIN = 0.04
"""What matrix products lose each time tensor parallelism halves them."""
FEW = 256
"""Tokens of an expert at which its products run at half their speed."""
PASSES = 3
"""A forward pass, and the backward pass at twice its cost."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """Parts of a step."""

    compute: float
    tensor: float
    context: float
    expert: float
    bubble: float
    data: float

    @property
    def total(self) -> float:
        """The whole step."""
        return self.compute + self.tensor + self.context + self.expert + self.bubble + self.data


def _few_rows(shape: "Architecture", layout: "Layout", local: float) -> float:
    """Return what experts lose because each sees few tokens at a time, as parameters a token."""
    moe = shape.moe
    if moe is None:
        return 0.0
    rows = local * moe.topk * layout.ep * layout.etp / layout.tp / moe.num_experts
    used = 3 * shape.hidden_size * moe.ffn_hidden_size * moe.topk * len(moe.layers)
    return used * FEW / max(rows, 1.0)


def step_seconds(
    config: "RunConfig", shape: "Architecture", layout: "Layout", *, per_node: int
) -> Seconds:
    """Return the estimated parts of one optimizer step."""
    count, tokens = micro_batches(config, layout), row_tokens(config, shape)
    local = tokens / layout.cp
    total, active = model_parameters(shape)
    heads = shape.num_attention_heads * shape.kv_channels
    square = 2 * shape.num_layers * tokens * heads  # scores and their product, half of them masked
    again = {"full": 4 / 3, "none": 1.0}.get(recompute_of(config).granularity, 1.03)
    speed = FLOPS * (1 - THIN) ** math.log2(layout.tp)
    head = shape.vocab_size * shape.hidden_size
    table = head if shape.tie_word_embeddings else 2 * head
    layers = active - table + square + _few_rows(shape, layout, local)
    # the last stage has the head too, and the others wait for it
    work = again * layers / layout.pp + head
    compute = count * PASSES * 2 * work * tokens / (layout.tp * layout.cp) / speed
    each = local * shape.hidden_size * 2 * count * shape.num_layers / layout.pp

    def travel(size: float, ranks: int) -> float:
        rate = NEAR if ranks <= per_node else FAR
        return PASSES * size * (ranks - 1) / ranks / rate if ranks > 1 else 0.0

    tensor = travel(4 * each, layout.tp)
    keys = 2 * shape.num_query_groups * shape.kv_channels / shape.hidden_size
    context = travel(each * layout.cp * keys / layout.tp, layout.tp * layout.cp)
    context = context if layout.cp > 1 else 0.0
    expert = 0.0
    if shape.moe is not None and layout.ep > 1:
        part = len(shape.moe.layers) / shape.num_layers
        expert = travel(2 * each * shape.moe.topk * part / layout.tp, layout.ep * layout.etp)
    inner = compute + tensor + context + expert
    bubble = inner * (layout.pp - 1) / (count * (layout.vpp or 1))
    ranks = layout.dp * layout.cp
    data = 0.0
    if ranks > 1:
        mine = 6 * total / (layout.tp * layout.pp * max(1, layout.ep if shape.moe else 1))
        rate = NEAR if layout.world <= per_node else FAR
        data = mine * (ranks - 1) / ranks / rate * (1 - HIDDEN)
    return Seconds(compute, tensor, context, expert, bubble, data)
