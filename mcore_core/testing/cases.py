"""Run a recipe in a layout on forked CPU ranks: losses, reassembled gradients, weights.

A `Case` says what is trained; `run_case(case, layout)` trains it and `assert_same` compares two
layouts. Call `mcore_core.compat.apply()` before this module is imported: it imports megatron.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.core import parallel_state
from torch import Tensor

from mcore_core.checkpoint.state import Trainable, gather_weights
from mcore_core.config.distributed import DistributedConfig
from mcore_core.config.kernel import kernel_config
from mcore_core.config.train import TrainConfig
from mcore_core.manager import PluginManager
from mcore_core.model.build import DTYPES, ModelPlan
from mcore_core.model.family import Family
from mcore_core.model.hf_head import with_head
from mcore_core.model.moe.find import find_dispatcher
from mcore_core.model.tables import dense_decoder
from mcore_core.model.tables_moe import QWEN_MOE, moe_decoder, stacked
from mcore_core.parallel import state
from mcore_core.parallel.stages import SplitOptions, layers_per_stage
from mcore_core.parallel.topology import Layout
from mcore_core.platform import install
from mcore_core.protocols import FrozenModel, HeadSpec, TunerContext
from mcore_core.rollout import EngineContext
from mcore_core.testing.compare import assert_same as assert_same
from mcore_core.testing.parity import Part, assemble, fill, parts
from mcore_core.testing.ranks import fork_ranks
from mcore_core.train.build import build_model, wrap
from mcore_core.train.frozen import freeze
from mcore_core.train.guide import Guide
from mcore_core.train.optimizer import build_optimizer, build_schedule
from mcore_core.train.scoring import ScoredModel
from mcore_core.train.services import FrozenGenerators, RunServices
from mcore_core.train.step import Stepper
from mcore_core.train.stepping import Models, StepView, flat, regroup
from mcore_core.train.tuning import build_tuner

if TYPE_CHECKING:
    from mcore_core.config.compose import RunConfig
    from mcore_core.config.group import ConfigGroup
    from mcore_core.model.architecture import Architecture
    from mcore_core.model.family import Rule
    from mcore_core.protocols import Recipe, RolloutEngine, StepResult, Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, a recipe, its options and its data, whatever the layout."""

    architecture: "Architecture"
    recipe: "Callable[[RunConfig], Recipe[Any]]"
    """Builds the recipe from the resolved options; it need not encode."""
    steps: "Sequence[Sequence[list[Unit]]]"
    """Units of each micro-batch of each global batch. Data-parallel rank r of n takes every n-th
    micro-batch from r on, so their number is a multiple of n (and of pp, with virtual stages)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    groups: "tuple[type[ConfigGroup], ...]" = ()
    """Option groups of the recipe's plugin."""
    frozen: "Mapping[str, Architecture]" = field(default_factory=dict)
    """Shapes of frozen models that are not the policy's."""
    engine: "Callable[[EngineContext], RolloutEngine] | None" = None
    """Builds what generates, for recipes that do."""
    dtype: str = "float32"
    transformer_engine: bool = False
    """Build of Transformer Engine's layers; needs a CUDA device."""
    dispatcher: Any = None
    """The class that takes tokens to experts; None: as the options say."""
    rules: "Callable[[Architecture], Sequence[Rule]] | None" = None
    """The family's table, for tuners; None: llama's, or qwen_moe's stacked one with experts."""


@dataclass(frozen=True, slots=True)
class RankRun:
    """What one rank saw."""

    results: "list[StepResult]"
    gradients: list[list[Part]]
    weights: list[Part]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run gave, put together from all ranks."""

    results: "list[StepResult]"
    gradients: list[dict[str, Tensor]]
    """Of each step, before clipping, by sharded key; empty where they were not asked for."""
    weights: dict[str, Tensor]
    """After the last step, by sharded key."""

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [r.loss for r in self.results]


class Session:
    """One rank of a run: model, optimizer and stepper. Joins megatron's groups."""

    def __init__(self, case: Case, layout: Layout, *, seed: int = 42) -> None:
        self.case, self.layout = case, layout
        platform = install()
        if parallel_state.model_parallel_is_initialized():  # by an earlier case of `run_cases`
            state.seed_everything(seed)
        else:
            state.initialize(platform, layout, seed=seed)
        self.config = config_of(case, layout)
        recipe = case.recipe(self.config)
        self.plan = _plan(case, case.architecture, layout, self.config, recipe.head)
        on_cpu = platform.name == "cpu"
        chunks = build_model(self.plan, self.config, on_cpu=on_cpu)
        self.tuner = build_tuner(_installed().catalogue("mcore_tuners"), self._context())
        self.tuner.apply(chunks)
        fill(chunks)
        self.tuner.load(chunks)
        self.chunks = wrap(chunks, self.config)
        self.optimizer = build_optimizer(self.config, self.chunks, self.plan.dtype, on_cpu=on_cpu)
        self.schedule = build_schedule(self.config, self.optimizer, len(case.steps))
        self.stepper = Stepper(
            self.chunks,
            recipe,
            self.plan,
            platform.device(),
            optimizer=self.optimizer,
            schedule=self.schedule,
        )
        self.models = Models(
            ScoredModel(chunks=self.chunks, plan=self.plan),
            recipe,
            platform.device(),
            micro_batch_size=self.config[TrainConfig].micro_batch_size,
            frozen={
                name: self._frozen(name, scale, on_cpu=on_cpu)
                for scale, name in enumerate(recipe.frozen, start=1)
                if not (self.tuner.partial and recipe.frozen[name] == FrozenModel())
            },
            adapters_off=(
                partial(self.tuner.disabled, self.chunks) if self.tuner.partial else None
            ),
        )
        if recipe.head.divergence is not None:
            teacher = self.models.frozen[recipe.head.divergence.model]
            self.stepper.guide = Guide(teacher, recipe, self.plan)
        self.gradients: list[list[Part]] = []
        self.results: list[StepResult] = []
        self.services = self._services(recipe)
        self.step = 0

    def _services(self, recipe: "Recipe[Any]") -> RunServices:
        train = self.config[TrainConfig]
        samples = train.micro_batch_size * self.layout.dp
        context = EngineContext(
            config=self.config,
            chunks=self.chunks,
            plan=self.plan,
            device=self.stepper.device,
            tokenizer=None,
            bridge=None,  # type: ignore[arg-type]  # no files here
            model_path=Path(),
            tuner=self.tuner,
            optimizer=self.optimizer,
        )
        build = self.case.engine
        return RunServices(
            micro_batches=train.global_batch_size // samples,
            draws=(flat(micros) for micros in self.case.steps),
            engine=None if build is None else build(context),
            generators=None
            if build is None
            else FrozenGenerators(self.models.frozen, build, context),
            policy=self.chunks,
            frozen={name: model.chunks for name, model in self.models.frozen.items()},
        )

    def _frozen(self, name: str, number: int, *, on_cpu: bool) -> ScoredModel:
        """Return a model that differs from the policy: its weights are a little smaller."""
        shape = self.case.frozen.get(name, self.case.architecture)
        plan = _plan(self.case, shape, self.layout, self.config, HeadSpec())
        chunks = build_model(plan, self.config, on_cpu=on_cpu)
        fill(chunks, scale=0.08 * 0.9**number)
        return freeze(chunks, plan)

    @property
    def trainable(self) -> Trainable:
        """What checkpoints are made of."""
        return Trainable(self.chunks, self.optimizer, self.layout, self.tuner.partial)

    def _context(self) -> TunerContext:
        architecture = self.plan.architecture
        return TunerContext(
            config=self.config,
            family=Family(
                name="test",
                architectures=(),
                architecture=lambda _: architecture,
                rules=self.case.rules or default_rules,
            ),
            architecture=architecture,
        )

    def keep_gradients(self) -> None:
        """Keep each step's reduced gradients; they are reduced whole, not by shard."""
        config = self.stepper.config
        finalize = config.finalize_model_grads_func

        def wrapped(model: Any, num_tokens: Any = None, **kwargs: Any) -> None:  # noqa: ANN401
            finalize(model, num_tokens, **{**kwargs, "force_all_reduce": True})
            self.gradients.append(parts(self.chunks, gradients=True))

        config.finalize_model_grads_func = wrapped

    def micros(self, step: int) -> "list[list[Unit]]":
        """Return this data-parallel rank's micro-batches of a step, counted from 0.

        Where the recipe generates in rounds it is all prompts of one.
        """
        if getattr(self.stepper.recipe, "rounds", None) is not None:
            return list(self.case.steps[step])
        first = parallel_state.get_data_parallel_rank()
        return list(self.case.steps[step][first :: self.layout.dp])

    def train(self, steps: int) -> "list[StepResult]":
        """Take the steps of the next global batches: as many as the recipe makes of each."""
        results = []
        for _ in range(steps):
            micros = self.micros(self.step)
            view = StepView(self.models, len(self.results) + 1, services=self.services)
            for prepared in self.stepper.recipe.prepare(flat(micros), view):
                result = self.stepper.train(regroup(prepared, micros), view.step)
                logged = self.services.take_logged()
                logged = {k: v for k, v in logged.items() if not k.startswith("timers/")}
                result = replace(result, metrics={**result.metrics, **logged})
                results.append(result)
                self.results.append(result)
                view.step = len(self.results) + 1
            self.step += 1
        return results

    def weights(self) -> list[Part]:
        """Return this rank's parts of the weights; collective."""
        gather_weights(self.chunks)
        return parts(self.chunks)


def default_rules(architecture: "Architecture") -> "Sequence[Rule]":
    """Return the table of a llama-like decoder, with stacked experts where it has some."""
    if architecture.moe is not None:
        return moe_decoder(architecture, stacked(QWEN_MOE))
    return dense_decoder(architecture)


def _plan(
    case: Case,
    architecture: "Architecture",
    layout: Layout,
    config: "RunConfig",
    head: HeadSpec,
) -> ModelPlan:
    options = config[DistributedConfig]
    split = SplitOptions(
        pipeline_model_parallel_size=layout.pp,
        virtual=layout.vpp,
        decoder_first_pipeline_num_layers=options.decoder_first_pipeline_num_layers,
        decoder_last_pipeline_num_layers=options.decoder_last_pipeline_num_layers,
        pipeline_model_parallel_layout=options.pipeline_model_parallel_layout,
    )
    shapes = (case.architecture, *case.frozen.values())
    return ModelPlan(
        architecture=with_head(architecture, head, {}),
        layout=layout,
        stage_layers=layers_per_stage(architecture.num_layers, split),
        padded_vocab=-(-max(s.vocab_size for s in shapes) // layout.tp) * layout.tp,
        dtype=DTYPES[case.dtype],
        transformer_engine=case.transformer_engine,
        dispatcher=case.dispatcher or _dispatcher(config),
    )


def _dispatcher(config: "RunConfig") -> Any:  # noqa: ANN401
    """Return the dispatcher that the options name, of an installed plugin."""
    return find_dispatcher(config, _installed().catalogue("mcore_dispatchers"))


@cache
def _installed() -> PluginManager:
    manager = PluginManager()
    manager.load_installed()
    return manager


def config_of(case: Case, layout: Layout) -> "RunConfig":
    """Return the options of a case in a layout."""
    return kernel_config(*case.groups, **{"sequence_parallel": layout.sp, **case.options})


def run_case(
    case: Case, layout: Layout, *, gradients: bool = True, timeout: float = 120
) -> Outcome:
    """Train all steps of a case on forked ranks.

    Args:
        case: What to train.
        layout: `layout.world` ranks are forked.
        gradients: Keep the gradients; the distributed optimizer then gets them reduced whole.
        timeout: Seconds before the ranks are killed.

    Returns:
        Results of rank 0, which every rank must share, and reassembled gradients and weights.

    Raises:
        AssertionError: Ranks report different results, or replicas differ.
    """
    return run_cases([case], layout, gradients=gradients, timeout=timeout)[0]


def run_cases(
    cases: Sequence[Case], layout: Layout, *, gradients: bool = True, timeout: float = 120
) -> list[Outcome]:
    """Train several cases, one after the other, on the same forked ranks: see `run_case`."""
    _installed()  # what every rank needs alike is computed before they are forked
    for case in cases:
        config_of(case, layout)

    def one_rank(_: int) -> list[RankRun]:
        return [_trained(case, layout, gradients=gradients) for case in cases]

    runs = fork_ranks(one_rank, layout.world, timeout=timeout)
    return [combine(ranks) for ranks in zip(*runs, strict=True)]


def _trained(case: Case, layout: Layout, *, gradients: bool) -> RankRun:
    session = Session(case, layout)
    if gradients:
        session.keep_gradients()
    results = session.train(len(case.steps))
    run = RankRun(results, session.gradients, session.weights())
    del session
    gc.collect()
    return run


def combine(ranks: Sequence[RankRun]) -> Outcome:
    """Put the runs of all ranks together."""
    first = ranks[0]
    for rank, run in enumerate(ranks):
        assert _numbers(run.results) == _numbers(first.results), (
            f"rank {rank} reports {_numbers(run.results)}, rank 0 {_numbers(first.results)}"
        )
    gradients = [assemble([r.gradients[i] for r in ranks]) for i in range(len(first.gradients))]
    return Outcome(first.results, gradients, assemble([r.weights for r in ranks]))


def _numbers(results: "Sequence[StepResult]") -> list[Any]:
    return [(r.loss, r.grad_norm, r.lr, r.tokens, sorted(r.metrics.items())) for r in results]
