"""Bytes that autograd keeps of one micro-batch, layer by layer; docs/plan.md derives each line.

T are the tokens of a micro-batch on a context-parallel rank, S those of them that a rank holds
between layers: T / tp with sequence parallelism, else T. b is the size of an activation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mcore_core.model.architecture import Architecture
    from mcore_core.parallel.topology import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Recompute:
    """Which activations are computed again in the backward pass."""

    granularity: str = "selective"
    method: str = "uniform"
    layers: int = 1
    """HF layers recomputed together (uniform) or in all on a stage (block)."""
    modules: frozenset[str] = frozenset({"core_attn"})

    def does(self, module: str) -> bool:
        """Return whether a module is recomputed by itself."""
        return self.granularity == "selective" and module in self.modules


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What a rank computes at a time."""

    tokens: int
    """T."""
    size: int
    """b, bytes."""
    fused: bool = True
    """Norms and gated activations in one kernel each, attention over the row in one call: a GPU."""
    recompute: Recompute = Recompute()


class Layers:
    """Saved bytes of a layer's parts under one layout."""

    def __init__(self, shape: "Architecture", layout: "Layout", rows: Rows) -> None:
        self.shape, self.layout, self.rows = shape, layout, rows
        self.T = rows.tokens
        self.S = -(-rows.tokens // layout.tp) if layout.sp else rows.tokens
        self.b = rows.size

    def layer(self, index: int) -> int:
        """Return what HF layer `index` saves."""
        shape = self.shape
        linear = shape.linear_attention
        if linear is not None and index in linear.layers:
            mixer = self._delta_net()
        else:
            mixer = self._latent() if shape.mla is not None else self._attention()
        experts = shape.moe is not None and index in shape.moe.layers
        return round(
            self._norm() + mixer + self._norm() + (self._moe() if experts else self._mlp())
        )

    def edge(self, index: int) -> int:
        """Return what is kept of a layer that is recomputed whole: its input."""
        return self.S * self.shape.hidden_size * self.b

    def _norm(self) -> float:
        """Input, output (which the projection after it keeps too) and one float32 a token."""
        hidden, rows = self.shape.hidden_size, self.rows
        kept = 2 * hidden * self.b + 4
        if rows.recompute.does("layernorm"):
            kept -= hidden * self.b
        if not rows.fused:
            kept += hidden * self.b  # the normalized input, before the weight
        extra = self.shape.post_attention_norm + self.shape.post_mlp_norm
        return self.S * (kept + extra / 2 * (2 * hidden * self.b + 4))

    def _attention(self) -> float:
        shape, tp, b = self.shape, self.layout.tp, self.b
        heads = shape.num_attention_heads * shape.kv_channels
        keys = shape.num_query_groups * shape.kv_channels
        gate = heads if shape.attention_output_gate else 0
        cp = self.layout.cp
        # the output of linear_qkv, of which values are a view
        kept: float = (heads + gate + 2 * keys) * b
        copies = not self.rows.fused and cp == 1 and not self.rows.recompute.does("core_attn")
        if copies:  # sequences of like length are laid out together: values are copied
            kept = keys * b + (kept if gate or shape.qk_layernorm else 0)
        rotated = shape.position_embedding_type == "rope"
        if rotated or shape.qk_layernorm:
            kept += (heads + keys) * b
        if shape.qk_layernorm:
            kept += (shape.num_attention_heads + shape.num_query_groups) * 4
            kept += 0 if self.rows.fused else (heads + keys) * b
        if gate:
            kept += 2 * heads * b  # the sigmoid and the gated output
        return self.T / tp * (kept + self._core(heads, keys * cp if cp > 1 else 0))

    def _core(self, heads: int, gathered: int) -> float:
        """Return what attention itself keeps a token: its output, and a float32 a head."""
        out = heads * self.b
        if self.rows.recompute.does("core_attn"):
            return out
        once = 1 if self.rows.fused else 2  # segment by segment there is a copy of the whole row
        return once * out + self.shape.num_attention_heads * 4 + 2 * gathered * self.b

    def _latent(self) -> float:
        shape, tp, b = self.shape, self.layout.tp, self.b
        mla = shape.mla
        assert mla is not None
        query, value = mla.qk_nope_head_dim + mla.qk_rope_head_dim, mla.v_head_dim
        narrow = 2 * mla.kv_lora_rank + mla.qk_rope_head_dim + 2 * (mla.q_lora_rank or 0)
        wide = shape.num_attention_heads * (2 * query + mla.qk_nope_head_dim + value)
        padded = shape.num_attention_heads * max(0, query - value)
        core = self._core(shape.num_attention_heads * value, 0)
        if padded and not self.rows.recompute.does("core_attn"):
            wide += 2 * padded  # values and outputs as wide as queries, for one kernel
            core += shape.num_attention_heads * value * b
        return self.S * narrow * b + self.T / tp * (wide * b + core)

    def _delta_net(self) -> float:
        linear, tp = self.shape.linear_attention, self.layout.tp
        assert linear is not None
        keys = linear.num_key_heads * linear.key_head_dim
        values = linear.num_value_heads * linear.value_head_dim
        projected = 2 * keys + 2 * values + 2 * linear.num_value_heads
        mixed = 2 * keys + values
        # before and after the convolution, normalized, per value head; output, normed and gated
        repeated = 2 * linear.num_value_heads * linear.key_head_dim + values
        return self.T / tp * (projected + 2 * mixed + repeated + 3 * values) * self.b

    def _gated(self, width: float) -> float:
        """Return what a gated MLP of a width keeps a token: both halves and their product."""
        gated = self.shape.gated
        kept = (3 if gated else 2) * width
        if gated and not self.rows.fused:
            kept += 2 * width  # the activated half, and the other one
        return kept * self.b

    def _mlp(self) -> float:
        if self.rows.recompute.does("mlp"):
            return 0.0
        return self.T / self.layout.tp * self._gated(self.shape.ffn_hidden_size)

    def _moe(self) -> float:
        shape, layout, rows = self.shape, self.layout, self.rows
        moe = shape.moe
        assert moe is not None
        shared = 0.0
        if moe.shared_ffn_hidden_size and not rows.recompute.does("shared_experts"):
            shared = self.T / layout.tp * self._gated(moe.shared_ffn_hidden_size)
            shared += self.S * shape.hidden_size * self.b if moe.shared_gate else 0
        if rows.recompute.does("moe"):
            return 0.0
        # without sequence parallelism the layer divides the tokens by itself
        mine = self.T / layout.tp
        router = mine * (2 * moe.num_experts * 4 + moe.topk * 20)
        taken = moe.topk * layout.etp
        # the tokens that arrived, their weights, what the experts keep
        each = shape.hidden_size * self.b + 4 + self._experts(moe.ffn_hidden_size / layout.etp)
        return router + mine * taken * each + shared

    def _experts(self, width: float) -> float:
        """Return what an expert of a width keeps a token, the weighted product among it."""
        shape = self.shape
        if not shape.gated:
            return 3 * width * self.b
        if shape.activation not in ("silu", "swish") or shape.activation_clamp is not None:
            return 6 * width * self.b
        # both halves and the weighted product; unfused, the activated half and the product
        return (3 if self.rows.fused else 5) * width * self.b


def stage_bytes(
    shape: "Architecture", layout: "Layout", rows: Rows, layers: Sequence[int], chunks: float
) -> tuple[int, int]:
    """Return what a pipeline rank keeps of its micro-batches in flight, and the peak above it.

    Args:
        shape: The model.
        layout: The layout.
        rows: What a rank computes at a time.
        layers: HF layers of the rank, all its chunks.
        chunks: How many passes over its layers are in flight at most (`in_flight`).

    The peak is what a recomputed part needs while its backward pass runs.
    """
    parts, how = Layers(shape, layout, rows), rows.recompute
    each = [parts.layer(n) for n in layers]
    if how.granularity != "full" or not layers:
        whole = Layers(shape, layout, replace(rows, recompute=Recompute(modules=frozenset())))
        peak = max((whole.layer(n) - x for n, x in zip(layers, each, strict=True)), default=0)
        return round(sum(each) * chunks), peak
    if how.method == "block":
        kept = [parts.edge(n) for n in layers[: how.layers]] + each[how.layers :]
        return round(sum(kept) * chunks), max(each)
    kept = [parts.edge(n) for n in layers[:: how.layers]]
    group = max(sum(each[i : i + how.layers]) for i in range(0, len(each), how.layers))
    return round(sum(kept) * chunks), group


def in_flight(layout: "Layout", rank: int, micro_batches: int) -> float:
    """Return how many micro-batches a pipeline rank holds at most, in passes over all its layers.

    One forward, one backward: a rank runs ahead of the last one by as many as there are ranks after
    it. Interleaved, with v chunks a rank: (2 (pp - rank - 1) + (v - 1) pp + 1) chunks of 1 / v.
    """
    if layout.pp == 1:
        return 1.0
    if layout.vpp is None:
        return float(min(micro_batches, layout.pp - rank))
    chunks = 2 * (layout.pp - rank - 1) + (layout.vpp - 1) * layout.pp + 1
    return min(micro_batches * layout.vpp, chunks) / layout.vpp


def ends_bytes(shape: "Architecture", layout: "Layout", rows: Rows, *, vocab: int) -> int:
    """Return what head and loss hold on the last stage, one chunk of logits at a time.

    The final norm, the gathered hidden states and their gradient; the float32 sum of the output
    weight's gradient; one buffer of logits, which is gone when that sum is rounded to the weight's
    own type.
    """
    hidden, chunk = shape.hidden_size, 384 * 2**20
    local = -(-vocab // layout.tp)
    logits = min(rows.tokens * local * rows.size, chunk)
    states = rows.tokens * hidden * rows.size * (2 + (2 if not layout.sp else 1))
    return round(states + local * hidden * 4 + max(logits, local * hidden * rows.size))
