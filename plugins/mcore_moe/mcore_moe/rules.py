"""Options of experts that cannot be honoured, and how they fit together."""

from collections.abc import Callable, Mapping
from typing import Any

from mcore_core.config.compose import RunConfig
from mcore_core.config.decode import as_typed
from mcore_core.errors import Problem

_DROPS = "no token is dropped here: every expert takes all tokens that chose it"

REFUSED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "moe_router_load_balancing_type": (
        lambda value: value in ("global_aux_loss", "sinkhorn"),
        "its result depends on how micro-batches are spread over ranks; aux_loss and seq_aux_loss "
        "do not",
    ),
    "moe_token_dispatcher_type": (
        lambda value: value in ("flex", "alltoall_seq"),
        "flex needs DeepEP or HybridEP, and megatron-core has no alltoall_seq any more; alltoall "
        "and allgather run everywhere",
    ),
    "moe_enable_deepep": (bool, "DeepEP needs the flex dispatcher, which is not built in"),
    "moe_grouped_gemm": (
        lambda value: value is False,
        "the experts of a rank lie in one parameter; where there is no grouped product (on the "
        "CPU, or not in bfloat16) they run one by one anyway",
    ),
    "moe_shared_expert_overlap": (
        bool,
        "the overlapped path of megatron-core ignores the activation's clamp and changes no result",
    ),
    "moe_expert_capacity_factor": (lambda value: value is not None, _DROPS),
    "moe_pad_expert_input_to_capacity": (bool, _DROPS),
    "moe_token_drop_policy": (lambda value: value != "probs", _DROPS),
}
"""Option -> (which values, why)."""


def check_experts(config: RunConfig) -> list[Problem]:
    """Return a problem for each option that cannot be honoured or contradicts another."""
    problems = []
    for name, (wrong, why) in REFUSED.items():
        if config.changed(name) and wrong(config.get(name)):
            problems.append(
                Problem(
                    "MC311",
                    f"--{name} {as_typed(config.get(name))} cannot be honoured: {why}",
                    ["fix: leave the option out"],
                )
            )
    pipelined = config.get("pipeline_model_parallel_size") > 1
    if config.get("moe_token_dispatcher_type") == "allgather" and pipelined:
        problems.append(
            Problem(
                "MC313",
                "--moe_token_dispatcher_type allgather takes rows of one length, and rows between "
                "pipeline stages have their own lengths",
                ["fix: --moe_token_dispatcher_type alltoall"],
            )
        )
    groups, chosen = config.get("moe_router_num_groups"), config.get("moe_router_group_topk")
    if groups is not None and chosen is not None and chosen > groups:
        problems.append(
            Problem(
                "MC314",
                f"--moe_router_group_topk {chosen} is above --moe_router_num_groups {groups}",
                [f"fix: give {groups} or less"],
            )
        )
    return problems
