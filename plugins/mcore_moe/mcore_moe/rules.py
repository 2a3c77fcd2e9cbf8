"""Options of experts that cannot be honoured, and how they fit together."""

from collections.abc import Iterator
from importlib.util import find_spec

from mcore_core.config.compose import RunConfig
from mcore_core.config.decode import as_typed
from mcore_core.errors import Problem

ALIKE = ("none", "sinkhorn")
"""Balancing without a loss."""


def check_experts(config: RunConfig) -> list[Problem]:
    """Return a problem for each option that cannot be honoured or contradicts another."""
    return [
        *_dispatch(config),
        *_capacity(config),
        *_balance(config),
        *_groups(config),
        *_packages(config),
    ]


def _dispatch(config: RunConfig) -> Iterator[Problem]:
    kind = config.get("moe_token_dispatcher_type")
    if config.get("moe_enable_deepep") and kind != "flex":
        yield Problem(
            "MC313",
            f"--moe_enable_deepep is for the dispatcher flex, and this run has {kind}",
            ["fix: --moe_token_dispatcher_type flex, or leave --moe_enable_deepep out"],
        )
    overlap = config.get("moe_shared_expert_overlap")
    if overlap and kind == "allgather":
        yield Problem(
            "MC313",
            "--moe_shared_expert_overlap computes the shared expert while tokens travel to single "
            "ranks, and with allgather all travel to all",
            ["fix: --moe_token_dispatcher_type alltoall, or leave the overlap out"],
        )
    if (
        overlap
        and config.get("tensor_model_parallel_size") > 1
        and not config.get("sequence_parallel")
    ):
        yield Problem(
            "MC313",
            "--moe_shared_expert_overlap with tensor parallelism needs each rank to hold its own "
            "tokens",
            ["fix: --sequence_parallel true, or leave the overlap out"],
        )
    if overlap and "shared_experts" in (config.get("recompute_modules") or ()):
        yield Problem(
            "MC313",
            "--moe_shared_expert_overlap and recomputation of shared_experts contradict each other",
            ["fix: leave one of them out"],
        )


def _capacity(config: RunConfig) -> Iterator[Problem]:
    limited = config.get("moe_expert_capacity_factor") is not None
    if not limited:
        for name in ("moe_pad_expert_input_to_capacity", "moe_token_drop_policy"):
            if config.changed(name):
                yield Problem(
                    "MC313",
                    f"--{name} {as_typed(config.get(name))} means nothing without a capacity: "
                    "every expert takes all tokens that chose it",
                    ["fix: --moe_expert_capacity_factor 1.25, or leave it out"],
                )
        return
    kind = config.get("moe_token_dispatcher_type")
    if config.get("moe_pad_expert_input_to_capacity") and kind != "alltoall":
        yield Problem(
            "MC313",
            "--moe_pad_expert_input_to_capacity is for the dispatcher alltoall, and this run has "
            f"{kind}",
            ["fix: --moe_token_dispatcher_type alltoall, or leave the padding out"],
        )


def _balance(config: RunConfig) -> Iterator[Problem]:
    kind = config.get("moe_router_load_balancing_type")
    if kind in ALIKE and config.get("moe_aux_loss_coeff"):
        yield Problem(
            "MC313",
            f"--moe_aux_loss_coeff {as_typed(config.get('moe_aux_loss_coeff'))} has no loss to "
            f"weigh: --moe_router_load_balancing_type {kind}",
            ["fix: aux_loss, seq_aux_loss or global_aux_loss, or leave the coefficient out"],
        )


def _groups(config: RunConfig) -> Iterator[Problem]:
    groups, chosen = config.get("moe_router_num_groups"), config.get("moe_router_group_topk")
    if groups is not None and chosen is not None and chosen > groups:
        yield Problem(
            "MC314",
            f"--moe_router_group_topk {chosen} is above --moe_router_num_groups {groups}",
            [f"fix: give {groups} or less"],
        )


def _packages(config: RunConfig) -> Iterator[Problem]:
    """Return what is not installed; nothing is imported."""
    if config.get("moe_token_dispatcher_type") == "flex" and find_spec("deep_ep") is None:
        yield Problem(
            "MC312",
            "--moe_token_dispatcher_type flex needs DeepEP, which is not installed (no module "
            "deep_ep)",
            ["fix: install DeepEP on a machine with CUDA, or --moe_token_dispatcher_type alltoall"],
        )
    if config.get("moe_permute_fusion") and find_spec("transformer_engine") is None:
        yield Problem(
            "MC312",
            "--moe_permute_fusion needs Transformer Engine, which is not installed",
            ["fix: uv pip install 'mcore-core[te]', or leave it out"],
        )
