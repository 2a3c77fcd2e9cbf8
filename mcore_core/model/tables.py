"""Rules that most decoders share: HF's llama names, which families reuse whole or in part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Rule, Shape, Shard, Stack, Transform
from mcore_core.model.transforms import Rows, Run, spread

COLUMN = Shard(dim=0)
"""Rows split over tensor-parallel ranks: the weight or bias of a column-parallel layer."""
ROW = Shard(dim=1)
"""Columns split: the weight of a row-parallel layer."""
GATED = Shard(dim=0, blocks=2)
"""Gate and up, each split: a rank holds its gate rows, then its up rows."""
WHOLE = Shard()
"""Every rank holds all of it."""


@dataclass(frozen=True, slots=True)
class Block:
    """Where one layer's, or every layer's, tensors are on both sides."""

    hf: str
    """Prefix of the HF names, with a dot at the end."""
    mcore: str
    over: Mapping[str, Sequence[int]] = field(default_factory=dict)


def decoder_layers(a: Architecture, which: Sequence[int] | None = None) -> Block:
    """Return all layers of the decoder, or some."""
    chosen = range(a.num_layers) if which is None else which
    return Block("model.layers.{l}.", "decoder.layers.{l}.", {"l": tuple(chosen)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What families call the norms of a layer and the linear layers of its MLP."""

    input_norm: str = "input_layernorm"
    pre_mlp_norm: str = "post_attention_layernorm"
    post_attention_norm: str = "post_self_attn_layernorm"
    post_mlp_norm: str = "post_mlp_layernorm"
    q_norm: str = "q_norm"
    k_norm: str = "k_norm"
    qkv: str = ""
    """Where q, k and v lie one after another in one tensor: its name."""
    gate_up: str = ""
    """Where gate and up lie one after another in one tensor: its name."""
    up: str = "up_proj"
    down: str = "down_proj"


LLAMA = Names()


def dense_decoder(a: Architecture, names: Names = LLAMA) -> list[Rule]:
    """Return the table of a llama-like decoder with a dense MLP in every layer."""
    block = decoder_layers(a)
    return [*embedding(a), *attention(a, block, names), *dense_mlp(a, block, names), *ending(a)]


def embedding(a: Architecture, twins: tuple[str, ...] = ()) -> list[Rule]:
    """Return the token embedding; in a tied model it is the output layer too."""
    return [
        Rule(
            hf=("model.embed_tokens.weight",),
            shapes=((a.vocab_size, a.hidden_size),),
            mcore="embedding.word_embeddings.weight",
            shard=COLUMN,
            pad=True,
            hf_copies=("lm_head.weight",) if a.tie_word_embeddings else (),
            hf_twins=twins,
        )
    ]


def attention(a: Architecture, at: Block, names: Names = LLAMA) -> list[Rule]:
    """Return the input norm and the attention of each layer, with the biases `a` says."""
    heads = a.num_attention_heads * a.kv_channels
    rules = norm(a, at, names.input_norm, "input_layernorm")
    rules += qkv(a, at, names)
    if a.qk_layernorm:
        full, groups = a.qk_norm_width == "full", a.num_query_groups * a.kv_channels
        for x, hf, width in (("q", names.q_norm, heads), ("k", names.k_norm, groups)):
            rules += norm(
                a,
                at,
                f"self_attn.{hf}",
                f"self_attention.{x}_layernorm",
                size=width if full else a.kv_channels,
                shard=COLUMN if full else WHOLE,
            )
    if a.softmax_type == "learnable":
        rules.append(
            plain(
                at, "self_attn.sinks", "self_attention.core_attention.softmax_offset",
                (a.num_attention_heads,), COLUMN,
            )
        )  # fmt: skip
    rules += linear(
        at,
        "self_attn.o_proj",
        "self_attention.linear_proj",
        (a.hidden_size, heads),
        ROW,
        bias=a.attention_output_bias,
    )
    if a.post_attention_norm:
        rules += norm(a, at, names.post_attention_norm, "post_attention_norm")
    return rules


def qkv(a: Architecture, at: Block, names: Names = LLAMA) -> list[Rule]:
    """Return q, k and v, by query group; with an output gate q's heads and gates take turns."""
    size, groups = a.kv_channels, a.num_query_groups
    q_rows = a.num_attention_heads * size * (2 if a.attention_output_gate else 1)
    kv_rows = groups * size
    transform: Transform
    if names.qkv:
        hf: tuple[str, ...] = (names.qkv,)
        rows: tuple[int, ...] = (q_rows + 2 * kv_rows,)
        per_group = q_rows // groups
        parts = zip(
            spread(0, 0, per_group, per_group, groups),
            spread(0, q_rows, size, size, groups),
            spread(0, q_rows + kv_rows, size, size, groups),
            strict=True,
        )
        transform = Rows(runs=tuple(run for part in parts for run in part))
    else:
        hf = tuple(f"self_attn.{x}_proj" for x in "qkv")
        rows = (q_rows, kv_rows, kv_rows)
        transform = Rows(runs=_gated(a)) if a.attention_output_gate else Stack(groups=groups)
    return [
        Rule(
            hf=tuple(f"{at.hf}{name}.{suffix}" for name in hf),
            shapes=tuple((n, *tail) for n in rows),
            mcore=f"{at.mcore}self_attention.linear_qkv.{suffix}",
            transform=transform,
            shard=COLUMN,
            over=at.over,
        )
        for suffix, tail in (("weight", (a.hidden_size,)), ("bias", ()))
        if suffix == "weight" or a.add_qkv_bias
    ]


def _gated(a: Architecture) -> tuple[Run, ...]:
    """HF: each q head and its gate; megatron: a group's q heads, its gates, k, v."""
    size, heads = a.kv_channels, a.num_attention_heads
    q, gate = (spread(0, start, size, 2 * size, heads) for start in (0, size))
    k, v = (spread(x, 0, size, size, a.num_query_groups) for x in (1, 2))
    each = heads // a.num_query_groups
    out: list[Run] = []
    for g in range(a.num_query_groups):
        own = slice(g * each, (g + 1) * each)
        out += [*q[own], *gate[own], k[g], v[g]]
    return tuple(out)


def dense_mlp(a: Architecture, at: Block, names: Names = LLAMA) -> list[Rule]:
    """Return the norm before the MLP of each layer, the MLP, and the norm after it."""
    rules = norm(a, at, names.pre_mlp_norm, "pre_mlp_layernorm")
    rules += mlp(a, at, "mlp.", "mlp.", a.ffn_hidden_size, names, bias=a.mlp_bias)
    return rules + post_mlp_norm(a, at, names)


def post_mlp_norm(a: Architecture, at: Block, names: Names = LLAMA) -> list[Rule]:
    """Return the norm on the MLP's output, where there is one."""
    return norm(a, at, names.post_mlp_norm, "post_mlp_norm") if a.post_mlp_norm else []


def mlp(
    a: Architecture,
    at: Block,
    hf: str,
    mcore: str,
    width: int,
    names: Names = LLAMA,
    *,
    bias: bool = False,
) -> list[Rule]:
    """Return an MLP's two linear layers; prefixes are relative to the layer."""
    gated = a.gated
    parts = (names.gate_up,) if names.gate_up else ("gate_proj", names.up) if gated else (names.up,)
    rows = width * (2 if gated else 1) // len(parts)
    rules = [
        Rule(
            hf=tuple(f"{at.hf}{hf}{name}.{suffix}" for name in parts),
            shapes=((rows, *tail),) * len(parts),
            mcore=f"{at.mcore}{mcore}linear_fc1.{suffix}",
            shard=GATED if gated else COLUMN,
            over=at.over,
        )
        for suffix, tail in (("weight", (a.hidden_size,)), ("bias", ()))
        if suffix == "weight" or bias
    ]
    shape = (a.hidden_size, width)
    return rules + linear(at, hf + names.down, mcore + "linear_fc2", shape, ROW, bias=bias)


def ending(a: Architecture, twins: tuple[str, ...] = (), *, norm_name: str = "norm") -> list[Rule]:
    """Return the final norm and what follows it: unless tied, the output layer; the score head."""
    rules = norm(a, Block("model.", "decoder."), norm_name, "final_norm")
    if a.head == "scores":
        shape = (a.scores, a.hidden_size)
        name = "score.weight"
        rules.append(Rule(hf=(name,), shapes=(shape,), mcore=name, optional=True))
    elif a.head == "lm" and not a.tie_word_embeddings:
        rules.append(
            Rule(
                hf=("lm_head.weight",),
                shapes=((a.vocab_size, a.hidden_size),),
                mcore="output_layer.weight",
                shard=COLUMN,
                pad=True,
                hf_twins=twins,
            )
        )
    return rules


def prediction_shape(a: Architecture) -> Shape:
    """Return the shape of what joins an embedding and a hidden state for a prediction layer."""
    return (a.hidden_size, 2 * a.hidden_size)


def norm(
    a: Architecture,
    at: Block,
    hf: str,
    mcore: str,
    *,
    size: int | None = None,
    shard: Shard = WHOLE,
) -> list[Rule]:
    """Return the rules of a norm, of the hidden size unless told; a LayerNorm has a bias."""
    shape = (size or a.hidden_size,)
    kinds = ("weight", "bias") if a.normalization == "LayerNorm" else ("weight",)
    return [plain(at, f"{hf}.{kind}", f"{mcore}.{kind}", shape, shard) for kind in kinds]


def linear(
    at: Block, hf: str, mcore: str, shape: Shape, shard: Shard, *, bias: bool = False
) -> list[Rule]:
    """Return the rules of a linear layer's weight and, where it has one, its bias."""
    rules = [plain(at, f"{hf}.weight", f"{mcore}.weight", shape, shard)]
    if bias:
        # Each rank adds the whole bias of a row-parallel layer, after the reduction.
        part = shard if shard.dim == 0 else WHOLE
        rules.append(plain(at, f"{hf}.bias", f"{mcore}.bias", shape[:1], part))
    return rules


def plain(at: Block, hf: str, mcore: str, shape: Shape, shard: Shard = WHOLE) -> Rule:
    """Return the rule of a tensor that is the same on both sides."""
    return Rule(
        hf=(at.hf + hf,), shapes=(shape,), mcore=at.mcore + mcore, shard=shard, over=at.over
    )


def layers(a: Architecture) -> dict[str, range]:
    """Return the values of the wildcard {l}: every HF layer."""
    return {"l": range(a.num_layers)}
