"""Shapes of what only some decoders have: experts, latent and linear attention, torch-free."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEShape:
    """A mixture of experts in place of some layers' MLPs."""

    num_experts: int
    topk: int
    ffn_hidden_size: int
    """Width inside one expert."""
    layers: tuple[int, ...]
    """HF layers that have experts; the others have a dense MLP."""
    shared_ffn_hidden_size: int | None = None
    """Width of the expert that every token takes, all shared experts together; None for none."""
    shared_gate: bool = False
    """The shared expert's output is multiplied by sigmoid of a learned projection."""
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    pre_softmax: bool = False
    """Softmax over all experts before the choice, weights not renormalized (HF: norm_topk_prob
    false); otherwise over the chosen ones."""
    num_groups: int | None = None
    """Groups of experts for group-limited routing."""
    group_topk: int | None = None
    """Groups a token may choose from."""
    expert_bias: bool = False
    """A bias that is added to scores for the choice only (DeepSeek-V3)."""
    scaling_factor: float = 1.0
    """Multiplies the weights of the chosen experts."""
    router_bias: bool = False
    """A bias in the router's projection (gpt_oss)."""
    linear_bias: bool = False
    """Biases in the experts' projections (gpt_oss)."""
    aux_loss_coeff: float = 0.0
    """The checkpoint's coefficient of the load-balancing loss; options override it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MLAShape:
    """Multi-head latent attention (DeepSeek-V2 and V3)."""

    q_lora_rank: int | None
    """Rank of the query's down-projection; None: queries are projected directly."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    """Part of each query and key head without rotary embedding."""
    qk_rope_head_dim: int
    """Part with it; keys share one."""
    v_head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearAttentionShape:
    """Gated delta net in place of attention in some layers (Qwen3-Next)."""

    layers: tuple[int, ...]
    """HF layers that have it."""
    key_head_dim: int
    value_head_dim: int
    num_key_heads: int
    num_value_heads: int
    conv_kernel: int
