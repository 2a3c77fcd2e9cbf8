"""Bytes of weights, gradients and optimizer state of a rank: its parameters times the options."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mcore_core.config.distributed import DistributedConfig
from mcore_core.config.optimizer import OptimizerConfig
from mcore_core.config.precision import PrecisionConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcore_core.config.compose import RunConfig
    from mcore_core.model.architecture import Architecture
    from mcore_core.parallel.topology import Layout
    from mcore_core.planning.weights import Weight

SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}
_ALIGN = 64
"""Elements to which megatron aligns each parameter in the distributed optimizer's buffers."""


@dataclass(frozen=True, slots=True)
class State:
    """Bytes of a rank."""

    weights: int
    gradients: int
    optimizer: int
    host: int = 0
    """Optimizer state that optimizer_cpu_offload keeps in host memory."""


@dataclass(frozen=True, slots=True)
class Training:
    """The options that decide what is kept for each parameter."""

    size: int
    """Bytes of a weight."""
    optimizer: str
    sharded: bool
    """Whether optimizer state is divided over data-parallel ranks."""
    momentum: bool
    main: int
    """Bytes of a main weight beside the weight itself, 0 where it is the weight."""
    gradient: int
    first: int
    """Bytes of Adam's moments."""
    second: int
    offload: float
    rank: int | None
    """Rank of LoRA's matrices; None where all weights train."""

    @classmethod
    def of(cls, config: "RunConfig", shape: "Architecture") -> "Training":
        """Read the options."""
        options = config[OptimizerConfig]
        size = SIZES[config[PrecisionConfig].dtype(shape.dtype)]
        half, careful = size < 4, options.use_precision_aware_optimizer
        lora = "tuner_type" in config.names and config.get("tuner_type") == "lora"
        return cls(
            size=size,
            optimizer=options.optimizer,
            sharded=(
                config[DistributedConfig].use_distributed_optimizer and options.optimizer == "adam"
            ),
            momentum=bool(config.get("sgd_momentum")),
            main=(SIZES[options.main_params_dtype] if careful else 4) if half else 0,
            gradient=SIZES[options.main_grads_dtype] if half else 4,
            first=SIZES[options.exp_avg_dtype] if careful else 4,
            second=SIZES[options.exp_avg_sq_dtype] if careful else 4,
            offload=options.optimizer_offload_fraction if options.optimizer_cpu_offload else 0.0,
            rank=int(config.get("lora_rank")) if lora else None,
        )


def _adapters(weights: "Sequence[Weight]", rank: int) -> "list[Weight]":
    """Return LoRA's matrices of all linear layers: one A for each fused projection, and B."""
    from mcore_core.planning.weights import Weight  # noqa: PLC0415  (it imports nothing back)

    found = []
    for weight in weights:
        if weight.linear is not None:
            inputs, outputs, parts = weight.linear
            count = rank * (inputs * parts + outputs) * weight.copies
            found.append(Weight(f"{weight.name}.lora", count, count, expert=weight.expert))
    return found


def state_bytes(weights: "Sequence[Weight]", layout: "Layout", training: Training) -> State:
    """Return what a rank keeps of its parameters between steps.

    Adam keeps two moments of each trained element, and in 16 bits a float32 main weight; the
    distributed optimizer divides these by the ranks that hold the same parameter (with experts
    only those that hold the same experts) and aligns parameters in its buffers.
    """
    trained = list(weights)
    frozen = 0
    if training.rank is not None:
        frozen = sum(w.count for w in weights) * training.size
        trained = _adapters(weights, training.rank)
    total = State(frozen, 0, 0)
    dense = layout.world // (layout.tp * layout.pp)
    alike = layout.world // (layout.pp * layout.ep * layout.etp)
    for expert, ranks in ((False, dense), (True, alike)):
        group = [w for w in trained if w.expert == expert]
        if group:
            total = _add(total, _group(group, ranks, training))
    return total


def _add(a: State, b: State) -> State:
    return State(
        a.weights + b.weights, a.gradients + b.gradients, a.optimizer + b.optimizer, a.host + b.host
    )


def _group(group: "Sequence[Weight]", ranks: int, training: Training) -> State:
    count = sum(w.count for w in group)
    padded = count
    if training.sharded:
        aligned = sum(-(-w.count // _ALIGN) * _ALIGN for w in group)
        end = math.lcm(ranks, 128)
        padded = -(-aligned // end) * end
    each = training.main
    kept = float(each * count)
    match training.optimizer:
        case "adam":
            kept += count * (training.first + training.second)
        case "sgd":
            kept += 4 * count if training.momentum else 0
        case _:
            matrices = sum(w.count for w in group if w.matrix)
            kept += 4 * matrices + 8 * (count - matrices)
            if training.optimizer == "dist_muon":
                kept /= ranks
    if training.sharded:
        kept /= ranks
    host = kept * training.offload
    return State(
        weights=padded * training.size,
        gradients=padded * training.gradient,
        optimizer=round(kept - host),
        host=round(host),
    )
