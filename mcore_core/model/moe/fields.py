"""Megatron's fields for experts, from the architecture and the options of a run."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcore_core.config.compose import RunConfig
    from mcore_core.model.architecture import Architecture

_SAME = (
    "moe_router_dtype",
    "moe_z_loss_coeff",
    "moe_router_bias_update_rate",
    "moe_permute_fusion",
    "moe_grouped_gemm",
    "moe_shared_expert_overlap",
    "moe_expert_capacity_factor",
    "moe_pad_expert_input_to_capacity",
    "moe_token_drop_policy",
)
"""Options that are megatron's own fields, where a plugin brings them."""


def expert_fields(shape: "Architecture", config: "RunConfig", dispatcher: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return the fields; without experts only the dispatcher, which pipelines ask for."""
    moe = shape.moe
    if moe is None:
        return {"moe_token_dispatcher_type": "alltoall"}
    fields = {name: config.get(name) for name in _SAME if name in config.names}
    fields = {name: value for name, value in fields.items() if value is not None}
    if fields.setdefault("moe_router_dtype", "fp32") == "none":
        del fields["moe_router_dtype"]
    if moe.shared_ffn_hidden_size is None:
        fields.pop("moe_shared_expert_overlap", None)
    balance, coefficient = balance_of(shape, config)
    return {
        "moe_grouped_gemm": True,
        **fields,
        # what megatron's own checks know of a dispatcher is whether it takes rows of any length
        "moe_token_dispatcher_type": getattr(dispatcher, "megatron_type", "alltoall"),
        "dispatcher": dispatcher,
        "balance": balance,
        "balance_coeff": coefficient,
        "moe_router_load_balancing_type": "none",  # ours are added by our router
        "moe_aux_loss_coeff": 0.0,
        "num_moe_experts": moe.num_experts,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_router_topk": moe.topk,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size,
        "moe_shared_expert_gate": moe.shared_gate,
        # our router chooses by the architecture; this name lets megatron keep its bias
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": moe.expert_bias,
    }


def balance_of(shape: "Architecture", config: "RunConfig") -> tuple[str, float]:
    """Return what balances experts, and the weight of its loss."""
    assert shape.moe is not None
    coefficient, kind = shape.moe.aux_loss_coeff, "aux_loss"
    if "moe_aux_loss_coeff" in config.names:
        kind = config.get("moe_router_load_balancing_type") or kind
        if config.is_set("moe_aux_loss_coeff"):
            coefficient = config.get("moe_aux_loss_coeff")
    return kind, 0.0 if kind in ("none", "sinkhorn") else coefficient
