"""Layers of the hybrid stack with what megatron's lack.

Norms on the outputs of attention and MLP, and the sequences of a packed row handed to the experts.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from mcore_core.model.config import DecoderConfig


class Layer(TransformerLayer):  # type: ignore[misc]
    """Attention or an MLP with its residual, as the submodules say.

    Args:
        config: The decoder's configuration.
        submodules: What is in the layer.
        post_attention_norm: Builds the norm on attention's output; None for none.
        post_mlp_norm: Builds the norm on the MLP's output; None for none.
        kwargs: As for TransformerLayer.
    """

    def __init__(
        self,
        config: DecoderConfig,
        submodules: TransformerLayerSubmodules,
        *,
        post_attention_norm: Callable[..., torch.nn.Module] | None = None,
        post_mlp_norm: Callable[..., torch.nn.Module] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(config=config, submodules=submodules, **kwargs)
        sizes: dict[str, Any] = {
            "config": config,
            "hidden_size": config.hidden_size,
            "eps": config.layernorm_epsilon,
        }
        if post_attention_norm is not None:
            self.post_attention_norm = post_attention_norm(**sizes)
            self.self_attn_bda = self._after(self.post_attention_norm)
        if post_mlp_norm is not None:
            self.post_mlp_norm = post_mlp_norm(**sizes)
            self.mlp_bda = self._after(self.post_mlp_norm)

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Run the layer; experts are told which row it is, also when a pass is recomputed."""
        if hasattr(self.mlp, "router"):
            self.mlp.row = kwargs.get("packed_seq_params")
        return super().forward(*args, **kwargs)

    @staticmethod
    def _after(norm: torch.nn.Module) -> Callable[[bool, bool], Callable[..., Tensor]]:
        """Return a bias-dropout-add that norms output and bias before the residual is added."""

        def build(training: bool, fused: bool) -> Callable[..., Tensor]:
            add: Callable[..., Tensor] = get_bias_dropout_add(training, fused)

            def normed(
                output: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float
            ) -> Tensor:
                x, bias = output
                return add((norm(x if bias is None else x + bias), None), residual, dropout)

            return normed

        return build
