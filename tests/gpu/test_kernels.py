"""CUDA kernels against float32 on the same device: attention, sinks, grouped experts, the head."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = (5, 300, 129, 1, 64)


class One:
    """A group of this process alone."""

    def size(self):
        return 1

    def rank(self):
        return 0


def attention(heads, groups, size, *, window=None, softmax="vanilla", kernel="auto"):
    from types import SimpleNamespace

    from mcore_core import compat

    compat.apply()
    from mcore_core.model.architecture import Architecture
    from mcore_core.model.attention import CoreAttention
    from mcore_core.model.config import DecoderConfig

    shape = dict(
        num_attention_heads=heads, num_query_groups=groups, kv_channels=size, softmax_type=softmax
    )
    architecture = Architecture(
        num_layers=1, hidden_size=heads * size, ffn_hidden_size=8, vocab_size=8,
        max_position_embeddings=512, window_size=window, window_layers=(0,), **shape,
    )  # fmt: skip
    config = DecoderConfig(
        num_layers=2, hidden_size=heads * size, attention_dropout=0.0, params_dtype=torch.bfloat16,
        bf16=True, architecture=architecture, attention_kernel=kernel, perform_initialization=False,
        **shape,
    )  # fmt: skip
    layer = CoreAttention(
        config, 1, None, "self", pg_collection=SimpleNamespace(tp=One(), cp=One())
    )
    layer.rope = None
    return layer


def relative(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("softmax", ["vanilla", "learnable", "off-by-one"])
@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 4, 64), (8, 2, 128), (4, 2, 12)])
def test_fused_attention(heads, groups, size, window, softmax):
    from itertools import accumulate

    fused = attention(heads, groups, size, window=window, softmax=softmax)
    plain = attention(heads, groups, size, window=window, softmax=softmax, kernel="unfused")
    from mcore_core.model.packed import PackedRow

    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    cu = [0, *accumulate(LENGTHS)]
    inputs = [torch.randn(tokens, n, size, device="cuda") for n in (heads, groups, groups)]
    sinks = torch.randn(heads, device="cuda")
    weight = torch.randn(tokens, heads * size, device="cuda")
    found = {}
    for layer, dtype in ((fused, torch.bfloat16), (plain, torch.float32)):
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in inputs]
        if softmax == "learnable":
            layer.softmax_offset = torch.nn.Parameter(sinks.bfloat16().to(dtype))
        row = PackedRow.build(cu, torch.zeros(tokens, dtype=torch.long, device="cuda"))
        assert layer._use_varlen(leaves[0]) == (dtype is torch.bfloat16)
        out = layer(*leaves, packed_seq_params=row)
        (out * weight.to(dtype)).sum().backward()
        grads = [x.grad for x in leaves]
        if softmax == "learnable":
            grads.append(layer.softmax_offset.grad)
        found[dtype] = [out, *grads]
    for ours, reference in zip(found[torch.bfloat16], found[torch.float32], strict=True):
        assert relative(ours, reference) < 1e-2


@pytest.mark.parametrize("width", [96, 20])
def test_grouped_experts(width):
    from mcore_core import compat

    compat.apply()
    from mcore_core.model.moe.experts import grouped_product

    torch.manual_seed(0)
    counts = [16, 0, 48, 8]
    x = torch.randn(sum(counts), 64, device="cuda")
    w = torch.randn(4, width, 64, device="cuda")
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (t.bfloat16().to(dtype).requires_grad_() for t in (x, w))
        out = grouped_product(a, b, counts)
        out.square().sum().backward()
        results.append((out, a.grad, b.grad))
    for ours, reference in zip(*results, strict=True):
        assert relative(ours, reference) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_head(dtype):
    from mcore_core import compat

    compat.apply()
    from mcore_core.model.head import VocabRange, local_loss, log_probabilities
    from mcore_core.protocols import HeadSpec, LossOutput

    torch.manual_seed(0)
    tokens, vocabulary, width = 700, 50_001, 96
    hidden = torch.randn(tokens, width, device="cuda").to(dtype)
    weight = (0.1 * torch.randn(vocabulary, width, device="cuda")).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,), device="cuda")
    spec, vocab = HeadSpec(entropy=True, temperature=0.7), VocabRange(start=0, rows=vocabulary)
    h, w = (t.double().requires_grad_() for t in (hidden, weight))
    logps = torch.log_softmax(h @ w.t() / 0.7, -1)
    entropy = -(logps.exp() * logps).sum(-1)
    picked = logps.gather(-1, targets[:, None]).squeeze(-1)
    (-picked).sum().backward()
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-4
    a, b = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = log_probabilities(a, b, targets, vocab=vocab, spec=spec)
    (-out.logps_T).sum().backward()
    assert relative(out.logps_T, picked) < tolerance
    assert relative(out.entropy_T, entropy) < tolerance
    assert relative(a.grad, h.grad) < tolerance
    assert relative(b.grad, w.grad) < tolerance
    c, d = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

    def loss(out, where):
        ones = torch.ones_like(out.logps_T)
        return LossOutput(-out.logps_T.sum(), ones.sum())

    total = local_loss(c, d, targets, loss, vocab=vocab, spec=spec)
    total.total.backward()
    assert float(total.total) == pytest.approx(float(-picked.sum()), rel=tolerance)
    assert relative(c.grad, h.grad) < tolerance
    assert relative(d.grad, w.grad) < tolerance
