"""The rule engine over random shapes: pieces of all ranks make up every HF tensor exactly once."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mcore_hfbridge.plan import Plan

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family, Piece, Rule, Shard, Stack
from mcore_core.model.tables import dense_decoder

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


@settings(max_examples=60, deadline=None)
@given(architectures())
def test_pieces_partition_every_tensor(drawn):
    a, tp, padding = drawn
    plan = Plan(FAMILY, a)
    seen = {n: np.zeros(p.shape, int) for n, p in plan.hf.items()}
    for weight in plan.weights.values():
        shape = weight.rule.shape
        if weight.rule.pad:
            rows = (-(-shape[0] // tp) + padding) * tp
            shape = (rows, *shape[1:])
        local = weight.rule.shard.local_shape(shape, tp)
        assert weight.misfit(local, tp) == ""
        for rank in range(tp):
            filled = np.zeros(local, int)
            for piece in weight.pieces(local, rank, tp):
                filled[piece.slices] += 1
                counted = rank == 0 or weight.rule.shard.dim is not None
                seen[weight.hf[piece.hf]][piece.hf_slices] += counted
            if weight.rule.pad:
                held = max(0, min(local[0], weight.rule.shape[0] - rank * local[0]))
                assert filled[:held].all()
                assert not filled[held:].any()
                filled = filled[:held]
            assert (filled == 1).all()
    assert all((count == 1).all() for count in seen.values())


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
