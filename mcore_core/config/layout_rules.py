"""Whether sizes divide: ranks over parallel dimensions, batches over ranks, a model over both."""

from collections.abc import Iterator
from itertools import product

from mcore_core.config.compose import RunConfig
from mcore_core.config.part_rules import check_expert_ranks, check_parts
from mcore_core.config.precision import PrecisionConfig
from mcore_core.errors import Problem
from mcore_core.model.architecture import Architecture
from mcore_core.parallel.stages import SplitOptions, expand_layout, layers_per_stage
from mcore_core.parallel.topology import Layout

_LIMIT = 4096
"""Batch sizes and the like are searched this far for ones that divide."""


def layout_of(config: RunConfig, world_size: int, *, num_layers: int | None = None) -> Layout:
    """Return the sizes of all dimensions.

    `num_layers` is needed where the user gave num_layers_per_virtual_pipeline_stage; until it is
    known such a layout has no virtual stages.
    """
    tp = config.get("tensor_model_parallel_size")
    return Layout(
        world=world_size,
        tp=tp,
        pp=config.get("pipeline_model_parallel_size"),
        cp=config.get("context_parallel_size"),
        ep=_size(config, "expert_model_parallel_size"),
        etp=_size(config, "expert_tensor_parallel_size"),
        vpp=_chunks(config, num_layers),
        sp=config.get("sequence_parallel") and tp > 1,
    )


def _size(config: RunConfig, name: str) -> int:
    """Return a size that only a plugin's options have; 1 without it."""
    return int(config.get(name)) if name in config.names else 1


def split_options(config: RunConfig, layout: Layout) -> SplitOptions:
    """Return how the user wants layers divided."""
    return SplitOptions(
        pipeline_model_parallel_size=layout.pp,
        virtual=layout.vpp,
        **{
            name: config.get(name)
            for name in (
                "decoder_first_pipeline_num_layers",
                "decoder_last_pipeline_num_layers",
                "account_for_embedding_in_pipeline_split",
                "account_for_loss_in_pipeline_split",
                "pipeline_model_parallel_layout",
            )
        },
    )


def _chunks(config: RunConfig, num_layers: int | None) -> int | None:
    """Return the chunks of each pipeline rank, None for one."""
    pp = config.get("pipeline_model_parallel_size")
    text, each = (
        config.get("pipeline_model_parallel_layout"),
        config.get("num_layers_per_virtual_pipeline_stage"),
    )
    chunks = config.get("num_virtual_stages_per_pipeline_rank")
    if chunks is None and each is not None and num_layers is not None:
        chunks = num_layers // (pp * each)
    if chunks is None and text is not None:
        try:
            chunks = len(expand_layout(text)) // pp
        except ValueError:
            return None
    return chunks if chunks and chunks > 1 else None


def check_layout(config: RunConfig, world_size: int) -> list[Problem]:
    """Return what does not divide, as far as it shows without the model."""
    layout = layout_of(config, world_size)
    problems = list(_pipeline(config, layout))
    model = layout.tp * layout.pp * layout.cp
    if world_size % model:
        problems.append(_world(layout, world_size))
    else:
        batch = list(_batch(config, layout))
        problems += batch or _microbatches(config, layout)
        problems += check_expert_ranks(layout)
    return problems


def _world(layout: Layout, world: int) -> Problem:
    model = layout.tp * layout.pp * layout.cp
    sizes = (layout.tp, layout.pp, layout.cp)
    fitting = [s for s in product(*(_divisors(world),) * 3) if world % (s[0] * s[1] * s[2]) == 0]
    near = sorted(
        fitting, key=lambda s: (sum(abs(a - b) for a, b in zip(s, sizes, strict=True)), s)
    )
    ranks = sorted({max(model, world // model * model), (world // model + 1) * model})
    return Problem(
        "MC601",
        f"{_ranks(world)} cannot be divided by tensor {layout.tp} x pipeline {layout.pp} x "
        f"context {layout.cp} = {model}",
        [
            f"{world} / {model} = {world / model:.2f}",
            f"layouts near it that fit {_ranks(world)}: "
            + "; ".join(
                f"tensor {t} pipeline {p} context {c} (data {world // (t * p * c)})"
                for t, p, c in near[:3]
            ),
            f"fix: choose one of these, or start {' or '.join(map(str, ranks))} ranks "
            "(--nproc_per_node)",
        ],
    )


def _batch(config: RunConfig, layout: Layout) -> Iterator[Problem]:
    micro, total = config.get("micro_batch_size"), config.get("global_batch_size")
    step = micro * layout.dp
    if total % step == 0:
        return
    near = _near(total, step)
    other = [m for m in _divisors(total) if total % (m * layout.dp) == 0]
    notes = [
        f"{micro} x {layout.dp} = {step}, and {total} / {step} = {total / step:.2f}",
        f"data-parallel size: {_ranks(layout.world)} / (tensor {layout.tp} x pipeline {layout.pp} "
        f"x context {layout.cp}) = {layout.dp}",
        f"fix: --global_batch_size {' or '.join(map(str, near))}",
    ]
    if other:
        best = min(other, key=lambda m: (abs(m - micro), m))
        notes[-1] += f", or --micro_batch_size {best}"
    yield Problem(
        "MC602",
        f"global_batch_size {total} is not a multiple of micro_batch_size {micro} x data-parallel "
        f"size {layout.dp}",
        notes,
    )


def _pipeline(config: RunConfig, layout: Layout) -> Iterator[Problem]:
    ways = [
        name
        for name in (
            "num_virtual_stages_per_pipeline_rank",
            "num_layers_per_virtual_pipeline_stage",
            "pipeline_model_parallel_layout",
        )
        if config.get(name) is not None
    ]
    if len(ways) > 1:
        yield Problem(
            "MC603",
            " and ".join(f"--{name}" for name in ways) + " each say how a stage is divided",
            ["fix: keep one of them"],
        )
    text = config.get("pipeline_model_parallel_layout")
    if text is not None:
        try:
            parts = len(expand_layout(text))
        except ValueError as error:
            yield Problem(
                "MC604", f"--pipeline_model_parallel_layout: {error}", ["fix: for example Ett|ttL"]
            )
            return
        if parts % layout.pp:
            yield Problem(
                "MC604",
                f"--pipeline_model_parallel_layout {text!r} has {parts} stages, which "
                f"--pipeline_model_parallel_size {layout.pp} does not divide",
                [f"fix: write {' or '.join(map(str, _near(parts, layout.pp)))} stages"],
            )
    ends = [
        name
        for name in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
        if config.get(name) is not None
    ]
    if layout.pp == 1 and (ways or ends):
        yield Problem(
            "MC603",
            " and ".join(f"--{name}" for name in (ways + ends))
            + " divide the layers of a pipeline, and there is none",
            ["fix: add --pipeline_model_parallel_size 2 or more, or leave them out"],
        )


def _microbatches(config: RunConfig, layout: Layout) -> list[Problem]:
    """Check the number of micro-batches against an interleaved pipeline's schedule."""
    chunked = config.get("num_layers_per_virtual_pipeline_stage") is not None or layout.vpp
    if not chunked or layout.pp == 1:
        return []
    step = config.get("micro_batch_size") * layout.dp
    count = config.get("global_batch_size") // step
    group = config.get("microbatch_group_size_per_virtual_pipeline_stage") or layout.pp
    if group < layout.pp:
        return [
            Problem(
                "MC605",
                f"microbatch_group_size_per_virtual_pipeline_stage {group} is below the pipeline "
                f"size {layout.pp}",
                [f"fix: give {layout.pp} or more, or leave it out"],
            )
        ]
    rest = count % group
    if count >= group and not 0 < rest < layout.pp:
        return []
    fits = [n for n in range(group, count + 2 * group) if not 0 < n % group < layout.pp]
    near = sorted(sorted(fits, key=lambda n: abs(n - count))[:2])
    return [
        Problem(
            "MC605",
            f"an interleaved pipeline of {layout.pp} stages takes micro-batches in groups of "
            f"{group}, and a step has {count}",
            [
                f"global_batch_size {config.get('global_batch_size')} / (micro_batch_size "
                f"{config.get('micro_batch_size')} x data-parallel size {layout.dp}) = {count}",
                f"fix: --global_batch_size {' or '.join(str(n * step) for n in near)}",
            ],
        )
    ]


def check_model(config: RunConfig, architecture: Architecture, layout: Layout) -> list[Problem]:
    """Return what of the model does not fit the layout."""
    dtype = config[PrecisionConfig].dtype(architecture.dtype)
    problems = [*_tensor(architecture, layout), *_layers(config, architecture, layout)]
    problems += check_parts(config, architecture, layout)
    muon = config.get("optimizer")
    if muon in {"muon", "dist_muon"} and dtype == "float16":
        problems.append(
            Problem(
                "MC613",
                f"--optimizer {muon} scales no losses, and this run is in float16",
                ["fix: --bf16, or --optimizer adam"],
            )
        )
    return problems


def _tensor(shape: Architecture, layout: Layout) -> Iterator[Problem]:
    tp = layout.tp
    fix = "fix: --tensor_model_parallel_size " + " or ".join(
        str(n) for n in _divisors(shape.num_attention_heads) if _tensor_fits(shape, n)
    )
    for what, size in (
        ("attention heads", shape.num_attention_heads),
        ("columns in its MLPs", shape.ffn_hidden_size),
    ):
        if size % tp:
            yield Problem(
                "MC611",
                f"the model has {size} {what}, which tensor_model_parallel_size {tp} does not "
                "divide",
                [f"{size} / {tp} = {size / tp:.2f}", fix],
            )
    groups = shape.num_query_groups
    if groups % tp and tp % groups:
        yield Problem(
            "MC611",
            f"the model has {groups} heads of keys and values, neither a multiple nor a divisor of "
            f"tensor_model_parallel_size {tp}",
            [fix],
        )


def _tensor_fits(shape: Architecture, tp: int) -> bool:
    groups = shape.num_query_groups
    whole = shape.num_attention_heads % tp == 0 and shape.ffn_hidden_size % tp == 0
    return whole and (groups % tp == 0 or tp % groups == 0)


def _layers(config: RunConfig, shape: Architecture, layout: Layout) -> Iterator[Problem]:
    each = config.get("num_layers_per_virtual_pipeline_stage")
    if each is not None and shape.num_layers % (layout.pp * each):
        yield Problem(
            "MC612",
            f"{shape.num_layers} layers do not divide over {layout.pp} stages in chunks of {each} "
            "(--num_layers_per_virtual_pipeline_stage)",
            [
                f"{layout.pp} x {each} = {layout.pp * each}, and {shape.num_layers} / "
                f"{layout.pp * each} = {shape.num_layers / (layout.pp * each):.2f}",
                "fix: choose sizes whose product divides the layers",
            ],
        )
        return
    try:
        counts = layers_per_stage(shape.num_layers, split_options(config, layout))
    except ValueError as error:
        yield Problem(
            "MC612",
            f"the model's layers do not fit the pipeline: {error}",
            [
                "fix: change --pipeline_model_parallel_size, or say how to divide them with "
                "--decoder_first_pipeline_num_layers, --decoder_last_pipeline_num_layers or "
                "--pipeline_model_parallel_layout"
            ],
        )
        return
    if min(counts) < 0:
        yield Problem(
            "MC612",
            f"{shape.num_layers} layers are too few for {layout.stages} stages",
            ["fix: lower --pipeline_model_parallel_size"],
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, min(number, _LIMIT) + 1) if number % n == 0]


def _near(number: int, step: int) -> list[int]:
    """Return the multiples of `step` around a number that is none."""
    below = number // step * step
    return [n for n in (below, below + step) if n]


def _ranks(world: int) -> str:
    return "1 rank" if world == 1 else f"{world} ranks"
