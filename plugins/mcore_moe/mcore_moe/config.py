"""Options of mixtures of experts."""

from typing import ClassVar, Literal

from pydantic import Field

from mcore_core.config.group import ConfigGroup


class MoEConfig(ConfigGroup):
    """Mixtures of experts. The shape that is not given is read from the checkpoint."""

    title: ClassVar[str] = "MoE"

    num_experts: int | None = Field(None, ge=1)
    """Experts in each layer that has them."""
    moe_layer_freq: str | None = None
    """Every Nth layer has experts, from the first on; or a list such as [0,1,1,1], where 1 has."""
    moe_ffn_hidden_size: int | None = Field(None, ge=1)
    """Width inside one expert."""
    moe_shared_expert_intermediate_size: int | None = Field(None, ge=1)
    """Width of the expert that every token takes, all shared experts together."""
    moe_router_topk: int | None = Field(None, ge=1)
    """Experts that each token goes to."""
    moe_router_num_groups: int | None = Field(None, ge=1)
    """Groups that the experts are divided into for routing limited to groups."""
    moe_router_group_topk: int | None = Field(None, ge=1)
    """Groups that a token may choose experts from."""
    moe_router_pre_softmax: bool | None = None
    """Softmax over all experts before the choice, without renormalizing over the chosen ones."""
    moe_router_dtype: Literal["none", "fp32", "fp64"] = "fp32"
    """Precision of the router. none: that of the model."""
    moe_router_score_function: Literal["sigmoid", "softmax"] | None = None
    """What turns the router's outputs into scores."""
    moe_router_bias_update_rate: float | None = Field(None, ge=0)
    """How far the bias that balances experts moves in each step. none: 0.001."""
    moe_router_enable_expert_bias: bool | None = None
    """A bias that is added to scores for the choice only, and moves so that experts are used
    alike (DeepSeek-V3)."""
    moe_router_topk_scaling_factor: float | None = Field(None, gt=0)
    """Multiplies the weights of the chosen experts."""
    moe_router_load_balancing_type: (
        Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none"] | None
    ) = None
    """How experts are kept in use alike: a loss over each micro-batch, over each sequence or over
    the global batch (which takes a second forward pass), or an assignment that is balanced itself
    (sinkhorn). none: aux_loss."""
    expert_model_parallel_size: int = Field(1, ge=1)
    """Ranks that share the experts of a layer."""
    expert_tensor_parallel_size: int = Field(1, ge=1)
    """Ranks that share the matrices of each expert."""
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex", "alltoall_seq"] | str = (
        "alltoall"
    )
    """How tokens get to their experts; plugins may add ways (hook mcore_dispatchers)."""
    moe_enable_deepep: bool = False
    """Dispatch through DeepEP."""
    moe_grouped_gemm: bool = True
    """One grouped matrix product for all experts of a rank, where the device has one (CUDA,
    bfloat16); else one expert after the other."""
    moe_permute_fusion: bool = False
    """Fuse the sorting of tokens by expert; needs Transformer Engine."""
    moe_aux_loss_coeff: float = Field(0.0, ge=0)
    """Weight of the balancing loss; left out, the checkpoint's counts."""
    moe_z_loss_coeff: float | None = Field(None, ge=0)
    """Weight of a loss that keeps the router's outputs small."""
    moe_shared_expert_overlap: bool = False
    """Compute the shared expert while tokens travel."""
    moe_expert_capacity_factor: float | None = Field(None, gt=0)
    """Tokens of a micro-batch that an expert takes at most, as a multiple of an even share. none:
    all."""
    moe_pad_expert_input_to_capacity: bool = False
    """Fill each expert's tokens up to its capacity."""
    moe_token_drop_policy: Literal["probs", "position"] = "probs"
    """Which tokens are dropped over capacity."""
