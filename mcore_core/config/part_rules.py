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
    if layout.tp > 1 and not layout.sp:
        yield Problem(
            "MC616",
            f"experts with tensor_model_parallel_size {layout.tp} need sequence parallelism: "
            "without it every rank would send each token to its experts",
            ["fix: --sequence_parallel true"],
        )
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
