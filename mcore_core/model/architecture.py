"""The shape of a decoder as plain numbers: what a family reads from an HF config, torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mcore_core.errors import usage_error
from mcore_core.model.shapes import LinearAttentionShape, MLAShape, MoEShape


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
    dtype: str = "float32"
    """The checkpoint's own dtype: float32, float16 or bfloat16."""
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    head: Literal["lm", "scores", "none"] = "lm"
    """What follows the final norm: the output layer, a linear layer without bias that gives
    `scores` numbers (transformers' ...ForSequenceClassification), or nothing."""
    scores: int = 0
    """Rows of the score head."""
    embedding_scale: float = 1.0
    """Multiplies the embeddings (gemma: the square root of hidden_size)."""

    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    norm_epsilon: float = 1e-5
    zero_centered_gamma: bool = False
    """Norms multiply by 1 + weight (gemma, Qwen3-Next)."""
    post_attention_norm: bool = False
    """A norm on attention's output, before the residual is added (gemma3, glm4)."""
    post_mlp_norm: bool = False
    """A norm on the MLP's output, before the residual is added."""

    activation: str = "silu"
    """Name of the activation, as in HF's `hidden_act`; "gpt_oss" for its clamped SwiGLU."""
    gated: bool = True
    """A gated MLP (SwiGLU and the like): fc1 holds gate and up."""
    mlp_bias: bool = False
    """Biases on linear_fc1 and linear_fc2."""
    activation_clamp: float | None = None
    """gpt_oss: limit of the values that enter the activation."""

    attention_output_bias: bool = False
    """A bias on linear_proj."""
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    """A norm over each head of q and of k."""
    qk_norm_width: Literal["head", "full"] = "head"
    """full: the norms on q and k run over all heads together (olmoe, minimax_m2)."""
    attention_output_gate: bool = False
    """Attention's output is multiplied by sigmoid of a part of the q projection (Qwen3-Next)."""
    softmax_scale: float | None = None
    """Multiplies scores; None: one over the square root of the head size."""
    softmax_type: Literal["vanilla", "off-by-one", "learnable"] = "vanilla"
    window_size: int | None = None
    """Tokens a query sees to its left, itself included, in windowed layers; None: all of them."""
    window_layers: tuple[int, ...] = ()
    """HF layers whose attention is windowed; ignored without window_size."""
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0

    position_embedding_type: Literal["rope", "none"] = "rope"
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rotary_interleaved: bool = False
    """Pairs of neighbouring channels rotate together (glm4, ernie4_5), not the two halves."""
    rope_scaling: Mapping[str, Any] | None = None
    """As the HF config has it (`rope_type`, `factor`, ...); None for plain rope."""
    window_rotary_base: float | None = None
    """Base of windowed layers where it differs (gemma3); they are not rescaled then."""
    no_rope_layers: tuple[int, ...] = ()
    """HF layers without positions."""

    moe: MoEShape | None = None
    mla: MLAShape | None = None
    linear_attention: LinearAttentionShape | None = None
    mtp_layers: int = 0
    """Multi-token prediction layers after the decoder."""
    mtp_dense: bool = False
    """Their MLPs are dense where the decoder has experts (ernie4_5_moe, exaone_moe)."""
    mtp_norm: bool = True
    """Each has a final norm of its own; otherwise the decoder's serves again (ernie4_5_moe)."""

    @property
    def mtp_kind(self) -> int:
        """The number of a layer that has the parts of a layer of multi-token prediction.

        These count as layers after the decoder's. Where nothing is said of such a number, they are
        as the decoder's last layer is.
        """
        named = {*(self.moe.layers if self.moe else ())}
        named |= {*(self.linear_attention.layers if self.linear_attention else ())}
        own = self.mtp_dense or any(layer >= self.num_layers for layer in named)
        return self.num_layers if own else self.num_layers - 1

    @property
    def ties_head(self) -> bool:
        """Whether the embedding is the weight of the output layer too."""
        return self.tie_word_embeddings and self.head == "lm"

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise usage_error(
                "MC501",
                f"the model's num_attention_heads ({self.num_attention_heads}) is not a multiple "
                f"of its num_query_groups ({self.num_query_groups})",
            )
