"""Rules of linear attention: the gated delta net, as Qwen3-Next and Qwen3.5 store it."""

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Rule, Shape, Shard, Stack, Transform
from mcore_core.model.tables import (
    COLUMN,
    LLAMA,
    ROW,
    Block,
    Names,
    attention,
    decoder_layers,
    dense_mlp,
    linear,
    norm,
    plain,
    prediction_shape,
)
from mcore_core.model.tables_moe import QWEN_MOE, MoENames, moe
from mcore_core.model.transforms import Rows, Run, spread


def mixed_attention(a: Architecture, names: Names = LLAMA, *, fused: bool = True) -> list[Rule]:
    """Return the first half of every layer: gated delta nets, and attention in the others."""
    assert a.linear_attention is not None
    rest = sorted(set(range(a.num_layers)) - set(a.linear_attention.layers))
    rules: list[Rule] = []
    if a.linear_attention.layers:
        rules += delta_net(a, decoder_layers(a, a.linear_attention.layers), fused=fused)
    return rules + (attention(a, decoder_layers(a, rest), names) if rest else [])


def delta_net(a: Architecture, at: Block, *, fused: bool) -> list[Rule]:
    """Return the input norm and the gated delta net of each layer.

    `fused`: q, k, v and z of each key head lie together in one tensor, b and a in another
    (Qwen3-Next); otherwise there are tensors for q, k and v together, for z, for b and for a.
    """
    shape = a.linear_attention
    assert shape is not None
    keys = shape.num_key_heads * shape.key_head_dim
    values, heads = shape.num_value_heads * shape.value_head_dim, shape.num_value_heads
    hf, mcore = "linear_attn.", "self_attention."
    rules = norm(a, at, "input_layernorm", "input_layernorm")
    parts: dict[str, int]
    transform: Transform
    if fused:
        parts = {"in_proj_qkvz": 2 * keys + 2 * values, "in_proj_ba": 2 * heads}
        transform = Rows(runs=_by_key_head(a))
    else:
        parts = {"in_proj_qkv": 2 * keys + values, "in_proj_z": values}
        parts |= {"in_proj_b": heads, "in_proj_a": heads}
        transform = Stack()
    shapes: tuple[Shape, ...] = tuple((rows, a.hidden_size) for rows in parts.values())
    rules.append(
        Rule(
            hf=tuple(f"{at.hf}{hf}{name}.weight" for name in parts),
            shapes=shapes,
            mcore=f"{at.mcore}{mcore}in_proj.weight",
            transform=transform,
            shard=Shard(dim=0, sections=(keys, keys, values, values, heads, heads)),
            over=at.over,
        )
    )
    conv = (2 * keys + values, 1, shape.conv_kernel)
    split = Shard(dim=0, sections=(keys, keys, values))
    rules.append(plain(at, hf + "conv1d.weight", mcore + "conv1d.weight", conv, split))
    rules += [plain(at, hf + x, mcore + x, (heads,), COLUMN) for x in ("dt_bias", "A_log")]
    size = (shape.value_head_dim,)
    rules.append(plain(at, hf + "norm.weight", mcore + "out_norm.weight", size))
    out = (a.hidden_size, values)
    return rules + linear(at, hf + "out_proj", mcore + "out_proj", out, ROW)


def qwen_mtp(a: Architecture, moe_names: MoENames = QWEN_MOE) -> list[Rule]:
    """Return the prediction layer that Qwen3-Next has, and others after it: attention and MLP."""
    rules: list[Rule] = []
    for i in range(a.mtp_layers):
        outer = Block("mtp.", f"mtp.layers.{i}.")
        inner = Block(f"mtp.layers.{i}.", outer.mcore + "transformer_layer.")
        rules += norm(a, outer, "pre_fc_norm_embedding", "enorm")
        rules += norm(a, outer, "pre_fc_norm_hidden", "hnorm")
        rules.append(plain(outer, "fc.weight", "eh_proj.weight", prediction_shape(a), COLUMN))
        experts = a.moe is not None and not a.mtp_dense
        rules += attention(a, inner)
        rules += moe(a, inner, moe_names) if experts else dense_mlp(a, inner)
        rules += norm(a, outer, "norm", "final_layernorm")
    return rules


def _by_key_head(a: Architecture) -> tuple[Run, ...]:
    """HF: q, k, v, z of each key head, and b, a of each; megatron: all q, then all k, and so on."""
    shape = a.linear_attention
    assert shape is not None
    key, heads = shape.key_head_dim, shape.num_key_heads
    each = shape.num_value_heads // heads
    value = each * shape.value_head_dim
    width = 2 * key + 2 * value
    runs: list[Run] = []
    start = 0
    for count in (key, key, value, value):
        runs += spread(0, start, count, width, heads)
        start += count
    return (*runs, *spread(1, 0, each, 2 * each, heads), *spread(1, each, each, 2 * each, heads))
