"""The sharded state of a run: weights, optimizer, random states; the same for any layout."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from mcore_core.model.names import unwrap

if TYPE_CHECKING:
    from mcore_core.parallel.topology import Layout


@dataclass(frozen=True, slots=True)
class Trainable:
    """What a checkpoint is made of on this rank."""

    chunks: Sequence[Any]
    optimizer: Any
    layout: "Layout"
    partial: bool = False
    """Only what trains is in a checkpoint."""
    moved: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Chunks of the models beside the policy whose weights change during the run, by name."""


def metadata() -> dict[str, Any]:
    """Return how megatron is to lay out sharded state: resharding to any layout is possible."""
    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "singleton_local_shards": False,
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
    }


def gather_weights(chunks: Sequence[Any]) -> None:
    """Make all weights whole; collective. With overlap_param_gather the last step's are not yet."""
    for chunk in chunks:
        if hasattr(chunk, "start_param_sync") and chunk.ddp_config.overlap_param_gather:
            with torch.no_grad():
                chunk.start_param_sync(force_sync=True)


def chunk_key(index: int, chunks: Sequence[Any]) -> str:
    """Return the key of a pipeline chunk's weights."""
    return "model" if len(chunks) == 1 else f"model{index}"


def sharded_state(
    run: Trainable, *, optimizer: bool, rng: bool, loading: bool = False
) -> dict[str, Any]:
    """Return the sharded state dict; collective.

    Args:
        run: Model and optimizer.
        optimizer: Include the optimizer.
        rng: Include this rank's random states; they can be loaded in the same layout only.
        loading: The dict is a request to load, not something to save.
    """
    meta = metadata()
    state: dict[str, Any] = {}
    for i, chunk in enumerate(run.chunks):
        weights = unwrap(chunk).sharded_state_dict(metadata=meta)
        # Transformer Engine's extra state holds FP8 scales only: without it a checkpoint is the
        # same whichever implementation wrote it
        kept = trained(chunk) if run.partial else {k for k in weights if ".adapter." not in k}
        state[chunk_key(i, run.chunks)] = {
            k: v for k, v in weights.items() if k in kept and not k.endswith("_extra_state")
        }
    if optimizer and run.optimizer is not None:
        _initialize(run.optimizer)
        models = state if len(run.chunks) > 1 else state["model"]
        state["optimizer"] = run.optimizer.sharded_state_dict(
            models, is_loading=loading, metadata=meta
        )
    for name, chunks in run.moved.items():
        for i, chunk in enumerate(chunks):
            weights = unwrap(chunk).sharded_state_dict(metadata=meta)
            whole = {k: v for k, v in weights.items() if not k.endswith("_extra_state")}
            add_prefix_for_sharding(whole, f"{moved_key(name, i)}.")
            state[moved_key(name, i)] = whole
    if rng:
        state["rng"] = _rng_object(run.layout)
    return state


def moved_key(name: str, index: int) -> str:
    """Return the key of the weights of a chunk of a model beside the policy."""
    return f"beside.{name}.{index}"


def divides_state(optimizer: Any) -> bool:  # noqa: ANN401
    """Return whether an optimizer is megatron's distributed one, which lays its state out anew."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return any(isinstance(part, DistributedOptimizer) for part in parts)


def trained(chunk: Any) -> set[str]:  # noqa: ANN401
    """Return the names of a chunk's parameters that train."""
    return {name for name, p in unwrap(chunk).named_parameters() if p.requires_grad}


def _initialize(optimizer: Any) -> None:  # noqa: ANN401
    """Make the state that the first update would make: with fp16 it may not have come yet."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(part, "init_state_fn", None) is not None and part.optimizer is not None:
            part.init_state_fn(part.optimizer, part.config)


def _rng_object(layout: "Layout") -> ShardedObject:
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    shape = (layout.pp, layout.tp, layout.dp * layout.cp)
    return ShardedObject("rng", rng_state(), shape, place, replica_id=0)


def rng_state() -> dict[str, Any]:
    """Return every random state of this process."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore `rng_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
