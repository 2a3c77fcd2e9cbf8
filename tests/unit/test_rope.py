"""Rotary tables against transformers' own, for the types that models here use."""

import dataclasses
from types import SimpleNamespace

import pytest

from mcore_core import compat

compat.apply()  # before anything imports megatron

import torch  # noqa: E402
from transformers import LlamaConfig  # noqa: E402
from transformers.models.llama.modeling_llama import (  # noqa: E402
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from mcore_core.errors import UsageError  # noqa: E402
from mcore_core.model.architecture import Architecture  # noqa: E402
from mcore_core.model.packed import PackedRow  # noqa: E402
from mcore_core.model.rope import Rope, rope_frequencies, rotate  # noqa: E402

HEADS, SIZE = 4, 16
SHAPE = Architecture(
    num_layers=1,
    hidden_size=HEADS * SIZE,
    ffn_hidden_size=8,
    num_attention_heads=HEADS,
    num_query_groups=2,
    kv_channels=SIZE,
    vocab_size=8,
    max_position_embeddings=64,
    rotary_base=5000.0,
)
SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "old-spelling": {"type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-attention": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 0.7,
        "beta_fast": 16,
    },
}


def row(*lengths):
    cu = [0]
    for n in lengths:
        cu.append(cu[-1] + n)
    return PackedRow.build(cu, torch.cat([torch.arange(n) for n in lengths]))


def theirs(scaling, size=SIZE, base=5000.0):
    scaling = dict(scaling or {})
    scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type", "default"))
    config = LlamaConfig(
        hidden_size=HEADS * size,
        num_attention_heads=HEADS,
        head_dim=size,
        max_position_embeddings=64,
        rope_parameters={"rope_theta": base, **scaling},
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("name", SCALINGS)
def test_equals_transformers_in_a_packed_row(name):
    """Positions start again at 0 in each sequence."""
    architecture = dataclasses.replace(SHAPE, rope_scaling=SCALINGS[name])
    rope = Rope(architecture, max_length=None)
    lengths = (40, 1, 7)
    packed = row(*lengths)
    q, k = torch.randn(48, HEADS, SIZE), torch.randn(48, 2, SIZE)
    got_q, got_k = rope.apply(q, k, packed)
    embedding = theirs(SCALINGS[name])
    start = 0
    for n in lengths:
        part = slice(start, start + n)
        cos, sin = embedding(q, torch.arange(n)[None])
        want_q, want_k = apply_rotary_pos_emb(
            q[part].transpose(0, 1)[None], k[part].transpose(0, 1)[None], cos, sin
        )
        assert torch.allclose(got_q[part], want_q[0].transpose(0, 1), atol=1e-6)
        assert torch.allclose(got_k[part], want_k[0].transpose(0, 1), atol=1e-6)
        start += n


def test_the_types_differ():
    tables = {
        name: Rope(dataclasses.replace(SHAPE, rope_scaling=scaling), max_length=None).tables(
            row(30), torch.float32
        )[0]
        for name, scaling in SCALINGS.items()
    }
    names = list(tables)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not torch.allclose(tables[a], tables[b]), (a, b)


def test_partial_rotary_leaves_the_other_channels():
    half = dataclasses.replace(SHAPE, rotary_percent=0.5)
    rope = Rope(half, max_length=None)
    q, k = torch.randn(9, HEADS, SIZE), torch.randn(9, 2, SIZE)
    got, _ = rope.apply(q, k, row(9))
    assert torch.equal(got[..., 8:], q[..., 8:])
    cos, sin = theirs(None, size=8)(q, torch.arange(9)[None])
    want, _ = apply_rotary_pos_emb(
        q[..., :8].transpose(0, 1)[None], k[..., :8].transpose(0, 1)[None], cos, sin
    )
    assert torch.allclose(got[..., :8], want[0].transpose(0, 1), atol=1e-6)


def test_dynamic_is_fixed_by_max_length():
    """In a packed row the length would be another one for each row."""
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    architecture = dataclasses.replace(SHAPE, rope_scaling=scaling)
    short, _ = rope_frequencies(architecture, 64)
    plain, _ = rope_frequencies(SHAPE, None)
    long, _ = rope_frequencies(architecture, 256)
    assert torch.allclose(short, plain)
    base = 5000.0 * ((2.0 * 256 / 64) - 1) ** (SIZE / (SIZE - 2))
    want = base ** (-torch.arange(0, SIZE, 2) / SIZE)
    assert torch.allclose(long, want, rtol=1e-5)


def test_unknown_type():
    architecture = dataclasses.replace(SHAPE, rope_scaling={"rope_type": "spiral"})
    with pytest.raises(UsageError) as caught:
        rope_frequencies(architecture, None)
    first, second = str(caught.value).splitlines()
    assert first == "error[MC502]: unknown rope type 'spiral' in rope_scaling"
    assert second.startswith("  known: default, ")
    assert "llama3" in second and "yarn" in second


def test_rotation_keeps_lengths_and_relative_angles():
    rope = Rope(SHAPE, max_length=None)
    q = torch.randn(1, 1, SIZE).expand(20, 1, SIZE)
    k = torch.randn(1, 1, SIZE).expand(20, 1, SIZE)
    a, b = rope.apply(q, k, row(20))
    assert torch.allclose(a.norm(dim=-1), q.norm(dim=-1), atol=1e-5)
    scores = a[:, 0] @ b[:, 0].t()
    for distance in (0, 1, 5):
        diagonal = scores.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4)


def test_tables_are_made_once_a_row_in_the_wanted_type():
    rope, packed = Rope(SHAPE, max_length=None), row(4)
    first = rope.tables(packed, torch.bfloat16)
    assert first[0].dtype is torch.bfloat16
    assert rope.tables(packed, torch.bfloat16) is first
    assert rope.tables(row(4), torch.bfloat16) is not first


def test_positions_up_to_bfloat16_range_are_exact():
    """Angles are computed in float32 whatever the model's type."""
    rope = Rope(SHAPE, max_length=None)
    far = PackedRow.build([0, 2], torch.tensor([1000, 1001]))
    cos, _ = rope.tables(far, torch.float32)
    want = torch.cos(torch.tensor([1000.0, 1001.0], dtype=torch.float64))
    assert torch.allclose(cos[:, 0].double(), want, atol=1e-6)


def test_rotate_by_hand():
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 9.0]]])
    cos, sin = torch.zeros(1, 4), torch.ones(1, 4)
    assert rotate(x, cos, sin).tolist() == [[[-3.0, -4.0, 1.0, 2.0, 9.0]]]


@pytest.mark.parametrize(
    ("given", "more", "limit", "wanted"),
    [
        (16, 0, 64, 16),
        (16, 32, 64, 48),  # prompts, and what follows them
        (16, 99, 64, 64),  # not beyond what the model was made for
        (80, 9, 64, 80),  # but where the user says so
        (None, 9, None, None),
        (16, 9, None, 25),
    ],
)
def test_generated_tokens_count_in_the_length_that_frequencies_are_for(given, more, limit, wanted):
    from mcore_core.train.build import longest

    assert longest(given, SimpleNamespace(generated_length=more), limit) == wanted
    assert longest(given, SimpleNamespace(), limit) == given
