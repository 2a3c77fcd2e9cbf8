"""Megatron's fields for experts, from the architecture and the options of a run."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcore_core.config.compose import RunConfig
    from mcore_core.model.architecture import Architecture

_OPTIONS = (
    "moe_router_dtype",
    "moe_z_loss_coeff",
    "moe_router_bias_update_rate",
    "moe_permute_fusion",
)
"""Options that are megatron's own fields, where a plugin brings them."""
_ALSO = ("moe_aux_loss_coeff", "moe_router_load_balancing_type", "moe_token_dispatcher_type")


def expert_fields(shape: "Architecture", config: "RunConfig") -> dict[str, Any]:
    """Return the fields; without experts only the dispatcher, which pipelines ask for."""
    moe = shape.moe
    if moe is None:
        return {"moe_token_dispatcher_type": "alltoall"}
    given = {name: config.get(name) for name in (*_OPTIONS, *_ALSO) if name in config.names}
    fields = {name: given[name] for name in _OPTIONS if given.get(name) is not None}
    if fields.get("moe_router_dtype") == "none":
        del fields["moe_router_dtype"]
    elif "moe_router_dtype" not in given:
        fields["moe_router_dtype"] = "fp32"
    coefficient = moe.aux_loss_coeff
    if "moe_aux_loss_coeff" in given and config.is_set("moe_aux_loss_coeff"):
        coefficient = given["moe_aux_loss_coeff"]
    kind = given.get("moe_router_load_balancing_type") or "aux_loss"
    return {
        **fields,
        "moe_token_dispatcher_type": given.get("moe_token_dispatcher_type") or "alltoall",
        "moe_router_load_balancing_type": kind,
        "moe_aux_loss_coeff": coefficient if kind != "none" else 0.0,
        "num_moe_experts": moe.num_experts,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_router_topk": moe.topk,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size,
        "moe_shared_expert_gate": moe.shared_gate,
        # our router chooses by the architecture; this name lets megatron keep its bias
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": moe.expert_bias,
        "moe_grouped_gemm": True,
    }
