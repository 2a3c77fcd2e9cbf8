"""Megatron's self-attention with norms over all heads of queries and of keys together."""

from typing import Any

from megatron.core.transformer.attention import SelfAttention

from mcore_core.model.config import DecoderConfig
from mcore_core.model.norm import FullNorm


class FullNormAttention(SelfAttention):  # type: ignore[misc]
    """SelfAttention whose q and k norms run over all heads, not over each head.

    The configuration's `qk_layernorm` is off: finalize_model_grads would add up the gradients of
    norms that it believes replicated over tensor-parallel ranks.
    """

    def __init__(self, config: DecoderConfig, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(config, *args, **kwargs)
        shape, group = config.shape, self.pg_collection.tp
        size = self.hidden_size_per_attention_head
        self.q_layernorm = FullNorm(config, shape.num_attention_heads, size, group)
        self.k_layernorm = FullNorm(config, shape.num_query_groups, size, group)
