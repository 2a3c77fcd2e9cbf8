"""A plan as text and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mcore_core.config.decode import as_typed
from mcore_core.planning.memory import GIB, Memory, holds_reference, row_tokens
from mcore_core.planning.search import PARTS, Candidate, Cluster
from mcore_core.planning.state import Training
from mcore_core.planning.weights import model_parameters
from mcore_core.report.format import short_count

if TYPE_CHECKING:
    from mcore_core.config.compose import RunConfig
    from mcore_core.model.architecture import Architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `mcore plan` found."""

    model: str
    family: str
    shape: "Architecture"
    config: "RunConfig"
    cluster: Cluster
    given: Candidate | None
    """The layout that the options name; None where they name none."""
    candidates: Sequence[Candidate]

    @property
    def fitting(self) -> list[Candidate]:
        """Those that fit, the fastest first."""
        return [c for c in self.candidates if not c.reason]


def name_of(candidate: Candidate) -> str:
    """Return a layout in a few letters, with what it recomputes."""
    text = str(candidate.layout)
    if candidate.layout.etp > 1:
        text += f"+etp{candidate.layout.etp}"
    if candidate.options.get("recompute_granularity") == "full":
        text += ", full recompute"
    return text


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= GIB else f"{size / GIB:.2g}"


def _memory(rank: Memory, cluster: Cluster) -> str:
    parts = [f"{n} {_gib(getattr(rank, n))}" for n in PARTS if getattr(rank, n)]
    text = f"{_gib(rank.total)} GiB of {_gib(cluster.memory)}: " + ", ".join(parts)
    return text + (f"; {_gib(rank.host)} in host memory" if rank.host else "")


def command_of(candidate: Candidate) -> str:
    """Return the options of a layout, those that are their defaults left out."""
    return " ".join(
        f"--{name} {as_typed(value)}"
        for name, value in candidate.options.items()
        if value not in (1, False)
    )


def as_text(plan: Plan, *, top: int) -> str:
    """Return the plan for people."""
    total, active = model_parameters(plan.shape)
    training = Training.of(plan.config, plan.shape)
    size = {2: "16 bits", 4: "32 bits"}[training.size]
    used = f", {short_count(active)} of them for each token" if active != total else ""
    state = f"{training.optimizer}{', state divided over data-parallel ranks' * training.sharded}"
    lora = f", LoRA of rank {training.rank}" if training.rank is not None else ""
    tokens = row_tokens(plan.config, plan.shape)
    beside = ", a frozen model beside it" * holds_reference(plan.config, training)
    lines = [
        f"model    {plan.model} ({plan.family}): {short_count(total)} parameters{used}",
        f"run      {size}, {state}{lora}{beside}; {tokens:,} tokens a micro-batch, global batch "
        f"{plan.config.get('global_batch_size')}",
        f"cluster  {plan.cluster.gpus} GPUs of {_gib(plan.cluster.memory)} GiB, "
        f"{plan.cluster.per_node} a machine",
        "",
    ]
    if plan.given is not None:
        lines += [*_given(plan.given, plan.cluster), ""]
    if plan.candidates:
        lines += _ranking(plan, top)
    return "\n".join(lines) + "\n"


def _given(given: Candidate, cluster: Cluster) -> list[str]:
    head = f"this layout: {name_of(given)}"
    if not given.ranks:
        return [f"{head}: impossible: {given.reason}"]
    lines = [head + (": does not fit" if given.reason else "")]
    for rank in given.ranks:
        where = f"pipeline rank {rank.rank}" if len(given.ranks) > 1 else "each rank"
        lines.append(
            f"  {where}: {short_count(rank.parameters)} parameters, {_memory(rank, cluster)}"
        )
    return lines


def _ranking(plan: Plan, top: int) -> list[str]:
    fitting = plan.fitting
    lines = [
        f"{len(fitting)} of {len(plan.candidates)} layouts fit; the fastest by estimate"
        if fitting
        else f"none of {len(plan.candidates)} layouts fits"
    ]
    if fitting:
        best = fitting[0].seconds
        assert best is not None
        wide = max(len(name_of(c)) for c in fitting[:top])
        lines.append(
            f"  {'layout':{wide}}  step     GiB  weights  gradients  optimizer  activations  logits"
        )
        for candidate in fitting[:top]:
            assert candidate.seconds is not None
            worst = candidate.worst
            lines.append(
                f"  {name_of(candidate):{wide}}  x{candidate.seconds.total / best.total:<4.2f} "
                f"{_gib(worst.total):>7}  {_gib(worst.weights):>7}  {_gib(worst.gradients):>9}  "
                f"{_gib(worst.optimizer):>9}  {_gib(worst.activations):>11}  "
                f"{_gib(worst.logits):>6}"
            )
        lines.append(f"  the first: {command_of(fitting[0])}".rstrip(": "))
    reasons: dict[str, list[str]] = {}
    for candidate in plan.candidates:
        if candidate.reason:
            reasons.setdefault(candidate.reason, []).append(name_of(candidate))
    if reasons:
        lines += ["", "those that cannot be used"]
        for reason, names in list(reasons.items())[:top]:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"  {names[0]}{more}: {reason}")
        if len(reasons) > top:
            lines.append(f"  {len(reasons) - top} more reasons: --json or --top {len(reasons)}")
    return lines


def _candidate(candidate: Candidate) -> dict[str, Any]:
    seconds = candidate.seconds
    return {
        "layout": name_of(candidate),
        "options": candidate.options,
        "fits": not candidate.reason,
        "reason": candidate.reason or None,
        "seconds": None if seconds is None else {**asdict(seconds), "total": seconds.total},
        "ranks": [{**asdict(rank), "total": rank.total} for rank in candidate.ranks],
    }


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON types; sizes in bytes."""
    total, active = model_parameters(plan.shape)
    return {
        "model": plan.model,
        "family": plan.family,
        "parameters": total,
        "active_parameters": active,
        "tokens_per_micro_batch": row_tokens(plan.config, plan.shape),
        "cluster": asdict(plan.cluster),
        "given": None if plan.given is None else _candidate(plan.given),
        "layouts": [_candidate(c) for c in plan.candidates],
    }
