"""Every layout of a cluster: which fit, in order of estimated speed, and why the others do not."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mcore_core.config.layout_rules import check_layout, check_model, layout_of, split_options
from mcore_core.errors import UsageError
from mcore_core.parallel.stages import layers_per_stage
from mcore_core.planning.cost import Seconds, step_seconds
from mcore_core.planning.memory import GIB, Memory, largest, memory, row_tokens

if TYPE_CHECKING:
    from mcore_core.config.compose import RunConfig
    from mcore_core.model.architecture import Architecture
    from mcore_core.parallel.topology import Layout

AXES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
"""Options that a plan tries."""
SPLITS = (
    "num_virtual_stages_per_pipeline_rank",
    "num_layers_per_virtual_pipeline_stage",
    "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
)
"""Options that fit one pipeline only; a search leaves them out."""
LONG = 16_384
"""Rows from which on context parallelism is worth trying."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What a run has."""

    gpus: int
    memory: int
    """Bytes of one GPU."""
    per_node: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One layout, and what is known about it."""

    layout: "Layout"
    options: dict[str, Any]
    """What to give for it."""
    ranks: tuple[Memory, ...] = ()
    """Memory of each pipeline rank; empty where the layout is impossible."""
    seconds: Seconds | None = None
    reason: str = ""
    """Why it cannot be used; empty where it fits."""

    @property
    def worst(self) -> Memory:
        """The rank that needs most."""
        return largest(self.ranks)


def judge(
    config: "RunConfig", shape: "Architecture", cluster: Cluster, options: dict[str, Any]
) -> Candidate:
    """Return what is known about the layout of a config."""
    layout = layout_of(config, cluster.gpus, num_layers=shape.num_layers)
    problems = [*check_layout(config, cluster.gpus)]
    if not problems:
        problems = check_model(config, shape, layout)
    if problems:
        return Candidate(layout=layout, options=options, reason=problems[0].message)
    counts = layers_per_stage(shape.num_layers, split_options(config, layout))
    ranks = memory(config, shape, layout, counts, capacity=cluster.memory)
    seconds = step_seconds(config, shape, layout, per_node=cluster.per_node)
    worst = largest(ranks)
    reason = ""
    if worst.total > cluster.memory:
        what, size = max(((n, getattr(worst, n)) for n in PARTS), key=lambda pair: pair[1])
        reason = (
            f"needs {worst.total / GIB:.1f} GiB of {cluster.memory / GIB:.1f}, most of it "
            f"{what} ({size / GIB:.1f} GiB)"
        )
    return Candidate(
        layout=layout, options=options, ranks=tuple(ranks), seconds=seconds, reason=reason
    )


PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "engine",
    "reference",
    "overhead",
)
"""The parts of a rank's memory, in the order in which they are shown."""


def _powers(limit: int) -> Iterator[int]:
    size = 1
    while size <= limit:
        yield size
        size *= 2


def _choices(
    config: "RunConfig", shape: "Architecture", cluster: Cluster
) -> Iterator[dict[str, Any]]:
    contexts = 8 if row_tokens(config, shape) >= LONG else 2
    experts = shape.moe.num_experts if shape.moe and AXES[3] in config.names else 1
    recompute: list[dict[str, Any]] = [{}]
    if not config.is_set("recompute_granularity"):
        recompute.append(
            {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            }
        )
    for tp in _powers(min(cluster.per_node, cluster.gpus)):
        for pp in _powers(min(16, cluster.gpus // tp, shape.num_layers)):
            for cp in _powers(min(contexts, cluster.gpus // (tp * pp))):
                for ep in _powers(min(experts, cluster.gpus // pp)):
                    for etp in {1, tp} if ep * tp <= cluster.gpus // pp and experts > 1 else {1}:
                        for more in recompute:
                            sizes = dict(zip(AXES, (tp, pp, cp, ep, etp), strict=True))
                            yield {**sizes, "sequence_parallel": tp > 1, **more}


def search(config: "RunConfig", shape: "Architecture", cluster: Cluster) -> list[Candidate]:
    """Return every layout, those that fit first, the fastest of them first."""
    base = config.replace(**{n: None for n in SPLITS if config.changed(n)})
    found = []
    for options in _choices(base, shape, cluster):
        given = {n: v for n, v in options.items() if n in base.names}
        try:
            changed = base.replace(**given)
        except UsageError as error:
            reason = error.problems[0].message
            layout = layout_of(base, cluster.gpus)
            found.append(Candidate(layout=layout, options=given, reason=reason))
            continue
        found.append(judge(changed, shape, cluster, given))

    def order(candidate: Candidate) -> tuple[int, float]:
        if not candidate.reason:
            assert candidate.seconds is not None
            return 0, candidate.seconds.total
        return (1, candidate.worst.total) if candidate.ranks else (2, 0.0)

    return sorted(found, key=order)
