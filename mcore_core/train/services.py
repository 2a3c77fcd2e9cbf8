"""What recipes that generate may ask of the kernel, beside scores."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mcore_core.config.train import TrainConfig
from mcore_core.model.names import unwrap

if TYPE_CHECKING:
    from mcore_core.component import Catalogue
    from mcore_core.protocols import Recipe, Unit
    from mcore_core.report.hub import RunReports
    from mcore_core.rollout import EngineContext, RolloutEngine
    from mcore_core.train.scoring import ScoredModel


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
    generators: "FrozenGenerators | None" = None
    """Engines of frozen models."""
    logged: dict[str, float] = field(default_factory=dict)
    """What `log` was given since it was last taken."""

    def take_logged(self) -> dict[str, float]:
        """Return what was logged, once."""
        logged, self.logged = self.logged, {}
        return logged


class FrozenGenerators:
    """Engines that generate with frozen models, each built when it is first asked for.

    Args:
        models: The frozen models.
        build: Builds an engine.
        context: The policy's: the chunks and the plan in it are replaced.
    """

    def __init__(
        self,
        models: "Mapping[str, ScoredModel]",
        build: "Callable[[EngineContext], RolloutEngine]",
        context: "EngineContext",
    ) -> None:
        self._models, self._build, self._context = models, build, context
        self._engines: dict[str, RolloutEngine] = {}

    @contextmanager
    def __call__(self, name: str) -> "Iterator[RolloutEngine]":
        """Have a model's weights on the device, and its engine awake, for a while; collective."""
        model = self._models[name]
        with model.resident():
            if name not in self._engines:
                context = replace(
                    self._context, chunks=model.chunks, plan=model.plan, tuner=None, optimizer=None
                )
                self._engines[name] = self._build(context)
            engine = self._engines[name]
            engine.wake()
            yield engine
            engine.sleep()


def build_services(
    recipe: "Recipe[Any]",
    catalogue: "Catalogue[Any]",
    context: "EngineContext",
    *,
    frozen: "Mapping[str, ScoredModel]",
    reports: "RunReports",
) -> RunServices:
    """Return the services of a run, with the engine that the recipe names; collective.

    Raises:
        UsageError: There is no such engine, or what it needs is missing.
    """
    name, train = getattr(recipe, "engine", None), context.config[TrainConfig]

    def build(name: str, context: "EngineContext") -> "RolloutEngine":
        engine: RolloutEngine = catalogue.find(name, "--rollout_engine").load()(context)
        return engine

    samples = train.micro_batch_size * parallel_state.get_data_parallel_world_size()
    return RunServices(
        micro_batches=train.global_batch_size // samples,
        engine=None if name is None else build(name, context),
        generators=FrozenGenerators(frozen, partial(build, "native"), context),
        reports=reports,
        policy=context.chunks,
        frozen={name: model.chunks for name, model in frozen.items()},
    )


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
    """Set each weight of `target` to (1 - alpha) of itself plus alpha of `source`'s.

    The bias by which routers balance experts goes along, though it is a buffer.
    """
    for mine, other in zip(target, source, strict=True):
        theirs = dict(_weights(other))
        for name, weight in _weights(mine):
            weight.lerp_(theirs[name].to(weight.dtype), alpha)


def _weights(chunk: Any) -> Iterator[tuple[str, Tensor]]:  # noqa: ANN401
    module = unwrap(chunk)
    yield from module.named_parameters()
    yield from ((n, b) for n, b in module.named_buffers() if n.endswith(".expert_bias"))
