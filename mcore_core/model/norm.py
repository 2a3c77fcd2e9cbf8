"""RMSNorm and LayerNorm for layer specs, with what megatron's local norm refuses."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

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
