"""The rule engine over random shapes: pieces of all ranks make up every HF tensor exactly once."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mcore_hfbridge.plan import Plan

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family, Piece, Rule, Shard, Stack
from mcore_core.model.shapes import LinearAttentionShape, MLAShape, MoEShape
from mcore_core.model.tables import decoder_layers, dense_decoder, embedding, ending
from mcore_core.model.tables_latent import latent_attention
from mcore_core.model.tables_linear import mixed_attention
from mcore_core.model.tables_moe import MoENames, mlp_or_moe
from mcore_core.model.transforms import Rows, Run

FAMILY = Family(name="any", architectures=(), architecture=lambda c: None, rules=dense_decoder)


@st.composite
def architectures(draw):
    tp = draw(st.sampled_from([1, 2, 3, 4]))
    groups = draw(st.integers(1, 4))
    heads = groups * tp * draw(st.integers(1, 3))
    a = Architecture(
        num_layers=draw(st.integers(1, 3)),
        hidden_size=draw(st.integers(1, 9)),
        ffn_hidden_size=tp * draw(st.integers(1, 5)),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=tp * draw(st.integers(1, 4)),
        vocab_size=draw(st.integers(1, 40)),
        max_position_embeddings=8,
        mlp_bias=draw(st.booleans()),
        attention_output_bias=draw(st.booleans()),
        add_qkv_bias=draw(st.booleans()),
        qk_layernorm=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )
    return a, tp, draw(st.integers(0, 7))


def check_partition(plan, sizes, padding=0):
    """Every part is filled once by the pieces of all ranks, which are all of the HF tensors."""
    seen = {n: np.zeros(p.shape, int) for n, p in plan.hf.items()}
    for weight in plan.weights.values():
        shard, shape = weight.rule.shard, weight.rule.shape
        size = sizes[shard.group]
        if weight.rule.pad:
            rows = (-(-shape[0] // size) + padding) * size
            shape = (rows, *shape[1:])
        local = shard.local_shape(shape, size)
        assert weight.misfit(local, size) == ""
        for rank in range(size):
            filled = np.zeros(local, int)
            for piece in weight.pieces(local, rank, size):
                filled[piece.slices] += 1
                counted = rank == 0 or shard.dim is not None
                seen[weight.hf[piece.hf]][piece.hf_slices] += counted
            if weight.rule.pad:
                held = max(0, min(local[0], weight.rule.shape[0] - rank * local[0]))
                assert filled[:held].all()
                assert not filled[held:].any()
                filled = filled[:held]
            assert (filled == 1).all()
    assert all((count == 1).all() for count in seen.values())


@settings(max_examples=60, deadline=None)
@given(architectures())
def test_pieces_partition_every_tensor(drawn):
    a, tp, padding = drawn
    check_partition(Plan(FAMILY, a), {"tp": tp}, padding)


@st.composite
def mixed(draw):
    """An architecture with experts, and latent or gated attention and delta nets; groups' sizes."""
    tp, etp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 3]))
    groups = draw(st.integers(1, 3)) * tp
    heads = groups * draw(st.integers(1, 2))
    layers = draw(st.integers(1, 3))
    chosen = tuple(i for i in range(layers) if draw(st.booleans()))
    few = st.integers(1, 4)
    latent = draw(st.booleans())
    key_heads = tp * draw(st.integers(1, 2))
    moe = MoEShape(
        num_experts=draw(few),
        topk=1,
        ffn_hidden_size=etp * draw(few),
        layers=tuple(i for i in range(layers) if draw(st.booleans())),
        shared_ffn_hidden_size=draw(st.sampled_from([None, 4])),
        shared_gate=draw(st.booleans()),
        expert_bias=draw(st.booleans()),
        router_bias=draw(st.booleans()),
    )
    delta = LinearAttentionShape(
        layers=chosen,
        key_head_dim=draw(few),
        value_head_dim=draw(few),
        num_key_heads=key_heads,
        num_value_heads=key_heads * draw(st.integers(1, 3)),
        conv_kernel=2,
    )
    mla = MLAShape(
        q_lora_rank=draw(st.sampled_from([None, 3])),
        kv_lora_rank=draw(few),
        qk_nope_head_dim=draw(few),
        qk_rope_head_dim=draw(few),
        v_head_dim=draw(few),
    )
    a = Architecture(
        num_layers=layers,
        hidden_size=draw(few),
        ffn_hidden_size=tp * draw(few),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=draw(few),
        vocab_size=draw(st.integers(1, 20)),
        max_position_embeddings=8,
        attention_output_gate=draw(st.booleans()),
        qk_layernorm=draw(st.booleans()),
        qk_norm_width=draw(st.sampled_from(["head", "full"])),
        normalization=draw(st.sampled_from(["RMSNorm", "LayerNorm"])),
        softmax_type=draw(st.sampled_from(["vanilla", "learnable"])),
        post_attention_norm=draw(st.booleans()),
        post_mlp_norm=draw(st.booleans()),
        moe=moe,
        mla=mla if latent else None,
        linear_attention=None if latent else delta,
        mtp_layers=draw(st.integers(0, 2)),
    )
    layout = draw(st.sampled_from(["separate", "stacked", "interleaved"]))
    fused = draw(st.booleans())

    def rules(a):
        names = MoENames(layout=layout)
        block = decoder_layers(a)
        first = latent_attention(a, block) if latent else mixed_attention(a, fused=fused)
        return [*embedding(a), *first, *mlp_or_moe(a, names), *ending(a)]

    return a, rules, {"tp": tp, "etp": etp}


@settings(max_examples=80, deadline=None)
@given(mixed())
def test_pieces_partition_every_tensor_of_mixed_decoders(drawn):
    a, rules, sizes = drawn
    check_partition(Plan(replace(FAMILY, rules=rules), a), sizes)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.integers(0, 4), st.integers(1, 9), st.integers(0, 12), st.integers(0, 12)
)
def test_a_cut_of_rows_at_distances_is_what_lies_there(step, start, count, low, high):
    hf = np.arange(40)
    piece = Rows(runs=(Run(0, start, count, step),)).pieces(((40,),), {})[0].shift(0, 2)
    whole = np.full(2 + count, -1)
    whole[piece.slices] = hf[piece.hf_slices]
    cut = piece.cut(0, low, high)
    expected = whole[max(low, 2) : max(high, 0)]
    found = np.array([], int) if cut is None else hf[cut.hf_slices]
    assert found.tolist() == expected.tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 2, 4]))
def test_values_lie_as_megatron_reads_them(groups, queries, head, tp):
    """linear_qkv, seen as [groups, (q + k + v) heads, head size], splits into HF's q, k and v."""
    if groups * (queries + 2) * head % tp:
        return
    rng = np.random.default_rng(0)
    sizes = [groups * queries * head, groups * head, groups * head]
    hf = [rng.normal(size=(n, 5)) for n in sizes]
    rule = Rule(
        hf=("q", "k", "v"),
        shapes=tuple(x.shape for x in hf),
        mcore="qkv",
        transform=Stack(groups=groups),
        shard=Shard(dim=0),
    )
    parts = []
    for rank in range(tp):
        local = np.full(rule.shard.local_shape(rule.shape, tp), np.nan)
        for piece in rule.local_pieces({}, None, rank, tp):
            local[piece.slices] = hf[piece.hf][piece.hf_slices]
        parts.append(local)
    mixed = np.concatenate(parts).reshape(groups, queries + 2, head, 5)
    split = mixed[:, :queries], mixed[:, queries], mixed[:, queries + 1]
    for x, expected in zip(split, hf, strict=True):
        assert (x.reshape(-1, 5) == expected).all()


def test_a_transposed_expert_of_a_stacked_tensor_needs_no_new_engine():
    """An HF tensor [experts, in, out] against one expert's weight [out, in], cut along out."""
    whole = np.arange(3 * 4 * 6).reshape(3, 4, 6)
    piece = Piece(hf=0, at=(2, 0, 0), to=(0, 0), size=(6, 4), axes=(2, 1))
    (part,) = Shard(dim=0).local([piece], (6, 4), 1, 2)
    assert part == replace(piece, at=(2, 0, 3), size=(3, 4))
    spans = tuple((s.start, s.stop) for s in part.hf_slices)
    assert (spans, part.fixed) == (((2, 3), (0, 4), (3, 6)), (0,))
    box = whole[part.hf_slices].transpose(*part.axes, *part.fixed)[..., 0]
    assert (box == whole[2].T[3:]).all()


def test_a_table_that_loses_elements_is_refused():
    class Half(Stack):
        def pieces(self, shapes, index):
            return super().pieces(shapes, index)[:1]

    rule = Rule(hf=("a", "b"), shapes=((2, 3), (4, 3)), mcore="w", transform=Half())
    family = replace(FAMILY, rules=lambda a: [rule])
    with pytest.raises(ValueError, match="the rules of 'b' move 0 of its 12 elements"):
        Plan(family, None)
    twice = replace(FAMILY, rules=lambda a: [replace(rule, transform=Stack())] * 2)
    with pytest.raises(ValueError, match="two rules for 'w'"):
        Plan(twice, None)
