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


GROUPS = ("tp", "etp")
"""Groups over which weights are split: tensor parallelism, and that of experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One rank of a replica."""

    at: Mapping[str, int]
    """Its rank in each of GROUPS."""
    held: Mapping[str, Held]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """One replica of the model: the ranks that together hold every weight.

    These are the tensor-, expert- and pipeline-parallel ranks: experts are spread over ranks that
    are copies of each other in everything else.
    """

    group: Any = None
    """The process group of the replica; None for one process."""
    rank: int = 0
    """This rank in `group`."""
    size: int = 1
    sizes: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(GROUPS, 1))
    """Size of each of GROUPS."""
    replica: int = 0
    replicas: int = 1
    """Copies of the model."""
    members: tuple[Member, ...] = ()

    @classmethod
    def of(cls, weights: "Mapping[str, torch.Tensor]") -> "Ranks":
        """Ask megatron for the groups and every rank for its weights. Collective."""
        mine = {n: Held(tuple(w.shape), w.dtype) for n, w in weights.items()}
        if not dist.is_initialized():
            return cls(members=(Member(at=dict.fromkeys(GROUPS, 0), held=mine),))
        from megatron.core import parallel_state as mpu  # noqa: PLC0415  (unit tests need none)

        group, replica, replicas = _replica()
        at = {
            "tp": mpu.get_tensor_model_parallel_rank(),
            "etp": mpu.get_expert_tensor_parallel_rank(),
        }
        members: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(members, Member(at=at, held=mine), group=group)
        return cls(
            group=group,
            rank=dist.get_rank(group),
            size=len(members),
            sizes={
                "tp": mpu.get_tensor_model_parallel_world_size(),
                "etp": mpu.get_expert_tensor_parallel_world_size(),
            },
            replica=replica,
            replicas=replicas,
            members=tuple(members),
        )

    def at(self, group: str) -> int:
        """Return this rank's place in one of GROUPS."""
        return self.members[self.rank].at[group]

    @property
    def held(self) -> "dict[str, Held]":
        """Every weight of the model, as the first rank that has it holds it."""
        out: dict[str, Held] = {}
        for member in self.members:
            for name, held in member.held.items():
                out.setdefault(name, held)
        return out

    def owners(self, name: str, group: str) -> list[tuple[int, int]]:
        """Return (rank in the replica, rank in `group`) of one rank for each part of a weight."""
        found: dict[int, int] = {}
        for rank, member in enumerate(self.members):
            if name in member.held:
                found.setdefault(member.at[group], rank)
        return [(found[part], part) for part in sorted(found)]

    def global_rank(self, rank: int) -> int:
        """Return the rank in the world of a rank of the replica."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


def _replica() -> tuple[Any, int, int]:
    """Return the smallest group that holds every weight, which copy it is, and of how many.

    Ranks of both kinds of groups are consecutive within a pipeline stage, so that the larger block
    holds whole smaller ones where its size is a multiple.
    """
    from megatron.core import parallel_state as mpu  # noqa: PLC0415

    dense, expert = (
        mpu.get_model_parallel_group(),
        mpu.get_expert_tensor_model_pipeline_parallel_group(),
    )
    sizes = dist.get_world_size(dense), dist.get_world_size(expert)
    if sizes[0] % sizes[1] == 0:
        copies = mpu.get_data_parallel_world_size(with_context_parallel=True)
        return dense, mpu.get_data_parallel_rank(with_context_parallel=True), copies
    if sizes[1] % sizes[0] == 0:
        copies = mpu.get_expert_data_parallel_world_size()
        return expert, mpu.get_expert_data_parallel_rank(), copies
    return dist.group.WORLD, 0, 1


def agree(problems: list[Problem]) -> None:
    """Raise on every rank what any rank found, so that none is left waiting. Collective."""
    if dist.is_initialized():
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, problems)
        problems = [p for found in everyone for p in found]
    if problems:
        raise UsageError(shorten(problems))
