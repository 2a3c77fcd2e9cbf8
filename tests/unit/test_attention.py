"""Core attention against masked float64 attention, sequence by sequence."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest

from mcore_core import compat

compat.apply()  # before anything imports megatron

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from mcore_core.model.architecture import Architecture  # noqa: E402
from mcore_core.model.attention import CoreAttention  # noqa: E402
from mcore_core.model.config import DecoderConfig  # noqa: E402
from mcore_core.model.packed import PackedRow, zigzag_index  # noqa: E402
from mcore_core.testing.ranks import fork_ranks  # noqa: E402

HEADS, SIZE = 4, 6


class One:
    """A group of this process alone."""

    def size(self):
        return 1

    def rank(self):
        return 0


def build(groups=2, window=None, softmax="vanilla", cp=None, tp=None, kernel="auto", **config):
    architecture = Architecture(
        num_layers=1,
        hidden_size=HEADS * SIZE,
        ffn_hidden_size=8,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        kv_channels=SIZE,
        vocab_size=8,
        max_position_embeddings=64,
        softmax_type=softmax,
        window_size=window,
        window_layers=(0,),
    )
    config = DecoderConfig(
        num_layers=2,
        hidden_size=HEADS * SIZE,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        kv_channels=SIZE,
        softmax_type=softmax,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        architecture=architecture,
        attention_kernel=kernel,
        **config,
    )
    pgs = SimpleNamespace(tp=tp or One(), cp=cp or One())
    attention = CoreAttention(config, 1, None, "self", pg_collection=pgs)
    if softmax == "learnable":
        with torch.no_grad():
            attention.softmax_offset.copy_(torch.tensor([0.5, -1.0, 2.0, 0.0]))
    return attention


def row_of(cu, cp_rank=0, cp=1):
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(cu)])
    return PackedRow.build(cu, positions[zigzag_index(cu, cp_rank, cp)])


def inputs(cu, groups, seed=0, value_size=SIZE, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = [(HEADS, SIZE), (groups, SIZE), (groups, value_size)]
    tensors = [torch.randn(cu[-1], *shape, generator=g).to(dtype) for shape in shapes]
    return tensors, torch.randn(cu[-1], HEADS * value_size, generator=g)


def naive(q, k, v, cu, *, window=None, sinks=None):
    """Query i of a sequence sees keys max(0, i - window + 1) .. i of it, written as a loop."""
    times = q.shape[1] // k.shape[1]
    rows = []
    for a, b in pairwise(cu):
        for i in range(a, b):
            first = a if window is None else max(a, i - window + 1)
            heads = []
            for h in range(q.shape[1]):
                keys, values = k[first : i + 1, h // times], v[first : i + 1, h // times]
                scores = keys @ q[i, h] / math.sqrt(SIZE)
                if sinks is not None:
                    scores = torch.cat((scores, sinks[h : h + 1]))
                weights = torch.softmax(scores, 0)[: len(keys)]
                heads.append(weights @ values)
            rows.append(torch.cat(heads))
    return torch.stack(rows)


def reference(tensors, grad, cu, window, sinks):
    """Return the output and the gradients of q, k, v and the sinks, float64."""
    leaves = [t.double().requires_grad_() for t in tensors]
    offset = None if sinks is None else sinks.detach().double().requires_grad_()
    out = naive(*leaves, cu, window=window, sinks=offset)
    (out * grad).sum().backward()
    return out.detach(), [t.grad for t in leaves], None if offset is None else offset.grad


CASES = {
    "mha": {"groups": 4},
    "gqa": {"groups": 2},
    "mqa": {"groups": 1},
    "window": {"groups": 2, "window": 3},
    "window-1": {"groups": 2, "window": 1},
    "window-wide": {"groups": 2, "window": 100},
    "learnable": {"groups": 2, "softmax": "learnable"},
    "learnable-window": {"groups": 1, "softmax": "learnable", "window": 4},
    "off-by-one": {"groups": 4, "softmax": "off-by-one"},
    "value-size": {"groups": 2, "value_size": 3},
    "value-larger": {"groups": 4, "value_size": 9, "window": 5},
}
ROWS = [[0, 8], [0, 8, 24], [0, 16, 24, 40]]
"""Multiples of 8, so that CP4 can divide them."""


def split(options):
    options = dict(options)
    value_size = options.pop("value_size", SIZE)
    return options, value_size


def assert_close(a, b, what):
    assert torch.allclose(a.double(), b, rtol=1e-5, atol=2e-6), (
        f"{what}: {float((a.double() - b).abs().max())}"
    )


@pytest.mark.parametrize("cu", [[0, 1], [0, 1, 2, 9], *ROWS])
@pytest.mark.parametrize("name", CASES)
def test_packed_rows(name, cu):
    options, value_size = split(CASES[name])
    attention = build(**options)
    tensors, grad = inputs(cu, options["groups"], value_size=value_size)
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = attention(*leaves, None, row_of(cu))
    (out * grad).sum().backward()
    expected, grads, d_sinks = reference(
        tensors, grad, cu, options.get("window"), attention.softmax_offset
    )
    assert out.shape == (cu[-1], HEADS * value_size)
    assert_close(out, expected, "output")
    for leaf, g, what in zip(leaves, grads, ("q", "k", "v"), strict=True):
        assert_close(leaf.grad, g, what)
    if options.get("softmax") == "learnable":
        assert_close(attention.softmax_offset.grad, d_sinks, "sinks")


@pytest.mark.parametrize("name", CASES)
def test_packing_changes_no_bit(name):
    """A packed row gives exactly what its sequences give each in a row of its own."""
    options, value_size = split(CASES[name])
    attention = build(**options)
    cu = [0, 5, 6, 19, 27]
    tensors, _ = inputs(cu, options["groups"], value_size=value_size)
    packed = attention(*tensors, None, row_of(cu))
    for a, b in pairwise(cu):
        alone = attention(*(t[a:b] for t in tensors), None, row_of([0, b - a]))
        assert torch.equal(packed[a:b], alone)


@pytest.mark.parametrize("cp", [2, 4])
def test_context_parallel(cp):
    """Every case and row; each rank computes its zigzag part, gradients come back to it."""
    references = {}
    for name, options in CASES.items():
        options, value_size = split(options)
        sinks = build(**options).softmax_offset
        for cu in ROWS:
            tensors, grad = inputs(cu, options["groups"], value_size=value_size)
            references[name, len(cu)] = reference(tensors, grad, cu, options.get("window"), sinks)

    def one_rank(rank):
        done = []
        for name, options in CASES.items():
            options, value_size = split(options)
            attention = build(**options, cp=dist.group.WORLD)
            for cu in ROWS:
                attention.zero_grad()
                tensors, grad = inputs(cu, options["groups"], value_size=value_size)
                mine = zigzag_index(cu, rank, cp)
                leaves = [t[mine].clone().requires_grad_() for t in tensors]
                out = attention(*leaves, None, row_of(cu, rank, cp))
                (out * grad[mine]).sum().backward()
                expected, grads, d_sinks = references[name, len(cu)]
                assert_close(out, expected[mine], f"{name} output")
                for leaf, g, what in zip(leaves, grads, ("q", "k", "v"), strict=True):
                    assert_close(leaf.grad, g[mine], f"{name} {what}")
                if options.get("softmax") == "learnable":
                    total = attention.softmax_offset.grad.clone()
                    dist.all_reduce(total)  # as over data-parallel ranks with context parallelism
                    assert_close(total, d_sinks, f"{name} sinks")
                done.append(name)
        return len(done)

    assert fork_ranks(one_rank, cp) == [len(CASES) * len(ROWS)] * cp


def test_rope_turns_queries_and_keys_by_the_row(monkeypatch):
    attention = build(groups=2)
    cu = [0, 4, 9]
    (q, k, v), _ = inputs(cu, 2)
    plain = attention(q, k, v, None, row_of(cu))
    seen = []

    class Rope:
        def apply(self, q, k, row):
            seen.append(row.positions_T.tolist())
            return 2 * q, 3 * k

    attention.rope = Rope()
    turned = attention(q, k, v, None, row_of(cu))
    assert seen == [[0, 1, 2, 3, 0, 1, 2, 3, 4]]
    attention.rope = None
    assert not torch.equal(turned, plain)
    assert torch.equal(turned, attention(2 * q, 3 * k, v, None, row_of(cu)))


def test_scale():
    """The default is 1 / sqrt(head size)."""
    assert build().softmax_scale == 1 / math.sqrt(SIZE)
    config = build().config
    pgs = SimpleNamespace(tp=One(), cp=One())
    given = CoreAttention(config, 1, None, "self", softmax_scale=0.5, pg_collection=pgs)
    assert given.softmax_scale == 0.5


def test_dropout_acts_in_training_only():
    attention = build(groups=2)
    attention.config.sequence_parallel = True  # the default random state serves
    attention.dropout = 0.5
    cu = [0, 8]
    tensors, _ = inputs(cu, 2)
    attention.eval()
    quiet = attention(*tensors, None, row_of(cu))
    attention.train()
    torch.manual_seed(0)
    first = attention(*tensors, None, row_of(cu))
    second = attention(*tensors, None, row_of(cu))
    assert torch.equal(quiet, build(groups=2)(*tensors, None, row_of(cu)))
    assert not torch.equal(first, quiet)
    assert not torch.equal(first, second)


def test_learned_sinks_are_saved_split_over_heads():
    def one_rank(_):
        from megatron.core import parallel_state as ps

        from mcore_core.parallel.state import initialize
        from mcore_core.parallel.topology import Layout
        from mcore_core.platform import install

        initialize(install(), Layout(world=2, tp=2))
        config = build().config
        config.softmax_type = "learnable"
        pgs = SimpleNamespace(tp=ps.get_tensor_model_parallel_group(), cp=One())
        attention = CoreAttention(config, 1, None, "self", pg_collection=pgs)
        state = attention.sharded_state_dict("core_attention.")
        (sinks,) = state.values()
        parallel = attention.softmax_offset.tensor_model_parallel
        return list(state), sinks.key, sinks.global_shape, sinks.global_offset, parallel

    name = "core_attention.softmax_offset"
    assert fork_ranks(one_rank, 2) == [([name], name, (4,), (2 * r,), True) for r in (0, 1)]


def test_fixed_sinks_are_not_saved():
    assert build(softmax="off-by-one").sharded_state_dict("x.") == {}
    assert build().sharded_state_dict("x.") == {}
