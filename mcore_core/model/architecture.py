"""The shape of a decoder as plain numbers: what a family reads from an HF config, torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mcore_core.errors import usage_error


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One decoder-only model. Layer lists and numbers count layers of the HF model, from 0."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    """Size of one attention head."""
    vocab_size: int
    """Rows of the HF embedding, before padding for tensor parallelism."""
    max_position_embeddings: int
    norm_epsilon: float = 1e-5
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    activation: str = "silu"
    """Name of the activation, as in HF's `hidden_act`."""
    gated: bool = True
    """A gated MLP (SwiGLU and the like): fc1 holds gate and up."""
    add_bias_linear: bool = False
    """Biases on linear_proj, linear_fc1 and linear_fc2."""
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    """A norm over each head of q and of k."""
    position_embedding_type: Literal["rope", "none"] = "rope"
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rope_scaling: Mapping[str, Any] | None = None
    """As the HF config has it (`rope_type`, `factor`, ...); None for plain rope."""
    tie_word_embeddings: bool = False
    softmax_type: Literal["vanilla", "off-by-one", "learnable"] = "vanilla"
    window_size: int | None = None
    """Tokens a query sees to its left, itself included, in windowed layers; None: all of them."""
    window_layers: tuple[int, ...] = ()
    """HF layers whose attention is windowed; ignored without window_size."""
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    initializer_range: float = 0.02
    dtype: str = "float32"
    """The checkpoint's own dtype: float32, float16 or bfloat16."""

    def __post_init__(self) -> None:
        problems = [
            (
                self.num_attention_heads % self.num_query_groups,
                "num_attention_heads",
                "num_query_groups",
            ),
        ]
        for rest, a, b in problems:
            if rest:
                raise usage_error(
                    "MC501",
                    f"the model's {a} ({getattr(self, a)}) is not a multiple of its {b} "
                    f"({getattr(self, b)})",
                )
