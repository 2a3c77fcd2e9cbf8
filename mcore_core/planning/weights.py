"""Every parameter of a rank, by arithmetic: what the builder builds, without building it.

Sizes are of one rank: dimensions that tensor- or expert-parallel ranks share are divided already.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mcore_core.model.architecture import Architecture
    from mcore_core.parallel.topology import Layout


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter of a rank, or of each of several experts together."""

    name: str
    count: int
    """Elements on this rank."""
    whole: int
    """Elements of the parameter over the ranks that share it."""
    expert: bool = False
    """Reduced over the ranks that hold the same experts, not over all data-parallel ones."""
    linear: tuple[int, int, int] | None = None
    """For a projection: this rank's inputs and outputs, and how many projections are fused."""
    copies: int = 1
    """Experts that lie in the parameter."""

    @property
    def matrix(self) -> bool:
        """Whether muon would orthogonalize its updates."""
        return self.linear is not None


class _Layer:
    """The parameters of HF layers under one layout."""

    def __init__(self, shape: "Architecture", layout: "Layout") -> None:
        self.shape, self.layout = shape, layout
        self.norm_size = 2 if shape.normalization == "LayerNorm" else 1

    def norm(self, name: str, size: int, split: int = 1) -> Weight:
        whole = size * self.norm_size
        return Weight(name, whole // split, whole)

    def column(
        self, name: str, inputs: int, outputs: int, *, bias: bool = False, parts: int = 1
    ) -> Iterator[Weight]:
        tp = self.layout.tp
        yield Weight(
            f"{name}.weight",
            inputs * outputs // tp,
            inputs * outputs,
            linear=(inputs, outputs // tp, parts),
        )
        if bias:
            yield Weight(f"{name}.bias", outputs // tp, outputs)

    def row(self, name: str, inputs: int, outputs: int, *, bias: bool = False) -> Iterator[Weight]:
        tp = self.layout.tp
        yield Weight(
            f"{name}.weight",
            inputs * outputs // tp,
            inputs * outputs,
            linear=(inputs // tp, outputs, 1),
        )
        if bias:
            yield Weight(f"{name}.bias", outputs, outputs)

    def layer(self, index: int) -> Iterator[Weight]:
        """Yield the parameters of an HF layer."""
        shape, hidden = self.shape, self.shape.hidden_size
        yield self.norm("input_layernorm", hidden)
        linear = shape.linear_attention
        if linear is not None and index in linear.layers:
            yield from self.delta_net()
        elif shape.mla is not None:
            yield from self.latent()
        else:
            yield from self.attention()
        if shape.post_attention_norm:
            yield self.norm("post_attention_norm", hidden)
        yield self.norm("pre_mlp_layernorm", hidden)
        if shape.moe is not None and index in shape.moe.layers:
            yield from self.experts()
        else:
            gated = 2 if shape.gated else 1
            width = shape.ffn_hidden_size
            bias = shape.mlp_bias
            yield from self.column("fc1", hidden, width * gated, bias=bias, parts=gated)
            yield from self.row("fc2", width, hidden, bias=bias)
        if shape.post_mlp_norm:
            yield self.norm("post_mlp_norm", hidden)

    def attention(self) -> Iterator[Weight]:
        shape, tp = self.shape, self.layout.tp
        heads = shape.num_attention_heads * shape.kv_channels
        keys = shape.num_query_groups * shape.kv_channels
        gate = heads if shape.attention_output_gate else 0
        outputs = heads + gate + 2 * keys
        yield from self.column(
            "linear_qkv", shape.hidden_size, outputs, bias=shape.add_qkv_bias, parts=3
        )
        if shape.qk_layernorm and shape.qk_norm_width == "full":
            yield Weight("q_layernorm", heads // tp, heads)
            yield Weight("k_layernorm", keys // tp, keys)
        elif shape.qk_layernorm:
            yield self.norm("q_layernorm", shape.kv_channels)
            yield self.norm("k_layernorm", shape.kv_channels)
        if shape.softmax_type == "learnable":
            number = shape.num_attention_heads
            yield Weight("softmax_offset", number // tp, number)
        bias = shape.attention_output_bias
        yield from self.row("linear_proj", heads, shape.hidden_size, bias=bias)

    def latent(self) -> Iterator[Weight]:
        shape, hidden = self.shape, self.shape.hidden_size
        mla = shape.mla
        assert mla is not None
        total = shape.num_attention_heads
        query = total * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        if mla.q_lora_rank is None:
            yield from self.column("linear_q_proj", hidden, query)
        else:
            down = hidden * mla.q_lora_rank
            yield Weight("linear_q_down_proj", down, down, linear=(hidden, mla.q_lora_rank, 1))
            yield self.norm("q_layernorm", mla.q_lora_rank)
            yield from self.column("linear_q_up_proj", mla.q_lora_rank, query)
        narrow = mla.kv_lora_rank + mla.qk_rope_head_dim
        yield Weight(
            "linear_kv_down_proj", hidden * narrow, hidden * narrow, linear=(hidden, narrow, 1)
        )
        yield self.norm("kv_layernorm", mla.kv_lora_rank)
        wide = total * (mla.qk_nope_head_dim + mla.v_head_dim)
        yield from self.column("linear_kv_up_proj", mla.kv_lora_rank, wide)
        bias = shape.attention_output_bias
        yield from self.row("linear_proj", total * mla.v_head_dim, hidden, bias=bias)

    def delta_net(self) -> Iterator[Weight]:
        shape, tp = self.shape, self.layout.tp
        linear = shape.linear_attention
        assert linear is not None
        keys = linear.num_key_heads * linear.key_head_dim
        values = linear.num_value_heads * linear.value_head_dim
        heads = linear.num_value_heads
        yield from self.column("in_proj", shape.hidden_size, 2 * keys + 2 * values + 2 * heads)
        conv = (2 * keys + values) * linear.conv_kernel
        yield Weight("conv1d", conv // tp, conv)
        yield Weight("dt_bias", heads // tp, heads)
        yield Weight("A_log", heads // tp, heads)
        yield self.norm("out_norm", linear.value_head_dim)
        yield from self.row("out_proj", values, shape.hidden_size)

    def experts(self) -> Iterator[Weight]:
        shape, layout, hidden = self.shape, self.layout, self.shape.hidden_size
        moe = shape.moe
        assert moe is not None
        yield Weight("router.weight", moe.num_experts * hidden, moe.num_experts * hidden)
        if moe.router_bias:
            yield Weight("router.bias", moe.num_experts, moe.num_experts)
        gated = 2 if shape.gated else 1
        here, width = moe.num_experts // layout.ep, moe.ffn_hidden_size // layout.etp
        for name, linear, bias in (
            ("experts.fc1", (hidden, width * gated, gated), width * gated),
            ("experts.fc2", (width, hidden, 1), hidden),
        ):
            count = here * linear[0] * linear[1]
            whole = moe.num_experts * hidden * moe.ffn_hidden_size
            whole *= gated if name.endswith("fc1") else 1
            yield Weight(name, count, whole, expert=True, linear=linear, copies=here)
            if moe.linear_bias:
                yield Weight(f"{name}.bias", here * bias, moe.num_experts * bias, expert=True)
        if moe.shared_ffn_hidden_size:
            size = moe.shared_ffn_hidden_size
            yield from self.column("shared.fc1", hidden, size * gated, parts=gated)
            yield from self.row("shared.fc2", size, hidden)
            if moe.shared_gate:
                yield Weight("shared.gate", hidden, hidden)

    def prediction(self, depth: int) -> Iterator[Weight]:
        """Yield the parameters of a depth of multi-token prediction, from 0."""
        shape, hidden = self.shape, self.shape.hidden_size
        yield self.norm("enorm", hidden)
        yield self.norm("hnorm", hidden)
        yield from self.column("eh_proj", 2 * hidden, hidden)
        yield from self.layer(shape.mtp_kind)
        if shape.mtp_norm:
            yield self.norm("final_layernorm", hidden)


def padded_vocab(shape: "Architecture", layout: "Layout", given: int | None = None) -> int:
    """Return the rows of the embedding over all tensor-parallel ranks."""
    return given or -(-shape.vocab_size // layout.tp) * layout.tp


def layers_of_rank(stage_layers: Sequence[int], layout: "Layout", rank: int) -> list[int]:
    """Return the HF layers that a pipeline rank holds, all its chunks together."""
    starts = [sum(stage_layers[:i]) for i in range(len(stage_layers))]
    return [
        layer
        for chunk in range(rank, len(stage_layers), layout.pp)
        for layer in range(starts[chunk], starts[chunk] + stage_layers[chunk])
    ]


def rank_weights(
    shape: "Architecture",
    layout: "Layout",
    stage_layers: Sequence[int],
    rank: int,
    *,
    vocab: int | None = None,
) -> list[Weight]:
    """Return every parameter of a pipeline rank.

    Args:
        shape: The model.
        layout: The layout.
        stage_layers: HF layers of each pipeline chunk, in model order.
        rank: Which pipeline rank.
        vocab: Rows of the embedding; None: the vocabulary, padded for tensor parallelism.
    """
    parts, found = _Layer(shape, layout), []
    rows = padded_vocab(shape, layout, vocab)
    table = Weight("embedding", rows * shape.hidden_size // layout.tp, rows * shape.hidden_size)
    first, last = rank == 0, rank == layout.pp - 1
    if first:
        found.append(table)
    for layer in layers_of_rank(stage_layers, layout, rank):
        found += parts.layer(layer)
    if last:
        found.append(parts.norm("final_norm", shape.hidden_size))
        for depth in range(shape.mtp_layers):
            found += parts.prediction(depth)
        embeds = first or shape.mtp_layers > 0
        if shape.mtp_layers and not first:
            found.append(table)
        if not shape.tie_word_embeddings or not embeds:
            found.append(Weight("head", table.count, table.whole))
    return found


def model_parameters(shape: "Architecture") -> tuple[int, int]:
    """Return the parameters of the whole model, and how many of them one token uses."""
    from mcore_core.parallel.topology import Layout  # noqa: PLC0415  (arithmetic of one rank)

    weights = rank_weights(shape, Layout(), [shape.num_layers], 0, vocab=shape.vocab_size)
    total = sum(w.count for w in weights)
    moe = shape.moe
    idle = 0.0
    if moe is not None:
        idle = sum(w.count for w in weights if w.expert) * (1 - moe.topk / moe.num_experts)
    return total, total - round(idle)
