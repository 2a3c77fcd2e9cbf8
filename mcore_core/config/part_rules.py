"""Whether experts, latent and linear attention, and prediction layers fit a layout."""

from collections.abc import Iterator

from mcore_core.config.compose import RunConfig
from mcore_core.errors import Problem
from mcore_core.model.architecture import Architecture
from mcore_core.parallel.topology import Layout


def check_expert_ranks(layout: Layout) -> list[Problem]:
    """Return whether expert parallelism divides the ranks, as far as it shows without the model."""
    ranks = layout.world // layout.pp
    experts = layout.ep * layout.etp
    if ranks % experts == 0:
        return []
    return [
        Problem(
            "MC614",
            f"{ranks} ranks of a pipeline stage cannot be divided by expert "
            f"{layout.ep} x expert-tensor {layout.etp} = {experts}",
            [
                f"{ranks} / {experts} = {ranks / experts:.2f}",
                "fix: choose --expert_model_parallel_size and --expert_tensor_parallel_size whose "
                f"product divides {ranks}",
            ],
        )
    ]


def check_parts(config: RunConfig, shape: Architecture, layout: Layout) -> list[Problem]:
    """Return what of the model's special parts does not fit the layout or the options."""
    return [
        *_experts(shape, layout),
        *_expert_options(config, shape),
        *_attention(config, shape, layout),
        *_full_norms(shape, layout),
    ]


def _experts(shape: Architecture, layout: Layout) -> Iterator[Problem]:
    moe = shape.moe
    if moe is None:
        if layout.ep > 1 or layout.etp > 1:
            yield Problem(
                "MC615",
                "--expert_model_parallel_size and --expert_tensor_parallel_size divide experts, "
                "and the model has none",
                ["fix: leave them out"],
            )
        return
    for name, what, size, ranks in (
        ("expert_model_parallel_size", "experts in a layer", moe.num_experts, layout.ep),
        ("expert_tensor_parallel_size", "columns in an expert", moe.ffn_hidden_size, layout.etp),
        (
            "tensor_model_parallel_size",
            "columns in its shared expert",
            moe.shared_ffn_hidden_size or 0,
            layout.tp,
        ),
    ):
        if size % ranks:
            near = [n for n in range(1, size + 1) if size % n == 0]
            best = sorted(sorted(near, key=lambda n: abs(n - ranks))[:2])
            yield Problem(
                "MC617",
                f"the model has {size} {what}, which {name} {ranks} does not divide",
                [f"fix: --{name} " + " or ".join(map(str, best))],
            )
    if moe.linear_bias and layout.etp not in (1, layout.tp):
        yield Problem(
            "MC617",
            "the model's experts have biases, which expert_tensor_parallel_size "
            f"{layout.etp} cannot share beside tensor_model_parallel_size {layout.tp}",
            [f"fix: --expert_tensor_parallel_size 1 or {layout.tp}"],
        )


_FOR_EXPERTS = (
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_router_bias_update_rate",
    "moe_expert_capacity_factor",
    "moe_shared_expert_overlap",
    "moe_permute_fusion",
)
"""Options that a model without experts would ignore."""


def _expert_options(config: RunConfig, shape: Architecture) -> Iterator[Problem]:
    given = {n for n in _FOR_EXPERTS if n in config.names and config.changed(n)}
    moe = shape.moe
    if moe is None:
        if given:
            names = " and ".join(f"--{n}" for n in sorted(given))
            yield Problem(
                "MC615", f"{names}: the model has no experts", ["fix: leave these options out"]
            )
        return
    if "moe_router_bias_update_rate" in given and not moe.expert_bias:
        yield Problem(
            "MC315",
            "--moe_router_bias_update_rate moves a bias that the model's routers do not have",
            ["fix: --moe_router_enable_expert_bias true, or leave it out"],
        )
    if "moe_shared_expert_overlap" in given:
        if moe.shared_ffn_hidden_size is None:
            yield Problem(
                "MC315",
                "--moe_shared_expert_overlap: the model has no shared expert",
                ["fix: leave it out"],
            )
        elif shape.activation_clamp is not None or shape.activation == "gpt_oss":
            yield Problem(
                "MC315",
                "--moe_shared_expert_overlap: megatron-core's overlapped path leaves out the clamp "
                "of the model's activation",
                ["fix: leave it out"],
            )
    kind = config.get("moe_router_load_balancing_type") if given else None
    if kind == "sinkhorn" and (moe.expert_bias or moe.num_groups is not None):
        yield Problem(
            "MC315",
            "--moe_router_load_balancing_type sinkhorn assigns experts by itself, and the model's "
            "routers choose " + ("with a bias" if moe.expert_bias else "within groups"),
            ["fix: aux_loss, seq_aux_loss, global_aux_loss or none"],
        )


def _attention(config: RunConfig, shape: Architecture, layout: Layout) -> Iterator[Problem]:
    linear = shape.linear_attention
    if linear is None:
        return
    ranks = layout.tp * layout.cp
    for what, size in (
        ("key heads", linear.num_key_heads),
        ("value heads", linear.num_value_heads),
    ):
        if size % ranks:
            yield Problem(
                "MC618",
                f"the model has {size} {what} of linear attention, which tensor {layout.tp} x "
                f"context {layout.cp} = {ranks} does not divide",
                ["fix: lower --tensor_model_parallel_size or --context_parallel_size"],
            )
    if config.get("deterministic_mode"):
        yield Problem(
            "MC619",
            "--deterministic_mode: the model's gated delta net has no deterministic form for "
            "samples packed into one row",
            ["fix: leave it out"],
        )


def _full_norms(shape: Architecture, layout: Layout) -> Iterator[Problem]:
    full = shape.qk_layernorm and shape.qk_norm_width == "full"
    if full and shape.num_query_groups % layout.tp:
        yield Problem(
            "MC611",
            f"the model has norms over all {shape.num_query_groups} heads of keys, which "
            f"tensor_model_parallel_size {layout.tp} does not divide",
            [
                "fix: --tensor_model_parallel_size "
                + " or ".join(
                    str(n)
                    for n in range(1, shape.num_query_groups + 1)
                    if shape.num_query_groups % n == 0
                )
            ],
        )
