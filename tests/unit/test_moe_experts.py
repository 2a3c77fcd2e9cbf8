"""The experts' fused activation: what it gives, its gradients and what it keeps."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from mcore_core import compat

compat.apply()

from mcore_core.model.moe.experts import GroupedMLP  # noqa: E402

COUNTS = [5, 0, 3]
GROUP = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


@dataclasses.dataclass
class Config:
    """What experts read of a decoder's configuration."""

    bias_activation_fusion: bool
    moe_grouped_gemm: bool = True
    hidden_size: int = 8
    gated_linear_unit: bool = True
    activation_func: object = torch.nn.functional.silu
    activation_func_clamp_value: object = None
    glu_linear_offset: float = 0.0
    use_cpu_initialization: bool = True
    perform_initialization: bool = True
    params_dtype: torch.dtype = torch.float64

    def __post_init__(self):
        self.shape = SimpleNamespace(moe=SimpleNamespace(ffn_hidden_size=6, linear_bias=True))
        self.init_method = self.output_layer_init_method = torch.nn.init.normal_


def run(fused, **changes):
    torch.manual_seed(0)
    groups = SimpleNamespace(ep=GROUP, expt_tp=GROUP, expt_dp=GROUP)
    experts = GroupedMLP(3, Config(fused, **changes), groups)
    for layer in (experts.linear_fc1, experts.linear_fc2):
        torch.nn.init.normal_(layer.bias)
    x = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    probs = torch.rand(8, dtype=torch.float64, requires_grad=True)
    kept = {}

    def keep(tensor):
        memory = tensor.untyped_storage()
        kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = experts.run(x, COUNTS, probs)
    (out * torch.randn(8, 8, dtype=torch.float64)).sum().backward()
    return [out, x.grad, probs.grad, *(p.grad for p in experts.parameters())], sum(kept.values())


def test_fused_gives_the_same_and_keeps_less():
    (plain, kept), (fused, kept_fused) = run(False), run(True)
    assert len(plain) == 7
    for a, b in zip(plain, fused, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert kept_fused < kept


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_offset_is_added_to_the_linear_half(offset):
    config = Config(False, glu_linear_offset=offset)
    groups = SimpleNamespace(ep=GROUP, expt_tp=GROUP, expt_dp=GROUP)
    x = torch.randn(4, 12, dtype=torch.float64)
    gate, up = x.chunk(2, -1)
    got = GroupedMLP(3, config, groups)._activate(x)
    torch.testing.assert_close(got, torch.nn.functional.silu(gate) * (up + offset))
