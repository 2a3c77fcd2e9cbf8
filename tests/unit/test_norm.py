"""RMSNorm and LayerNorm against torch and transformers, in value and gradient."""

from types import SimpleNamespace

import pytest

from mcore_core import compat

compat.apply()  # before anything imports megatron

import torch  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRMSNorm  # noqa: E402

from mcore_core.model.norm import Norm  # noqa: E402


def build(normalization="RMSNorm", *, zero_centered=False, sp=False, dtype=torch.float32):
    config = SimpleNamespace(
        normalization=normalization,
        layernorm_zero_centered_gamma=zero_centered,
        use_cpu_initialization=True,
        params_dtype=dtype,
        sequence_parallel=sp,
    )
    return Norm(config, 12, eps=1e-3)


def compare(ours, theirs, x, parameters):
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    grad = torch.randn_like(x)
    (ours(a) * grad).sum().backward()
    (theirs(b) * grad).sum().backward()
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert torch.allclose(a.grad, b.grad, atol=1e-5)
    for mine, its in parameters:
        assert torch.allclose(mine.grad, its.grad, atol=1e-5)


def test_rms_norm_equals_transformers():
    ours, theirs = build(), LlamaRMSNorm(12, eps=1e-3)
    with torch.no_grad():
        values = torch.randn(12)
        ours.weight.copy_(values)
        theirs.weight.copy_(values)
    assert ours.bias is None
    compare(ours, theirs, torch.randn(3, 5, 12), [(ours.weight, theirs.weight)])


def test_layer_norm_equals_torch():
    ours, theirs = build("LayerNorm"), torch.nn.LayerNorm(12, eps=1e-3)
    with torch.no_grad():
        for mine, its in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
            its.normal_()
            mine.copy_(its)
    pairs = [(ours.weight, theirs.weight), (ours.bias, theirs.bias)]
    compare(ours, theirs, torch.randn(3, 5, 12), pairs)


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_zero_centered_weight_is_one_plus_gamma(normalization):
    plain, centered = build(normalization), build(normalization, zero_centered=True)
    assert plain.weight.tolist() == [1.0] * 12
    assert centered.weight.tolist() == [0.0] * 12
    x = torch.randn(4, 12)
    assert torch.equal(centered(x), plain(x))
    with torch.no_grad():
        plain.weight.fill_(1.25)
        centered.weight.fill_(0.25)
    assert torch.equal(centered(x), plain(x))


def test_the_smallest_input_is_damped_by_eps():
    x = torch.full((1, 12), 1e-6)
    assert torch.allclose(build()(x), x / (1e-12 + 1e-3) ** 0.5)


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("sp", [True, False])
def test_parameters_tell_whether_they_are_sequence_parallel(normalization, sp):
    """finalize_model_grads sums the gradients of those that are over tensor-parallel ranks."""
    parameters = list(build(normalization, sp=sp).parameters())
    assert len(parameters) == (1 if normalization == "RMSNorm" else 2)
    assert [p.sequence_parallel for p in parameters] == [sp] * len(parameters)


def test_bfloat16_in_bfloat16_out():
    norm = build(dtype=torch.bfloat16)
    x = torch.randn(4, 12).bfloat16()
    out = norm(x)
    assert out.dtype is norm.weight.dtype is torch.bfloat16
    exact = torch.nn.functional.rms_norm(x.double(), (12,), eps=1e-3)
    assert torch.allclose(out.double(), exact, rtol=2**-7)
