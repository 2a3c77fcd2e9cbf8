"""What recipes that generate may ask of the kernel, beside scores."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mcore_core.model.names import unwrap

if TYPE_CHECKING:
    from mcore_core.component import Catalogue
    from mcore_core.protocols import Recipe, Unit
    from mcore_core.report.hub import RunReports
    from mcore_core.rollout import EngineContext, RolloutEngine


@dataclass(slots=True)
class RunServices:
    """The parts of a run that `StepView` hands through, on this rank."""

    micro_batches: int = 1
    draws: "Iterator[list[Unit]] | None" = None
    """The prompts of the following rounds."""
    engine: "RolloutEngine | None" = None
    reports: "RunReports | None" = None
    policy: Sequence[Any] = ()
    frozen: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Model chunks by name."""
    logged: dict[str, float] = field(default_factory=dict)
    """What `log` was given since it was last taken."""

    def take_logged(self) -> dict[str, float]:
        """Return what was logged, once."""
        logged, self.logged = self.logged, {}
        return logged


def build_engine(
    recipe: "Recipe[Any]", catalogue: "Catalogue[Any]", context: "EngineContext"
) -> "RolloutEngine | None":
    """Return the engine that the recipe's attribute `engine` names, if it has one; collective.

    Raises:
        UsageError: There is no such engine, or what it needs is missing.
    """
    name = getattr(recipe, "engine", None)
    if name is None:
        return None
    engine: RolloutEngine = catalogue.find(name, "--rollout_engine").load()(context)
    return engine


def once[T](make: Callable[[], T]) -> T:
    """Call on one of the ranks that share a data-parallel rank; return or raise on all of them."""
    model, context = (
        parallel_state.get_model_parallel_group(),
        parallel_state.get_context_parallel_group(),
    )
    if model.size() == context.size() == 1:
        return make()
    box: list[Any] = [None]
    if model.rank() == 0 and context.rank() == 0:
        try:
            box = [(make(), None)]
        except Exception as error:
            box = [(None, error)]
    if model.rank() == 0:
        _broadcast(box, context)
    _broadcast(box, model)
    result, raised = box[0]
    if raised is not None:
        raise raised
    found: T = result
    return found


def _broadcast(box: list[Any], group: Any) -> None:  # noqa: ANN401
    if group.size() > 1:
        dist.broadcast_object_list(box, src=dist.get_process_group_ranks(group)[0], group=group)


@torch.no_grad()
def blend(target: Sequence[Any], source: Sequence[Any], alpha: float) -> None:
    """Set each weight of `target` to (1 - alpha) of itself plus alpha of `source`'s."""
    for mine, other in zip(target, source, strict=True):
        theirs = dict(unwrap(other).named_parameters())
        for name, weight in unwrap(mine).named_parameters():
            weight.lerp_(theirs[name].to(weight.dtype), alpha)
