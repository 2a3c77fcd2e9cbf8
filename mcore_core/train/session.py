"""Set a run up, piece by piece, in the order in which a user's mistakes are cheapest to find."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mcore_core.checkpoint import folders as checkpoints
from mcore_core.checkpoint.load import load
from mcore_core.checkpoint.save import Saver
from mcore_core.checkpoint.state import Trainable
from mcore_core.config.checkpoint import CheckpointConfig
from mcore_core.config.dataloader import DataLoaderConfig
from mcore_core.config.logging import LoggingConfig
from mcore_core.config.template import TemplateConfig
from mcore_core.config.train import TrainConfig
from mcore_core.config.weights import WeightsConfig
from mcore_core.context import RunContext
from mcore_core.data.pipeline import DataBundle, build_data
from mcore_core.data.template import Template
from mcore_core.errors import Problem, UsageError, usage_error
from mcore_core.installed import packages
from mcore_core.model.moe.find import find_dispatcher
from mcore_core.protocols import TunerContext
from mcore_core.report.hub import RunReports, build_reporters
from mcore_core.report.record import ModelFacts
from mcore_core.rollout import EngineContext
from mcore_core.train import folders
from mcore_core.train.build import build_model, longest, model_plan, wrap
from mcore_core.train.facts import count_parameters, data_facts, environment
from mcore_core.train.frozen import build_frozen, check_movable, largest_vocabulary
from mcore_core.train.grow import check_new_rows, load_weights
from mcore_core.train.guide import Guide
from mcore_core.train.optimizer import (
    build_optimizer,
    build_schedule,
    uses_distributed_optimizer,
)
from mcore_core.train.plan import ModelSource
from mcore_core.train.scoring import ScoredModel
from mcore_core.train.services import RunServices, build_services
from mcore_core.train.step import Stepper
from mcore_core.train.stepping import Models
from mcore_core.train.tokenizer import load_tokenizer, with_new_tokens
from mcore_core.train.tuning import build_tuner, check_same_tuner

if TYPE_CHECKING:
    from mcore_core.cli.prepared import Prepared, PreparedExport
    from mcore_core.component import Component
    from mcore_core.config.compose import RunConfig
    from mcore_core.data.prepare import DataPlan
    from mcore_core.platform.base import Platform
    from mcore_core.protocols import Bridge, Recipe, Rounds, Tuner


@dataclass(slots=True)
class Session:
    """Everything a training loop works with, on this rank."""

    run: RunContext
    source: ModelSource
    recipe: "Recipe[Any]"
    template: Template
    data: DataBundle
    stepper: Stepper
    models: Models
    services: RunServices
    bridge: "Bridge"
    saver: Saver
    reports: RunReports
    hooks: Any
    facts: ModelFacts
    tuner: "Tuner"

    @property
    def trainable(self) -> Trainable:
        """What checkpoints are made of."""
        stepper, partial = self.stepper, self.tuner.partial
        moved = moving(self.recipe, self.models.frozen)
        return Trainable(stepper.chunks, stepper.optimizer, self.run.layout, partial, moved)


def moving(recipe: "Recipe[Any]", frozen: "Mapping[str, ScoredModel]") -> dict[str, Any]:
    """Return the chunks of the models beside the policy that the recipe moves, by name."""
    return {name: frozen[name].chunks for name, m in recipe.frozen.items() if m.moves}


def open_session(prepared: "Prepared", source: ModelSource, platform: "Platform") -> Session:
    """Build everything; collective. Process groups exist already.

    Raises:
        UsageError: What the user has to change.
    """
    config, known = prepared.config, packages()
    run = RunContext(
        config=config,
        output_dir=folders.choose(config),
        layout=source.layout,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        plugins={n: _distribution(p, known.get(n)) for n, p in prepared.plugins.items()},
        environment=environment(platform),
    )
    build_recipe: Any = prepared.recipe.load()
    tokenizer = load_tokenizer(source.path)
    source = with_new_tokens(source, config, tokenizer)
    limit = source.architecture.max_position_embeddings
    template = Template(
        tokenizer,
        config[TemplateConfig],
        max_length=limit,
        splits=getattr(build_recipe, "splits", False),
    )
    recipe: Recipe[Any] = build_recipe(config, template)
    if prepared.losses:
        recipe.use_losses(prepared.losses)  # type: ignore[attr-defined]  # of recipes with losses
    source = source.with_head(recipe.head)
    resume = _resume_from(config, source)
    data = build_data(
        config,
        recipe,
        template,
        loaders={c.name: c for _, c in prepared.manager.catalogue("mcore_datasets")},
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        on_writer=on_writer,
        progress=run.is_main,
    )
    run.data = data_facts(data)
    run.steps_per_epoch = steps_per_epoch(data, recipe)
    run.train_iters = _train_iters(config, run.steps_per_epoch)
    on_cpu = platform.name == "cpu"
    plan = model_plan(
        source,
        config,
        platform,
        max_length=longest(template.max_length, recipe, limit),
        dispatcher=find_dispatcher(config, prepared.manager.catalogue("mcore_dispatchers")),
        least_vocab=largest_vocabulary(recipe.frozen, source, config, prepared.manager),
    )
    bridge = bridge_of(prepared)(source.family, source.architecture)
    tuner = build_tuner(
        prepared.manager.catalogue("mcore_tuners"),
        TunerContext(
            config=config,
            family=source.family,
            architecture=source.architecture,
            bridge=bridge,
        ),
    )
    reads = tuner.partial or _takes_safetensors(config, resume)
    filled = reads or resume is not None
    bare = build_model(
        plan,
        config,
        on_cpu=on_cpu,
        initialize=not (filled and config[CheckpointConfig].no_initialization),
    )
    tuner.apply(bare)
    check_new_rows(bare, source, platform.device())
    if reads:
        load_weights(bare, source, bridge_of(prepared))
    tuner.load(bare)
    chunks = wrap(bare, config)
    optimizer = prepared.manager.hook.mcore_build_optimizer(run=run, chunks=chunks)
    if optimizer is None:
        optimizer = build_optimizer(config, chunks, plan.dtype, on_cpu=on_cpu)
    schedule = build_schedule(config, optimizer, run.train_iters)
    stepper = Stepper(
        chunks,
        recipe,
        plan,
        platform.device(),
        optimizer=optimizer,
        schedule=schedule,
        pin_memory=config[DataLoaderConfig].dataloader_pin_memory,
    )
    frozen = build_frozen(
        recipe.frozen,
        source,
        config,
        prepared.manager,
        platform,
        bridge_class=bridge_of(prepared),
        plan=plan,
        adapters=tuner.partial,
    )
    moved = moving(recipe, frozen)
    check_movable(moved, chunks)
    models = Models(
        ScoredModel(chunks=chunks, plan=plan),
        recipe,
        platform.device(),
        micro_batch_size=config[TrainConfig].micro_batch_size,
        frozen=frozen,
        adapters_off=partial(tuner.disabled, chunks) if tuner.partial else None,
    )
    if recipe.head.divergence is not None:
        stepper.guide = Guide(frozen[recipe.head.divergence.model], recipe, plan)
    if resume is not None:
        check_same_tuner(resume, tuner)
        state = Trainable(chunks, optimizer, run.layout, tuner.partial, moved)
        loaded = load(state, resume, config[CheckpointConfig])
        if not config[CheckpointConfig].finetune:
            run.step = resume.step
            data.train.load_state_dict(loaded.common["data"])
            recipe.load_state_dict(loaded.common["recipe"])
            schedule.step(run.step)
    if run.is_main:
        with folders.writable(run.output_dir):
            run.output_dir.mkdir(parents=True, exist_ok=True)
            checkpoints.clean(run.output_dir)
            folders.write_facts(run, prepared.names)
    reports = build_reporters(
        run,
        config[LoggingConfig].report_to,
        prepared.manager.catalogue("mcore_reporters"),
        memory=platform.memory,
    )
    total, trainable = count_parameters(chunks)
    facts = ModelFacts(
        name=source.name,
        family=source.family.name,
        parameters=total,
        trainable=trainable,
        precision=_precision(plan.dtype, config, engine=plan.transformer_engine),
    )

    def saved(step: int, path: Path, seconds: float) -> None:
        reports.checkpoint(step, path, seconds)
        prepared.manager.hook.mcore_checkpoint_saved(run=run, step=step, path=path)

    saver = Saver(run.output_dir, config[CheckpointConfig], saved)
    services = build_services(
        recipe,
        prepared.manager.catalogue("mcore_rollout_engines"),
        EngineContext(
            config=config,
            chunks=chunks,
            plan=plan,
            device=platform.device(),
            tokenizer=template.tokenizer,
            bridge=bridge,
            model_path=source.path,
            tuner=tuner,
            optimizer=optimizer,
            warn=partial(_warn_again, reports, count()),
        ),
        frozen=frozen,
        reports=reports,
    )
    return Session(
        run=run,
        source=source,
        recipe=recipe,
        template=template,
        data=data,
        stepper=stepper,
        models=models,
        services=services,
        bridge=bridge,
        saver=saver,
        reports=reports,
        hooks=prepared.manager.hook,
        facts=facts,
        tuner=tuner,
    )


def bridge_of(prepared: "PreparedExport") -> Any:  # noqa: ANN401
    """Return the class that moves weights between Hugging Face files and the model."""
    component: Component[Any] | None = prepared.manager.hook.mcore_build_bridge(
        config=prepared.config
    )
    if component is None:
        raise usage_error(
            "MC516",
            "nothing here reads Hugging Face weights",
            "fix: uv pip install mcore-hfbridge",
        )
    return component.load()


def on_writer(prepare: Callable[[], "DataPlan"]) -> "DataPlan":
    """Call on rank 0 of each machine; return the result, or raise its UsageError, on every rank."""
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", dist.get_rank())))
    mine: tuple[int, Any, list[Problem]] = (dist.get_rank() - local, None, [])
    if local == 0:
        try:
            mine = (dist.get_rank(), prepare(), [])
        except UsageError as error:
            mine = (dist.get_rank(), None, list(error.problems))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    problems: list[Problem] = next((p for _, _, p in everyone if p), [])
    if problems:
        raise UsageError(problems)
    plan: DataPlan = everyone[mine[0]][1]
    return plan


def steps_per_epoch(data: DataBundle, recipe: "Recipe[Any]") -> float | None:
    """Return the optimizer steps in one pass over the data; a round may make several."""
    found = data.train.steps_per_epoch
    rounds: Rounds | None = getattr(recipe, "rounds", None)
    return found if found is None or rounds is None else found * rounds.steps


def _train_iters(config: "RunConfig", per_epoch: float | None) -> int:
    train = config[TrainConfig]
    if train.train_iters is not None:
        return train.train_iters
    if per_epoch is None:
        raise usage_error(
            "MC430",
            "streaming data has no known length",
            "fix: --train_iters N",
        )
    assert train.max_epochs is not None, "settle() gives max_epochs"
    # the last batch of the last epoch is filled up from the next one: no sample is left out
    return max(1, -(-round(train.max_epochs * per_epoch * 1e6) // 10**6))


def _resume_from(config: "RunConfig", source: ModelSource) -> "checkpoints.Checkpoint | None":
    options = config[CheckpointConfig]
    if options.load is None:
        return None
    path = Path(options.load).expanduser()
    if not options.exit_on_missing_checkpoint:
        found = checkpoints.find(path)
        if found is None:
            return None
    found = checkpoints.require(path)
    have = found.training.get("architecture")
    want = plain_architecture(source)
    if have is not None and have != want:
        differ = [k for k in want if have.get(k) != want[k]]
        raise usage_error(
            "MC706",
            f"{found.path} is a checkpoint of another model",
            *(f"{k}: {have.get(k)} there, {want[k]} in --model" for k in differ[:6]),
            "fix: --model with the model that the run was started from"
            + (", and its --new_special_tokens" if differ == ["vocab_size"] else ""),
        )
    return found


def plain_architecture(source: ModelSource) -> dict[str, Any]:
    """Return what makes two models the same, as JSON holds it."""
    fields = dataclasses.asdict(source.architecture)
    for name in ("dtype", "initializer_range", "attention_dropout", "hidden_dropout"):
        fields.pop(name)
    plain: dict[str, Any] = json.loads(json.dumps(fields))
    return plain


def _takes_safetensors(config: "RunConfig", resume: "checkpoints.Checkpoint | None") -> bool:
    wanted = config[WeightsConfig].load_safetensors
    return resume is None if wanted is None else wanted and resume is None


def _warn_again(reports: RunReports, numbers: "count[int]", text: str) -> None:
    """Warn of something that may happen more than once."""
    reports.warn_once(f"engine {next(numbers)}", text)


def _precision(dtype: torch.dtype, config: "RunConfig", *, engine: bool) -> str:
    name = str(dtype).removeprefix("torch.")
    if dtype is not torch.float32:
        name += ", float32 gradients and main weights"
    if uses_distributed_optimizer(config) and parallel_state.get_data_parallel_world_size() > 1:
        name += ", distributed optimizer"
    return name + (", Transformer Engine" if engine else "")


def _distribution(plugin: object, found: tuple[str, str] | None) -> dict[str, str]:
    if found is not None:
        return {"package": found[0], "version": found[1]}
    module = type(plugin).__module__.split(".")[0]  # registered by hand, not installed
    return {"package": module, "version": "unknown"}
