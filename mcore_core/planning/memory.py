"""The memory of each pipeline rank of a run, by what takes it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mcore_core.config.train import TrainConfig
from mcore_core.planning.activations import (
    Recompute,
    Rows,
    ends_bytes,
    in_flight,
    stage_bytes,
)
from mcore_core.planning.state import Training, state_bytes
from mcore_core.planning.weights import (
    layers_of_rank,
    padded_vocab,
    rank_weights,
)

if TYPE_CHECKING:
    from mcore_core.config.compose import RunConfig
    from mcore_core.model.architecture import Architecture
    from mcore_core.parallel.topology import Layout

GIB = 2**30
CONTEXT = round(1.2 * GIB)
"""What CUDA, the libraries of a process and its first communicators take on a GPU."""
FRAGMENTS = 0.04
"""Part of the activations that the allocator holds and nothing can use."""
DEFAULT_TOKENS = 4096
"""Tokens of a sample where no option says how long samples are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one rank."""

    rank: int
    """Pipeline rank."""
    parameters: int
    """Elements."""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward pass, and what the largest recomputed part adds to it."""
    logits: int
    """Of head and loss, beyond that part: the two never stand at once."""
    engine: int
    reference: int
    overhead: int
    host: int
    """In host memory, not in the total."""

    @property
    def total(self) -> int:
        """All that has to fit at once."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.engine
            + self.reference
            + self.overhead
        )


def recompute_of(config: "RunConfig") -> Recompute:
    """Read the options of recomputation."""
    train = config[TrainConfig]
    return Recompute(
        granularity=train.recompute_granularity,
        method=train.recompute_method or "uniform",
        layers=train.recompute_num_layers or 1,
        modules=frozenset(train.recompute_modules),
    )


def row_tokens(config: "RunConfig", shape: "Architecture") -> int:
    """Return the tokens of the longest row: full samples, or full packs."""
    each = config.get("packing_length") if config.get("packing") else None
    each = each or config.get("max_length") or min(shape.max_position_embeddings, DEFAULT_TOKENS)
    tokens: int = each * config.get("micro_batch_size")
    return tokens


def micro_batches(config: "RunConfig", layout: "Layout") -> int:
    """Return how many micro-batches a data-parallel rank has in a step."""
    count: int = config.get("global_batch_size") // (config.get("micro_batch_size") * layout.dp)
    return max(1, count)


def _given(config: "RunConfig", name: str) -> object:
    return config.get(name) if name in config.names else None


def holds_reference(config: "RunConfig", training: Training) -> bool:
    """Return whether a second, frozen copy of a model lies beside the policy."""
    names = ("ref_model", "ref_load", "teacher_model")
    if any(_given(config, name) for name in names):
        return True
    wants = "ref_model" in config.names or "ref_load" in config.names
    return wants and training.rank is None and _given(config, "beta") != 0


def engine_bytes(config: "RunConfig", capacity: int) -> int:
    """Return what a rollout engine on the same GPU holds while the model trains."""
    named = _given(config, "rollout_engine") or ("vllm" if _given(config, "use_vllm") else None)
    servers = any(_given(config, n) for n in ("vllm_server_host", "vllm_server_base_url"))
    mode = _given(config, "vllm_mode") or ("server" if servers else "colocate")
    if named != "vllm" or mode == "server":
        return 0
    if _given(config, "sleep_level"):
        return 0
    part = _given(config, "vllm_gpu_memory_utilization")
    return round(float(part) * capacity) if isinstance(part, int | float) else 0


def memory(
    config: "RunConfig",
    shape: "Architecture",
    layout: "Layout",
    stage_layers: Sequence[int],
    *,
    capacity: int,
    gpu: bool = True,
) -> list[Memory]:
    """Return the memory of each pipeline rank.

    Args:
        config: The options of the run.
        shape: The model.
        layout: The layout.
        stage_layers: HF layers of each pipeline chunk, in model order.
        capacity: Bytes of a device, for what is a share of it.
        gpu: Whether ranks are on GPUs; else on CPUs of one machine.
    """
    training = Training.of(config, shape)
    vocab = padded_vocab(shape, layout, config.get("padded_vocab_size"))
    tokens = math.ceil(row_tokens(config, shape) / layout.cp)
    rows = Rows(tokens=tokens, size=training.size, fused=gpu, recompute=recompute_of(config))
    count, found = micro_batches(config, layout), []
    for rank in range(layout.pp):
        weights = rank_weights(shape, layout, stage_layers, rank, vocab=vocab)
        state = state_bytes(weights, layout, training)
        layers = layers_of_rank(stage_layers, layout, rank)
        kept, peak = stage_bytes(shape, layout, rows, layers, in_flight(layout, rank, count))
        embedded = tokens * shape.hidden_size * rows.size if rank == 0 else 0
        activations = kept + peak + embedded
        parameters = sum(w.count for w in weights)
        overhead = round(FRAGMENTS * activations) + (CONTEXT if gpu else 0)
        head = ends_bytes(shape, layout, rows, vocab=vocab) if rank == layout.pp - 1 else 0
        found.append(
            Memory(
                rank=rank,
                parameters=parameters,
                weights=state.weights,
                gradients=state.gradients,
                optimizer=state.optimizer,
                activations=activations,
                logits=max(head - peak, 0),
                engine=engine_bytes(config, capacity),
                reference=parameters * training.size if holds_reference(config, training) else 0,
                overhead=overhead,
                host=state.host,
            )
        )
    return found


def largest(ranks: Sequence[Memory]) -> Memory:
    """Return the rank that needs most."""
    return max(ranks, key=lambda m: m.total)
