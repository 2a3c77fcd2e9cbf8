"""Rules of latent attention and multi-token prediction, as DeepSeek's checkpoints store them."""

from collections.abc import Callable

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Rule
from mcore_core.model.tables import (
    COLUMN,
    LLAMA,
    ROW,
    WHOLE,
    Block,
    Names,
    decoder_layers,
    dense_mlp,
    embedding,
    ending,
    linear,
    norm,
    plain,
    prediction_shape,
)
from mcore_core.model.tables_moe import DEEPSEEK_MOE, MoENames, mlp_or_moe, moe


def mla_decoder(a: Architecture, moe_names: MoENames = DEEPSEEK_MOE) -> list[Rule]:
    """Return the table of a decoder with latent attention, experts or dense, and MTP layers."""
    block = decoder_layers(a)
    rest = mlp_or_moe(a, moe_names) if a.moe is not None else dense_mlp(a, block)
    return [
        *embedding(a, twins(a, "embed_tokens.weight")),
        *latent_attention(a, block),
        *rest,
        *ending(a, twins(a, "shared_head.head.weight")),
        *mtp(a, latent_attention),
    ]


def latent_attention(a: Architecture, at: Block, names: Names = LLAMA) -> list[Rule]:
    """Return the input norm and the latent attention of each layer."""
    shape = a.mla
    assert shape is not None
    heads, hidden = a.num_attention_heads, a.hidden_size
    queries = heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim)
    hf, mcore = "self_attn.", "self_attention."
    rules = norm(a, at, names.input_norm, "input_layernorm")
    if shape.q_lora_rank is None:
        rules += linear(at, hf + "q_proj", mcore + "linear_q_proj", (queries, hidden), COLUMN)
    else:
        rank = shape.q_lora_rank
        rules += linear(at, hf + "q_a_proj", mcore + "linear_q_down_proj", (rank, hidden), WHOLE)
        rules += norm(a, at, hf + "q_a_layernorm", mcore + "q_layernorm", size=rank)
        rules += linear(at, hf + "q_b_proj", mcore + "linear_q_up_proj", (queries, rank), COLUMN)
    rank = shape.kv_lora_rank
    down = (rank + shape.qk_rope_head_dim, hidden)
    up = (heads * (shape.qk_nope_head_dim + shape.v_head_dim), rank)
    rules += linear(at, hf + "kv_a_proj_with_mqa", mcore + "linear_kv_down_proj", down, WHOLE)
    rules += norm(a, at, hf + "kv_a_layernorm", mcore + "kv_layernorm", size=rank)
    rules += linear(at, hf + "kv_b_proj", mcore + "linear_kv_up_proj", up, COLUMN)
    out = (hidden, heads * shape.v_head_dim)
    return rules + linear(at, hf + "o_proj", mcore + "linear_proj", out, ROW)


def twins(a: Architecture, name: str) -> tuple[str, ...]:
    """Return the names under which MTP layers store the embedding or the head once more."""
    return tuple(f"model.layers.{a.num_layers + i}.{name}" for i in range(a.mtp_layers))


def mtp(
    a: Architecture,
    attention: Callable[[Architecture, Block], list[Rule]],
    moe_names: MoENames = DEEPSEEK_MOE,
    *,
    final_norm: str = "shared_head.norm",
) -> list[Rule]:
    """Return the multi-token prediction layers: HF numbers them after the decoder's."""
    rules: list[Rule] = []
    for i in range(a.mtp_layers):
        outer = Block(f"model.layers.{a.num_layers + i}.", f"mtp.layers.{i}.")
        inner = Block(outer.hf, outer.mcore + "transformer_layer.")
        rules += norm(a, outer, "enorm", "enorm")
        rules += norm(a, outer, "hnorm", "hnorm")
        rules.append(plain(outer, "eh_proj.weight", "eh_proj.weight", prediction_shape(a), COLUMN))
        rules += attention(a, inner)
        rules += moe(a, inner, moe_names) if a.moe is not None else dense_mlp(a, inner)
        rules += norm(a, outer, final_norm, "final_layernorm")
    return rules
