"""Rules that most decoders share: HF's llama names, which families reuse whole or in part."""

from collections.abc import Sequence

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Rule, Shape, Shard, Stack

COLUMN = Shard(dim=0)
"""Rows split over tensor-parallel ranks: the weight or bias of a column-parallel layer."""
ROW = Shard(dim=1)
"""Columns split: the weight of a row-parallel layer."""
GATED = Shard(dim=0, blocks=2)
"""Gate and up, each split: a rank holds its gate rows, then its up rows."""


def dense_decoder(a: Architecture) -> Sequence[Rule]:
    """Return the table of a llama-like decoder with a dense, gated MLP."""
    return [*embedding(a), *attention(a), *gated_mlp(a), *ending(a)]


def embedding(a: Architecture) -> list[Rule]:
    """Return the token embedding; in a tied model it is the output layer too."""
    return [
        Rule(
            hf=("model.embed_tokens.weight",),
            shapes=((a.vocab_size, a.hidden_size),),
            mcore="embedding.word_embeddings.weight",
            shard=COLUMN,
            pad=True,
            hf_copies=("lm_head.weight",) if a.tie_word_embeddings else (),
        )
    ]


def attention(a: Architecture) -> list[Rule]:
    """Return the input norm and the attention of each layer, with the biases `a` says."""
    heads, groups = a.num_attention_heads * a.kv_channels, a.num_query_groups * a.kv_channels
    hf = "model.layers.{l}.self_attn."
    mcore = "decoder.layers.{l}.self_attention."

    def qkv(suffix: str, tail: Shape) -> Rule:
        return Rule(
            hf=tuple(f"{hf}{x}_proj.{suffix}" for x in "qkv"),
            shapes=((heads, *tail), (groups, *tail), (groups, *tail)),
            mcore=f"{mcore}linear_qkv.{suffix}",
            transform=Stack(groups=a.num_query_groups),
            shard=COLUMN,
            over=layers(a),
        )

    rules = [
        norm(a, "model.layers.{l}.input_layernorm", "decoder.layers.{l}.input_layernorm"),
        qkv("weight", (a.hidden_size,)),
    ]
    if a.add_qkv_bias:
        rules.append(qkv("bias", ()))
    if a.qk_layernorm:
        for x in "qk":
            size = a.kv_channels
            rules.append(norm(a, f"{hf}{x}_norm", f"{mcore}{x}_layernorm", size=size))
    return rules + linear(
        a,
        hf + "o_proj",
        mcore + "linear_proj",
        (a.hidden_size, heads),
        shard=ROW,
        bias=a.attention_output_bias,
    )


def gated_mlp(a: Architecture) -> list[Rule]:
    """Return the norm before the MLP of each layer, and the MLP."""
    hf, mcore = "model.layers.{l}.mlp.", "decoder.layers.{l}.mlp."

    def fc1(suffix: str, tail: Shape) -> Rule:
        return Rule(
            hf=(f"{hf}gate_proj.{suffix}", f"{hf}up_proj.{suffix}"),
            shapes=((a.ffn_hidden_size, *tail),) * 2,
            mcore=f"{mcore}linear_fc1.{suffix}",
            shard=GATED,
            over=layers(a),
        )

    rules = [
        norm(
            a, "model.layers.{l}.post_attention_layernorm", "decoder.layers.{l}.pre_mlp_layernorm"
        ),
        fc1("weight", (a.hidden_size,)),
    ]
    if a.mlp_bias:
        rules.append(fc1("bias", ()))
    return rules + linear(
        a,
        hf + "down_proj",
        mcore + "linear_fc2",
        (a.hidden_size, a.ffn_hidden_size),
        shard=ROW,
        bias=a.mlp_bias,
    )


def ending(a: Architecture) -> list[Rule]:
    """Return the final norm and, unless tied, the output layer."""
    rules = [norm(a, "model.norm", "decoder.final_norm")]
    if not a.tie_word_embeddings:
        rules.append(
            Rule(
                hf=("lm_head.weight",),
                shapes=((a.vocab_size, a.hidden_size),),
                mcore="output_layer.weight",
                shard=COLUMN,
                pad=True,
            )
        )
    return rules


def norm(a: Architecture, hf: str, mcore: str, *, size: int | None = None) -> Rule:
    """Return the rule of an RMS norm, of the hidden size unless told."""
    return Rule(
        hf=(f"{hf}.weight",),
        shapes=((size or a.hidden_size,),),
        mcore=f"{mcore}.weight",
        over=layers(a) if "{l}" in hf else {},
    )


def linear(
    a: Architecture, hf: str, mcore: str, shape: Shape, *, shard: Shard, bias: bool
) -> list[Rule]:
    """Return the rules of a linear layer's weight and, where it has one, its bias."""
    rules = [
        Rule(
            hf=(f"{hf}.weight",),
            shapes=(shape,),
            mcore=f"{mcore}.weight",
            shard=shard,
            over=layers(a),
        )
    ]
    if bias:
        rules.append(
            Rule(
                hf=(f"{hf}.bias",),
                shapes=(shape[:1],),
                mcore=f"{mcore}.bias",
                # Each rank adds the whole bias of a row-parallel layer, after the reduction.
                shard=COLUMN if shard.dim == 0 else Shard(),
                over=layers(a),
            )
        )
    return rules


def layers(a: Architecture) -> dict[str, range]:
    """Return the values of the wildcard {l}: every HF layer."""
    return {"l": range(a.num_layers)}
