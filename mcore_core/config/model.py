"""The model's shape: overrides of what the checkpoint's config.json says."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from mcore_core.config.group import ConfigGroup


class ModelConfig(ConfigGroup):
    """The model's shape. What is not given is read from the checkpoint, whatever the default."""

    title: ClassVar[str] = "Model"
    sparse: ClassVar[bool] = True

    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Whose layers run: mcore's own (local), or Transformer Engine's. auto: Transformer Engine
    where it is installed and there is a GPU."""
    num_layers: int | None = Field(None, ge=1)
    """Decoder layers."""
    hidden_size: int | None = Field(None, ge=1)
    """Width of the hidden states."""
    ffn_hidden_size: int | None = Field(None, ge=1)
    """Width inside the MLPs."""
    num_attention_heads: int | None = Field(None, ge=1)
    """Query heads in each layer."""
    group_query_attention: bool | None = None
    """Let several query heads share keys and values: see num_query_groups."""
    num_query_groups: int = Field(1, ge=1)
    """Heads of keys and values in each layer."""
    kv_channels: int | None = Field(None, ge=1)
    """Size of one attention head. none: hidden_size / num_attention_heads."""
    softmax_type: Literal["vanilla", "off-by-one", "learnable"] = "vanilla"
    """Softmax of attention: plain, with a constant sink of 1 in the sum, or a learned one."""
    window_size: str | None = None
    """Tokens to the left that windowed layers attend to, as N or N,0."""
    window_attn_skip_freq: str | None = None
    """Every Nth layer attends to all tokens, the others to the window; or a list such as
    [1,0,1,0], where 1 is windowed."""
    max_position_embeddings: int | None = Field(None, ge=1)
    """Longest sequence the model was made for, in tokens."""
    position_embedding_type: Literal["learned_absolute", "rope", "mrope", "relative", "none"] = (
        "rope"
    )
    """How positions enter the model."""
    rotary_base: int = Field(10000, ge=1)
    """Base of the rotary frequencies (rope_theta)."""
    rotary_percent: float = Field(1.0, gt=0, le=1)
    """Part of each head that is rotated, 0 to 1."""
    rope_scaling: dict[str, Any] | None = None
    """Rescaling of the rotary frequencies for longer sequences, as JSON in the form of HF's
    config: {"rope_type": "llama3", "factor": 8, ...}."""
    no_rope_freq: int | None = Field(None, ge=1)
    """Every Nth layer has no rotary embedding."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "RMSNorm"
    """Kind of norm."""
    norm_epsilon: float = Field(1e-5, gt=0)
    """Added to the variance in norms."""
    qk_layernorm: bool | None = None
    """Norms on queries and keys."""
    qk_l2_norm: bool | None = None
    """Scale queries and keys to length one."""
    swiglu: bool = True
    """SwiGLU in the MLPs (a gate with SiLU); false: GELU without a gate."""
    quick_geglu: bool = False
    """A gate with the sigmoid approximation of GELU in the MLPs."""
    activation_func_clamp_value: float | None = Field(None, gt=0)
    """Limit of the values that enter the MLP's activation."""
    glu_linear_offset: float = 0.0
    """Added to the linear half of a gated MLP."""
    untie_embeddings_and_output_weights: bool = True
    """Separate weights for the embedding and the head."""
    disable_bias_linear: bool = True
    """No biases in the linear layers of attention's output and the MLPs."""
    add_qkv_bias: bool = True
    """Biases on queries, keys and values."""
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping an attention weight."""
    hidden_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping a value after attention and MLP."""
    padded_vocab_size: int | None = Field(None, ge=1)
    """Rows of the embedding. none: the vocabulary rounded up so that tensor parallelism divides
    it; the added rows are never saved."""
    moe_apply_probs_on_input: bool | None = None
    """Multiply router probabilities before the experts instead of after them."""
