"""Options that change the shape of experts, latent attention and multi-token prediction."""

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mcore_core.errors import usage_error
from mcore_core.model.shapes import MLAShape, MoEShape

if TYPE_CHECKING:
    from mcore_core.config.compose import RunConfig
    from mcore_core.model.architecture import Architecture

_MLA = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
_MOE = {
    "num_experts": "num_experts",
    "moe_ffn_hidden_size": "ffn_hidden_size",
    "moe_shared_expert_intermediate_size": "shared_ffn_hidden_size",
    "moe_router_topk": "topk",
    "moe_router_num_groups": "num_groups",
    "moe_router_group_topk": "group_topk",
    "moe_router_pre_softmax": "pre_softmax",
    "moe_router_score_function": "score_function",
    "moe_router_enable_expert_bias": "expert_bias",
    "moe_router_topk_scaling_factor": "scaling_factor",
}
"""Option -> field of the shape."""


def override_parts(architecture: "Architecture", config: "RunConfig") -> dict[str, Any]:
    """Return the changed fields of the architecture."""
    changes: dict[str, Any] = {}
    if given := _given(config, _MLA, "multi_latent_attention"):
        changes["mla"] = _latent(architecture, given)
    if given := _given(config, _MOE, "moe_layer_freq"):
        changes["moe"] = _experts(architecture, given)
    if "mtp_num_layers" in config.names and config.get("mtp_num_layers") is not None:
        changes["mtp_layers"] = _prediction(architecture, config.get("mtp_num_layers"))
    return changes


def _given(config: "RunConfig", names: dict[str, str], *more: str) -> dict[str, Any]:
    """Return what the user gave of these options."""
    known = [n for n in (*names, *more) if n in config.names]
    return {n: config.get(n) for n in known if config.is_set(n) and config.get(n) is not None}


def _latent(architecture: "Architecture", given: dict[str, Any]) -> MLAShape | None:
    wanted = given.pop("multi_latent_attention", None)
    changes = {_MLA[n]: value for n, value in given.items()}
    if wanted is False:
        if changes:
            raise _contradiction("--multi_latent_attention false", next(iter(given)))
        return None
    if architecture.mla is not None:
        return replace(architecture.mla, **changes)
    missing = [n for n in _MLA if n != "q_lora_rank" and n not in given]
    if missing:
        raise usage_error(
            "MC507",
            "the model has no latent attention, and "
            + ", ".join(f"--{n}" for n in missing)
            + " would be needed for it",
            "fix: leave the MLA options out, or give all of them",
        )
    return MLAShape(**{"q_lora_rank": None, **changes})


def _experts(architecture: "Architecture", given: dict[str, Any]) -> MoEShape:
    changes: dict[str, Any] = {_MOE[n]: v for n, v in given.items() if n in _MOE}
    frequency = given.get("moe_layer_freq")
    if frequency is not None:
        changes["layers"] = _layers(frequency, architecture.num_layers)
    if architecture.moe is not None:
        return replace(architecture.moe, **changes)
    missing = [n for n in ("num_experts", "moe_router_topk") if n not in given]
    if missing:
        raise usage_error(
            "MC507",
            "the model has no experts, and "
            + ", ".join(f"--{n}" for n in missing)
            + " would be needed for them",
            "fix: leave the MoE options out, or give --num_experts and --moe_router_topk",
        )
    defaults: dict[str, Any] = {
        "layers": tuple(range(architecture.num_layers)),
        "ffn_hidden_size": architecture.ffn_hidden_size,
    }
    return MoEShape(**(defaults | changes))


def _layers(text: str, layers: int) -> tuple[int, ...]:
    """Return the layers with experts: "2" is every 2nd from the first, "[0,1,1]" lists them."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if isinstance(value, int) and value > 0:
        return tuple(range(0, layers, value))
    if isinstance(value, list) and len(value) == layers and set(value) <= {0, 1}:
        return tuple(i for i, has in enumerate(value) if has)
    raise usage_error(
        "MC505",
        f"--moe_layer_freq {text}: expected a number, or a list of {layers} times 0 or 1",
    )


def _prediction(architecture: "Architecture", wanted: int) -> int:
    if wanted > architecture.mtp_layers:
        raise usage_error(
            "MC508",
            f"--mtp_num_layers {wanted}: the model has {architecture.mtp_layers} layers of "
            "multi-token prediction",
            f"fix: give {architecture.mtp_layers} or less, or leave it out",
        )
    return wanted


def _contradiction(first: str, second: str) -> Exception:
    return usage_error("MC509", f"{first} and --{second} contradict each other", "fix: keep one")
