"""Load a checkpoint into a model and an optimizer, in any layout."""

import textwrap
from dataclasses import dataclass, replace
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from mcore_core.checkpoint.folders import DIVIDED, MOVED, Checkpoint
from mcore_core.checkpoint.state import (
    Trainable,
    chunk_key,
    divides_state,
    moved_key,
    set_rng_state,
    sharded_state,
    trained,
)
from mcore_core.config.checkpoint import CheckpointConfig
from mcore_core.errors import usage_error
from mcore_core.model.names import unwrap

_DAMAGED = (CheckpointingException, CheckpointException, FileNotFoundError, KeyError, EOFError)
"""Torch's CheckpointException is no Exception: it wraps whatever the ranks failed with."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a checkpoint gave beside the weights."""

    common: dict[str, Any]
    optimizer: bool
    """The optimizer's state was restored."""
    rng: bool
    """The random states were restored."""


def load(run: Trainable, checkpoint: Checkpoint, options: CheckpointConfig) -> Loaded:
    """Fill the model, and the optimizer and random states where wanted; collective.

    Random states belong to a layout: in another one they are left as seeded.
    """
    wants_optimizer = not (options.no_load_optim or options.finetune) and run.optimizer is not None
    if wants_optimizer and not checkpoint.training.get("has_optimizer", True):
        raise usage_error(
            "MC704",
            f"{checkpoint.path} was saved with --no_save_optim: training cannot resume exactly",
            "fix: --no_load_optim starts with a fresh optimizer, --finetune also at step 0",
        )
    if wants_optimizer:
        _check_same_kind(run, checkpoint)
    wants_rng = (
        not (options.no_load_rng or options.finetune)
        and checkpoint.training.get("has_rng", True)
        and checkpoint.training.get("layout") == str(run.layout)
        and checkpoint.training.get("world") == run.layout.world
    )
    known = () if options.finetune else checkpoint.training.get(MOVED, ())
    run = replace(run, moved={name: run.moved[name] for name in run.moved if name in known})
    request = sharded_state(run, optimizer=wants_optimizer, rng=wants_rng, loading=True)
    try:
        state = dist_checkpointing.load(request, str(checkpoint.state), _strategy(options))
    except _DAMAGED as error:
        raise usage_error(
            "MC705",
            f"{checkpoint.path} cannot be loaded",
            _cause(error),
            "fix: load another checkpoint; --no_load_optim if only the optimizer is damaged",
        ) from error
    for i, chunk in enumerate(run.chunks):
        needed = trained(chunk) if run.partial else None
        _fill(unwrap(chunk), state[chunk_key(i, run.chunks)], checkpoint, needed)
    for name, chunks in run.moved.items():
        for i, chunk in enumerate(chunks):
            _fill(unwrap(chunk), state[moved_key(name, i)], checkpoint, None)
    if wants_optimizer:
        _complete(state["optimizer"])
        run.optimizer.load_state_dict(state["optimizer"])
    elif run.optimizer is not None:
        run.optimizer.reload_model_params()
    if wants_rng:
        set_rng_state(state["rng"])
    return Loaded(state.get("common", {}), wants_optimizer, wants_rng)


def _check_same_kind(run: Trainable, checkpoint: Checkpoint) -> None:
    """Raise UsageError where the optimizer's state was laid out by the other kind of optimizer."""
    divided = divides_state(run.optimizer)
    was = checkpoint.training.get(DIVIDED, divided)
    if was != divided:
        flag = f"--use_distributed_optimizer {str(was).lower()}"
        raise usage_error(
            "MC709",
            f"{checkpoint.path} was saved with {flag}: this run's optimizer cannot read its state",
            f"fix: {flag} (every size of the layout may change), or --no_load_optim, which starts "
            "with a fresh optimizer",
        )


def _complete(state: dict[Any, Any]) -> None:
    """Add what optimizers lack that had no parameter on a stage: experts have one of their own.

    Loading leaves out the empty state of a stage without experts. Saving writes the step of the
    first stage's optimizers alone; all of them take their steps together.
    """
    parts = [value for key, value in state.items() if isinstance(key, int)]
    inner = [p for part in parts if "param_groups" in (p := part.get("optimizer", part))]
    for part in inner:
        part.setdefault("state", {})
    groups = [group for part in inner for group in part["param_groups"]]
    steps = [part["state"]["common_step"] for part in inner if "common_step" in part["state"]]
    for part in inner if steps else ():
        if part["state"]:
            part["state"].setdefault("common_step", steps[0])
    counts = [group["step"] for group in groups if "step" in group]  # fused Adams count there
    for group in groups if counts else ():
        group.setdefault("step", counts[0])


def _cause(error: BaseException) -> str:
    """Return in a line what went wrong on the first rank that failed."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    first = next((cause for cause, _ in failures.values()), error)
    return textwrap.shorten(f"{type(first).__name__}: {first}", 300, placeholder=" ...")


def _fill(
    chunk: Any,  # noqa: ANN401
    weights: dict[str, Any],
    checkpoint: Checkpoint,
    needed: set[str] | None,
) -> None:
    missing, unexpected = chunk.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    if needed is not None:
        missing = [name for name in missing if name in needed]
    if missing or unexpected:
        raise usage_error(
            "MC705",
            f"{checkpoint.path} does not fit this model",
            f"missing: {', '.join(missing[:5]) or 'nothing'}",
            f"unexpected: {', '.join(unexpected[:5]) or 'nothing'}",
            "fix: load it with the --model it was trained from",
        )


def _strategy(options: CheckpointConfig) -> Any:  # noqa: ANN401
    strategy = TorchDistLoadShardedStrategy()
    if options.ckpt_fully_parallel_load:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        return FullyParallelLoadStrategyWrapper(strategy, group)
    return strategy
