"""Gated delta net without flash-linear-attention: plain torch for the three functions it takes.

megatron-core 0.19 (ssm/gated_delta_net/common.py) imports them from `fla`, whose kernels are
Triton, and refuses to build the layer without. These stand in wherever `fla` is absent, on a GPU
too, and know packed rows.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _sequences(cu_seqlens: Tensor | None) -> list[slice]:
    """Return the sequences of a packed row, or all of an unpacked batch."""
    if cu_seqlens is None:
        return [slice(None)]
    return [slice(a, b) for a, b in pairwise(cu_seqlens.tolist()) if b > a]


def l2norm(x: Tensor, dim: int = -1, eps: float = 1e-6) -> Tensor:
    """Return x with its last dimension scaled to length one."""
    return x * torch.rsqrt((x * x).sum(dim, keepdim=True) + eps)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Return the depthwise causal convolution of each sequence of x [1, T, channels]."""
    size = weight.shape[-1]
    parts = [
        F.conv1d(
            F.pad(x[:, where].transpose(1, 2), (size - 1, 0)),
            weight.unsqueeze(1),
            bias,
            groups=x.shape[-1],
        )
        for where in _sequences(cu_seqlens)
    ]
    out = torch.cat(parts, -1).transpose(1, 2)
    return (F.silu(out) if activation in ("silu", "swish") else out), None


def patch_gated_delta_net() -> None:
    """Give megatron's module these functions where `fla` is not installed."""
    from megatron.core.ssm.gated_delta_net import common, gdn  # noqa: PLC0415  (slow to import)

    if common.HAVE_FLA:
        return
    torch_rule = common.torch_chunk_gated_delta_rule

    def chunk_gated_delta_rule(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        cu_seqlens: Tensor | None = None,
        **options: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor | None]:
        """Run the rule on each sequence by itself; return their last states too, if wanted."""
        parts = [
            torch_rule(q[:, r], k[:, r], v[:, r], g[:, r], beta[:, r], **options)
            for r in _sequences(cu_seqlens)
        ]
        states = [state for _, state in parts if state is not None]
        return torch.cat([out for out, _ in parts], 1), torch.cat(states) if states else None

    for module in (common, gdn):
        patched: Any = module
        patched.HAVE_FLA = True
        patched.l2norm, patched.causal_conv1d = l2norm, causal_conv1d
        patched.chunk_gated_delta_rule = chunk_gated_delta_rule
