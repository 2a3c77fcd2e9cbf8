"""The fused attention with sinks against plain autograd, the kernel played by its formulas."""

import pytest
import torch

from mcore_core import compat

compat.apply()

from mcore_core.model import sinks  # noqa: E402
from mcore_core.model.packed import segments_of, varlen_plan  # noqa: E402

CU = [0, 5, 6, 13]
HEADS, SIZE, SCALE = 3, 4, 0.7


def scores(q, k, window):
    i = torch.arange(len(q))
    sequence = torch.bucketize(i, torch.tensor(CU[1:]), right=True)
    seen = (i[:, None] >= i) & (sequence[:, None] == sequence)
    if window >= 0:
        seen &= i >= i[:, None] - window
    s = torch.einsum("qhd,khd->hqk", q, k) * SCALE
    return s.masked_fill(~seen, float("-inf"))


def kernel(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, window):
    s = scores(q, k, window[0])
    return torch.einsum("hqk,khd->qhd", s.softmax(-1), v), s.logsumexp(-1).float(), None


def kernel_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, rng, scale, window):
    """Flash attention's backward pass: it trusts the output and the log-sum-exp it is given."""
    p = (scores(q, k, window[0]) - lse.unsqueeze(-1).double()).exp()
    d_v = torch.einsum("hqk,qhd->khd", p, grad)
    d_p = torch.einsum("qhd,khd->hqk", grad, v)
    d_s = p * (d_p - (grad * out).sum(-1).t().unsqueeze(-1)) * SCALE
    return torch.einsum("hqk,khd->qhd", d_s, k), torch.einsum("hqk,qhd->khd", d_s, q), d_v


@pytest.mark.parametrize("window", [None, 3])
def test_value_and_gradients(monkeypatch, window):
    monkeypatch.setattr(sinks, "_varlen_attn", kernel)
    monkeypatch.setattr(sinks, "_varlen_attn_backward", kernel_backward)
    generator = torch.Generator().manual_seed(0)
    shapes = [(CU[-1], HEADS, SIZE)] * 3 + [(HEADS,)]
    inputs = [torch.randn(s, generator=generator).double().requires_grad_() for s in shapes]
    q, k, v, sink = inputs
    plan = varlen_plan(segments_of(CU), q.device)
    out = sinks.sink_attention(q, k, v, sink, plan, scale=SCALE, window=window)

    s = scores(q, k, -1 if window is None else window)
    with_sink = torch.cat((s, sink.view(-1, 1, 1).expand(-1, CU[-1], 1)), -1)
    expected = torch.einsum("hqk,khd->qhd", with_sink.softmax(-1)[..., :-1], v)
    assert torch.allclose(out, expected, atol=1e-6)
    grad = torch.randn(out.shape, generator=generator).double()
    mine = torch.autograd.grad(out, inputs, grad)
    wanted = torch.autograd.grad(expected, inputs, grad)
    for a, b in zip(mine, wanted, strict=True):
        assert torch.allclose(a.double(), b, atol=1e-5), (a, b)
