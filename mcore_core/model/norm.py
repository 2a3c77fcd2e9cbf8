"""RMSNorm and LayerNorm for layer specs, with what megatron's local norm refuses."""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch import Tensor


class Norm(torch.nn.Module):
    """Normalizes the last dimension; works under sequence parallelism and with 1 + gamma."""

    def __init__(
        self, config: "TransformerConfig", hidden_size: int, eps: float = 1e-5, **_: object
    ) -> None:
        super().__init__()
        self.eps = eps
        self.rms = config.normalization == "RMSNorm"
        self.zero_centered = bool(config.layernorm_zero_centered_gamma)
        self.shape = (hidden_size,)
        device: Any = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        fill = torch.zeros if self.zero_centered else torch.ones
        self.weight = torch.nn.Parameter(
            fill(hidden_size, dtype=config.params_dtype, device=device)
        )
        self.bias: torch.nn.Parameter | None = None
        if not self.rms:
            zeros = torch.zeros(hidden_size, dtype=config.params_dtype, device=device)
            self.bias = torch.nn.Parameter(zeros)
        for parameter in self.parameters():
            # finalize_model_grads sums the gradients of these over tensor-parallel ranks
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: "Tensor") -> "Tensor":
        """Return x normalized, in x's dtype."""
        weight = self.weight + 1 if self.zero_centered else self.weight
        if self.rms:
            return F.rms_norm(x, self.shape, weight, self.eps)
        return F.layer_norm(x, self.shape, weight, self.bias, self.eps)


class HeadNorm(torch.nn.Module):
    """RMSNorm over each head's channels, where tensor-parallel ranks hold different heads.

    Every rank has a part of the weight's gradient: with sequence parallelism finalize_model_grads
    sums the parts, without it the weight's own backward pass does.
    """

    def __init__(
        self, config: "TransformerConfig", hidden_size: int, eps: float = 1e-5, **_: object
    ) -> None:
        super().__init__()
        self.eps = eps
        device: Any = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        ones = torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(ones)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.sum_here = config.tensor_model_parallel_size > 1 and not config.sequence_parallel

    def forward(self, x: "Tensor") -> "Tensor":
        """Return x normalized, in x's dtype."""
        weight = self.weight
        if self.sum_here:
            weight = copy_to_tensor_model_parallel_region(weight)
        return F.rms_norm(x, weight.shape, weight, self.eps)


class _SumOverHeads(torch.autograd.Function):
    """All-reduce forward and backward: what every rank computes depends on the whole sum."""

    @staticmethod
    def forward(ctx: Any, values: "Tensor", group: Any) -> "Tensor":  # type: ignore[override]  # noqa: ANN401
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: "Tensor") -> tuple["Tensor", None]:  # type: ignore[override]  # noqa: ANN401
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class FullNorm(torch.nn.Module):
    """RMSNorm over all heads together, of which this tensor-parallel rank holds some."""

    def __init__(self, config: "TransformerConfig", heads: int, size: int, tp_group: Any) -> None:  # noqa: ANN401
        """Build the norm of `heads` heads, over all ranks, of `size` channels each."""
        super().__init__()
        self.eps, self.tp_group = config.layernorm_epsilon, tp_group
        self.channels = heads * size
        self.zero_centered = bool(config.layernorm_zero_centered_gamma)
        device: Any = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        fill = torch.zeros if self.zero_centered else torch.ones
        local = self.channels // tp_group.size()
        self.weight = torch.nn.Parameter(fill(local, dtype=config.params_dtype, device=device))
        tensor_parallel.set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: "Tensor") -> "Tensor":
        """Return x [..., heads here, size] normalized, in x's dtype."""
        wide = x.float()
        squares = wide.square().sum((-2, -1), keepdim=True)
        if self.tp_group.size() > 1:
            squares = _SumOverHeads.apply(squares, self.tp_group)  # type: ignore[no-untyped-call]
        wide = wide * torch.rsqrt(squares / self.channels + self.eps)
        weight = self.weight.float().view(x.shape[-2:])
        return ((weight + 1 if self.zero_centered else weight) * wide).to(x.dtype)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the weight, split over tensor-parallel ranks."""
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
        return state
