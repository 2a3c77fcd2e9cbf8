"""Who holds what: the model-parallel group of this rank, its weights, and errors shared by all."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mcore_core.errors import Problem, UsageError
from mcore_hfbridge.plan import shorten

if TYPE_CHECKING:
    from mcore_core.model.family import Shape


@dataclass(frozen=True, slots=True)
class Held:
    """One weight on one rank."""

    shape: "Shape"
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """One replica of the model: its tensor- and pipeline-parallel ranks together."""

    group: Any = None
    """The process group of the replica; None for one process."""
    rank: int = 0
    """This rank in `group`."""
    size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    replica: int = 0
    replicas: int = 1
    """Data- and context-parallel copies of the model."""
    members: tuple[tuple[int, Mapping[str, Held]], ...] = field(default=())
    """For each rank of the replica, its tensor-parallel rank and what it holds."""

    @classmethod
    def of(cls, weights: "Mapping[str, torch.Tensor]") -> "Ranks":
        """Ask megatron for the groups and every rank for its weights. Collective."""
        mine = {n: Held(tuple(w.shape), w.dtype) for n, w in weights.items()}
        if not dist.is_initialized():
            return cls(members=((0, mine),))
        from megatron.core import parallel_state as mpu  # noqa: PLC0415  (unit tests need none)

        group = mpu.get_model_parallel_group()
        tp_rank: int = mpu.get_tensor_model_parallel_rank()
        members: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(members, (tp_rank, mine), group=group)
        return cls(
            group=group,
            rank=dist.get_rank(group),
            size=len(members),
            tp_rank=tp_rank,
            tp_size=mpu.get_tensor_model_parallel_world_size(),
            replica=mpu.get_data_parallel_rank(with_context_parallel=True),
            replicas=mpu.get_data_parallel_world_size(with_context_parallel=True),
            members=tuple(members),
        )

    @property
    def held(self) -> "dict[str, Held]":
        """Every weight of the model, as the first rank that has it holds it."""
        out: dict[str, Held] = {}
        for _, weights in self.members:
            for name, held in weights.items():
                out.setdefault(name, held)
        return out

    def owners(self, name: str) -> list[tuple[int, int]]:
        """Return (rank in the group, tensor-parallel rank) of each rank that holds a weight."""
        found = {tp: r for r, (tp, held) in reversed([*enumerate(self.members)]) if name in held}
        return [(found[tp], tp) for tp in sorted(found)]

    def global_rank(self, rank: int) -> int:
        """Return the rank in the world of a rank of the replica."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


def agree(problems: list[Problem]) -> None:
    """Raise on every rank what any rank found, so that none is left waiting. Collective."""
    if dist.is_initialized():
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, problems)
        problems = [p for found in everyone for p in found]
    if problems:
        raise UsageError(shorten(problems))
