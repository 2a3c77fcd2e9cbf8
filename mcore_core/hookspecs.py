"""Every extension point of the kernel, in the order the kernel calls them.

Three shapes. *Catalogue* hooks say what exists; they collect, run once on every rank before the
config is parsed, and may not import torch. *Slot* hooks pick one strategy; the first non-None
result wins and the kernel has the last word. *Event* hooks report what happened; they collect and
return nothing. Unless a docstring says otherwise a hook runs on every rank.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_core.plugin import hookspec

if TYPE_CHECKING:
    from mcore_core.component import Component
    from mcore_core.config.compose import RunConfig
    from mcore_core.config.group import ConfigGroup
    from mcore_core.context import RunContext
    from mcore_core.errors import Problem
    from mcore_core.manager import PluginManager
    from mcore_core.model.family import Family
    from mcore_core.protocols import (
        Bridge,
        DatasetLoader,
        LossFn,
        ModelChunk,
        Optimizer,
        Recipe,
        Reporter,
        RewardFn,
        RolloutEngine,
        StepResult,
        Tuner,
        TurnScheduler,
    )

# -- start-up -------------------------------------------------------------------------------------


@hookspec(historic=True)
def mcore_addhooks(manager: "PluginManager") -> None:
    """Add hook specifications of your own with `manager.add_hookspecs(module)`."""


# -- catalogue: collecting, torch-free ------------------------------------------------------------


@hookspec
def mcore_config_groups() -> "Iterable[type[ConfigGroup]]":
    """Return the option groups this plugin adds while it is active."""
    return ()


@hookspec
def mcore_losses() -> "Iterable[Component[LossFn]]":
    """Return losses for `--loss_type`."""
    return ()


@hookspec
def mcore_model_specs() -> "Iterable[Component[Family]]":
    """Return model families; the name is the `model_type` of the HF config."""
    return ()


@hookspec
def mcore_tuners() -> "Iterable[Component[Tuner]]":
    """Return tuners for `--tuner_type`."""
    return ()


@hookspec
def mcore_rewards() -> "Iterable[Component[RewardFn]]":
    """Return reward functions for `--reward_funcs`."""
    return ()


@hookspec
def mcore_tasks() -> "Iterable[Component[object]]":
    """Return tasks for `--task_type`: what the head computes instead of the next token."""
    return ()


@hookspec
def mcore_dispatchers() -> "Iterable[Component[object]]":
    """Return token dispatchers for `--moe_token_dispatcher_type`."""
    return ()


@hookspec
def mcore_rollout_engines() -> "Iterable[Component[RolloutEngine]]":
    """Return engines for `--rollout_engine`."""
    return ()


@hookspec
def mcore_datasets() -> "Iterable[Component[DatasetLoader]]":
    """Return loaders; the name is the scheme in `--dataset scheme://path`."""
    return ()


@hookspec
def mcore_schedulers() -> "Iterable[Component[TurnScheduler]]":
    """Return turn schedulers for `--multi_turn_scheduler`."""
    return ()


@hookspec
def mcore_reporters() -> "Iterable[Component[Reporter]]":
    """Return metric sinks for `--report_to`; each is built on the main rank only."""
    return ()


# -- configuration --------------------------------------------------------------------------------


@hookspec
def mcore_validate_config(config: "RunConfig") -> "Iterable[Problem]":
    """Return every problem found across option groups; the kernel prints them all at once."""
    return ()


# -- slots: first result wins ---------------------------------------------------------------------


@hookspec(firstresult=True)
def mcore_recipe(config: "RunConfig") -> "Component[Recipe[Any]] | None":
    """Return the training recipe. Exactly one active plugin must implement this."""


@hookspec(firstresult=True)
def mcore_build_bridge(config: "RunConfig") -> "Component[Bridge] | None":
    """Return what moves weights between Hugging Face files and the model."""


@hookspec(firstresult=True)
def mcore_build_optimizer(run: "RunContext", chunks: "Sequence[ModelChunk]") -> "Optimizer | None":
    """Build the optimizer. The kernel builds Megatron's distributed optimizer."""


# -- events: collecting, no result ----------------------------------------------------------------


@hookspec
def mcore_callbacks(run: "RunContext") -> Iterable[object]:
    """Return objects with event hooks, registered until the run ends. State lives in them."""
    return ()


@hookspec
def mcore_train_begin(run: "RunContext", chunks: "Sequence[ModelChunk]") -> None:
    """Called after the checkpoint is loaded. Collectives are allowed."""


@hookspec
def mcore_step_end(run: "RunContext", step: int, result: "StepResult") -> None:
    """Called after the optimizer step. Collectives are allowed; `result` is still on the device."""


@hookspec
def mcore_log(run: "RunContext", step: int, metrics: Mapping[str, float]) -> None:
    """Called on the main rank only with reduced metrics. Collectives are NOT allowed."""


@hookspec
def mcore_checkpoint_saved(run: "RunContext", step: int, path: Path) -> None:
    """Called once the files are complete, also with async saving. Collectives are allowed."""


@hookspec
def mcore_teardown(run: "RunContext", error: BaseException | None) -> None:
    """Called when the run ends, also by an error. Collectives are NOT allowed."""
