"""What `Recipe.prepare` is given: the models that score, and the other data-parallel ranks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mcore_core.checkpoint.state import gather_weights
from mcore_core.protocols import Split
from mcore_core.train import services
from mcore_core.train.scoring import ScoredModel, Scorer
from mcore_core.train.services import RunServices

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mcore_core.protocols import Recipe, RolloutEngine, Unit

POLICY = "policy"


class Models:
    """The policy and the frozen models of a run, by name."""

    def __init__(
        self,
        policy: ScoredModel,
        recipe: "Recipe[Any]",
        device: torch.device,
        *,
        micro_batch_size: int,
        frozen: Mapping[str, ScoredModel] | None = None,
        adapters_off: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        """Keep the models. A name of the recipe that `frozen` lacks is the policy, adapters off."""
        self.frozen = dict(frozen or {})
        self._scorers = {
            name: Scorer(model, recipe, device, micro_batch_size=micro_batch_size)
            for name, model in {POLICY: policy, **self.frozen}.items()
        }
        self._names = frozenset(recipe.frozen)
        self._adapters_off = adapters_off

    def score(
        self, name: str, units: "list[Unit]", *, entropy: bool = False
    ) -> "list[tuple[NDArray[np.float32], NDArray[np.float32]]]":
        """Return log-probabilities and entropies under a model; collective.

        Raises:
            KeyError: The recipe did not ask for a model of this name.
        """
        with self._chosen(name) as scorer:
            return scorer.score(units, entropy=entropy)

    def score_with_routing(
        self, name: str, units: "list[Unit]"
    ) -> "list[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int16]]]":
        """Return log-probabilities, entropies and the experts of each token; collective."""
        with self._chosen(name) as scorer:
            return scorer.score_with_routing(units)

    @contextmanager
    def _chosen(self, name: str) -> Iterator[Scorer]:
        off: AbstractContextManager[None]
        if name in self._scorers:
            scorer, off = self._scorers[name], nullcontext()
        elif name in self._names and self._adapters_off is not None:
            scorer, off = self._scorers[POLICY], self._adapters_off()
        else:
            raise KeyError(f"no model {name!r}: there are {', '.join(self._scorers)}")
        with off:
            yield scorer


@dataclass(slots=True)
class StepView:
    """Implements protocols.StepRun."""

    models: Models
    step: int
    training: bool = True
    services: RunServices = field(default_factory=RunServices)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step on each data-parallel rank."""
        return self.services.micro_batches

    @property
    def engine(self) -> "RolloutEngine":
        """The engine that generates."""
        assert self.services.engine is not None, "the recipe names no engine"
        return self.services.engine

    def generating(self, model: str) -> "AbstractContextManager[RolloutEngine]":
        """Have an engine that generates with a frozen model, for a while; collective."""
        assert self.services.generators is not None, "there are no frozen models"
        return self.services.generators(model)

    def draw(self) -> "list[Unit]":
        """Return the prompts of the next round."""
        assert self.services.draws is not None, "an evaluation cannot draw training data"
        return next(self.services.draws)

    def once[T](self, make: Callable[[], T], /) -> T:
        """Call a function on one of the ranks that share this data-parallel rank."""
        return services.once(make)

    def blend(self, model: str, alpha: float) -> None:
        """Move a frozen model's weights towards the policy's."""
        gather_weights(self.services.policy)
        services.blend(self.services.frozen[model], self.services.policy, alpha)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Report numbers with the step that is prepared."""
        self.services.logged |= metrics

    def show(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Report completions."""
        if self.services.reports is not None:
            self.services.reports.completions(self.step, rows)

    def warn(self, key: str, text: str) -> None:
        """Warn, once for each key."""
        if self.services.reports is not None:
            self.services.reports.warn_once(key, text)

    @property
    def dp(self) -> tuple[int, int]:
        """This data-parallel rank and how many there are."""
        return (
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
        )

    def gather(self, value: Any, /) -> list[Any]:  # noqa: ANN401
        """Return the value of each data-parallel rank, in order; collective."""
        _, size = self.dp
        if size == 1:
            return [value]
        values: list[Any] = [None] * size
        dist.all_gather_object(values, value, group=parallel_state.get_data_parallel_group())
        return values

    def score(self, model: str, units: "list[Unit]") -> "list[NDArray[np.float32]]":
        """Return log-probabilities, [L] of each unit; collective."""
        return [logps for logps, _ in self.models.score(model, units)]

    def score_with_entropy(
        self, model: str, units: "list[Unit]"
    ) -> "list[tuple[NDArray[np.float32], NDArray[np.float32]]]":
        """Return log-probabilities and entropies, [L] of each unit; collective."""
        return self.models.score(model, units, entropy=True)

    def score_with_routing(
        self, model: str, units: "list[Unit]"
    ) -> "list[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int16]]]":
        """Return log-probabilities, entropies and the experts of each token; collective."""
        return self.models.score_with_routing(model, units)


def flat(micros: Sequence[list["Unit"]]) -> list["Unit"]:
    """Return the units of all micro-batches, in order."""
    return [unit for micro in micros for unit in micro]


def regroup(
    prepared: "list[Unit] | Split", micros: Sequence[list["Unit"]]
) -> Sequence[list["Unit"]]:
    """Divide prepared units into micro-batches as they came; evenly where a recipe changed them."""
    if isinstance(prepared, Split):
        return prepared.micros
    units = prepared
    if len(units) == sum(map(len, micros)):
        iterator = iter(units)
        return [[next(iterator) for _ in micro] for micro in micros]
    number = len(micros)
    bounds = [i * len(units) // number for i in range(number + 1)]
    return [units[a:b] for a, b in pairwise(bounds)]
