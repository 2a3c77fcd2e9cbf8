"""Floating-point operations of a training step, from the shape of the model and the sequences.

Counted are the products that the model's definition asks for: causal attention only where a query
sees a key, the experts that a token is sent to, the head where a loss is computed. What an
implementation does beyond that (recomputation, padding, chunks of a linear attention) is not.
A product of m x k and k x n is 2 m k n operations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mcore_core.model.architecture import Architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSize:
    """How much data one step, or one forward pass, is."""

    tokens: float
    """Tokens, padding not counted."""
    head_tokens: float
    """Tokens whose logits are computed."""
    pairs: float
    """Pairs of a query and a key that it sees, over all sequences, without a window."""
    window_pairs: float = 0.0
    """The same with the model's window."""


def causal_pairs(lengths: Sequence[int], window: int | None = None) -> int:
    """Return how many (query, key) pairs causal attention computes in sequences of these lengths.

    Query i sees i + 1 keys, or the last `window` of them.
    """
    total = 0
    for n in lengths:
        full = n if window is None else min(n, window)
        total += full * (full + 1) // 2 + (n - full) * full
    return total


def step_flops(
    shape: "Architecture", size: StepSize, *, trained: float = 1.0, depths: int = 0
) -> float:
    """Return the operations of one step, forward and backward, on all devices together.

    Args:
        shape: The model.
        size: The global batch.
        trained: Share of the parameters that train: the others need no gradient of their own.
        depths: Layers of multi-token prediction that run.

    A product costs three times its forward pass: the backward pass has one product for the gradient
    of each side, and no weight's where it is frozen.
    """
    linear = token_flops(shape) * size.tokens + 2.0 * _head(shape) * size.head_tokens
    attention = _scores(shape, size, range(shape.num_layers))
    if depths:
        ahead = [shape.mtp_kind] * depths
        # each depth joins the embedding of a later token to the hidden state, and has the head
        joined = 2 * 2 * shape.hidden_size**2
        linear += depths * (joined * size.tokens + 2 * _head(shape) * size.head_tokens)
        linear += sum(_layer(shape, layer) for layer in ahead) * size.tokens
        attention += _scores(shape, size, ahead)
    return linear * (2 + trained) + attention * 3


def forward_flops(shape: "Architecture", size: StepSize) -> float:
    """Return the operations of one forward pass."""
    linear = token_flops(shape) * size.tokens + 2.0 * _head(shape) * size.head_tokens
    return linear + _scores(shape, size, range(shape.num_layers))


def token_flops(shape: "Architecture") -> float:
    """Return the operations of all layers on one token, without scores and head."""
    return float(sum(_layer(shape, layer) for layer in range(shape.num_layers)))


def _head(shape: "Architecture") -> int:
    return shape.vocab_size * shape.hidden_size


def _layer(shape: "Architecture", layer: int) -> int:
    linear = shape.linear_attention is not None and layer in shape.linear_attention.layers
    attention = _linear_attention(shape) if linear else _attention(shape)
    return 2 * (attention + _mlp(shape, layer))


def _attention(shape: "Architecture") -> int:
    """Return the weights of attention's projections."""
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    if (mla := shape.mla) is not None:
        head = mla.qk_nope_head_dim + mla.qk_rope_head_dim
        rank = mla.q_lora_rank
        query = hidden * heads * head if rank is None else rank * (hidden + heads * head)
        keys = hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim)
        keys += mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        return query + keys + heads * mla.v_head_dim * hidden
    head = shape.kv_channels
    queries = heads * head * (2 if shape.attention_output_gate else 1)
    return hidden * (queries + 2 * shape.num_query_groups * head + heads * head)


def _linear_attention(shape: "Architecture") -> int:
    """Return what a gated delta net multiplies for a token: projections, convolution, state.

    The state of a head, key size x value size, is read for the key, corrected by an outer product
    and read for the query (Yang et al., Gated Delta Networks, 2024, equation 10).
    """
    linear = shape.linear_attention
    assert linear is not None
    keys = linear.num_key_heads * linear.key_head_dim
    values = linear.num_value_heads * linear.value_head_dim
    projected = 2 * keys + 2 * values + 2 * linear.num_value_heads
    convolved = (2 * keys + values) * linear.conv_kernel
    state = 3 * linear.num_value_heads * linear.key_head_dim * linear.value_head_dim
    return shape.hidden_size * (projected + values) + convolved + state


def _mlp(shape: "Architecture", layer: int) -> int:
    """Return the weights that a token meets in a layer's MLP or in its experts."""
    hidden, matrices = shape.hidden_size, 3 if shape.gated else 2
    moe = shape.moe
    if moe is None or layer not in moe.layers:
        return matrices * hidden * shape.ffn_hidden_size
    shared = moe.shared_ffn_hidden_size or 0
    inside = moe.topk * moe.ffn_hidden_size + shared
    gate = hidden if shared and moe.shared_gate else 0
    return matrices * hidden * inside + hidden * moe.num_experts + gate


def _scores(shape: "Architecture", size: StepSize, layers: Sequence[int]) -> float:
    """Return the operations of attention's scores and of the sums that they weigh."""
    linear = shape.linear_attention.layers if shape.linear_attention else ()
    if (mla := shape.mla) is not None:
        width = mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim
    else:
        width = 2 * shape.kv_channels
    windowed = set(shape.window_layers) if shape.window_size is not None else set()
    pairs = sum(
        size.window_pairs if layer in windowed else size.pairs
        for layer in layers
        if layer not in linear
    )
    return 2.0 * shape.num_attention_heads * width * pairs
