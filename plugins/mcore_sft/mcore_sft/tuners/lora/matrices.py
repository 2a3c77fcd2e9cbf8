"""The A and B of one projection on this rank: their shapes, first values, and place in checkpoints.

A is [rank, inputs], B [outputs, rank]; of stacked experts, [E, rank, inputs] and [E, outputs, rank]
for the E experts of this rank. An embedding's A is held transposed, [vocabulary, rank].
"""

import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor

if TYPE_CHECKING:
    from mcore_sft.tuners.lora.split import Projection


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where this rank stands among those that share a weight."""

    rank: int
    size: int
    first_expert: int = 0
    experts: int = 0
    """Experts of this rank."""
    total_experts: int = 0

    @classmethod
    def of(cls, projection: "Projection") -> "Place":
        """Ask megatron for this rank's place."""
        if not projection.experts:
            return cls(
                rank=mpu.get_tensor_model_parallel_rank(),
                size=mpu.get_tensor_model_parallel_world_size(),
            )
        each = projection.experts // mpu.get_expert_model_parallel_world_size()
        return cls(
            rank=mpu.get_expert_tensor_parallel_rank(),
            size=mpu.get_expert_tensor_parallel_world_size(),
            first_expert=mpu.get_expert_model_parallel_rank() * each,
            experts=each,
            total_experts=projection.experts,
        )


@dataclass(slots=True, kw_only=True)
class Pair:
    """One projection's A and B on this rank."""

    projection: "Projection"
    place: Place
    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scale: float

    @property
    def split_b(self) -> bool:
        """Whether ranks hold parts of B's rows."""
        return self.projection.split == 0 and self.projection.is_even(self.place.size)

    @property
    def rank(self) -> int:
        """The adapter's rank."""
        return self.b.shape[-1]


def build(
    projection: "Projection", base: Tensor, *, rank: int, scale: float, seed: int, partial: bool
) -> Pair:
    """Return the matrices of a projection, drawn from its name: the same in every layout.

    Args:
        projection: The HF matrix.
        base: This rank's weight that holds it.
        rank: The adapter's rank.
        scale: What its output is multiplied by.
        seed: Of the run.
        partial: Under sequence parallelism a rank sees only its tokens where it holds a matrix
            whole: those gradients are added up over ranks.
    """
    place = Place.of(projection)
    with torch.no_grad():
        a, b = _first_values(projection, place, base, rank, seed)
    options: dict[str, Any] = {"dtype": base.dtype, "device": base.device}
    pair = Pair(
        projection=projection,
        place=place,
        a=torch.nn.Parameter(a.to(**options)),
        b=torch.nn.Parameter(b.to(**options)),
        scale=scale,
    )
    _mark(pair, partial=partial)
    return pair


def _first_values(
    projection: "Projection", place: Place, base: Tensor, rank: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return A and B as PEFT begins: A uniform and B zero; for an embedding A zero, B normal."""
    inputs = projection.inputs
    if projection.kind == "embedding":
        generator = _generator(projection.name, seed)
        return torch.zeros(len(base), rank), torch.randn(inputs, rank, generator=generator)
    outputs = local_outputs(projection, place, base)
    bound = 1 / math.sqrt(inputs)  # kaiming_uniform_ with a = sqrt(5)

    def drawn(name: str) -> Tensor:
        whole = torch.empty(rank, inputs).uniform_(-bound, bound, generator=_generator(name, seed))
        if projection.split != 1:
            return whole
        return whole.chunk(place.size, 1)[place.rank]

    if not place.experts:
        return drawn(projection.name), torch.zeros(outputs, rank)
    first = place.first_expert
    each = [drawn(f"{projection.name}.{first + e}") for e in range(place.experts)]
    return torch.stack(each), torch.zeros(place.experts, outputs, rank)


def local_outputs(projection: "Projection", place: Place, base: Tensor) -> int:
    """Return how many rows of B this rank holds."""
    if projection.entry.rule.pad:
        return base.shape[0]
    if not projection.is_even(place.size):
        return projection.outputs
    return len(projection.rows(place.rank, place.size))


def _generator(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))


def _mark(pair: Pair, *, partial: bool) -> None:
    """Tell megatron which matrices ranks share, and which gradients are to be added up."""
    projection = pair.projection
    split, embedding = projection.split, projection.kind == "embedding"
    lead = 1 if pair.place.experts else 0
    # an embedding's A lies along the vocabulary, as the rows of its weight do
    a_dim = 0 if embedding else lead + 1 if split == 1 else None
    b_dim = lead if pair.split_b and not embedding else None
    # these get their whole gradient on every rank, summed in the backward pass
    whole = [pair.a] if projection.entry.rule.pad else [pair.b] if split == 0 else []
    for parameter, dim in ((pair.a, a_dim), (pair.b, b_dim)):
        if pair.place.experts:
            parameter.allreduce = False  # type: ignore[attr-defined]  # expert-data-parallel group
        if dim is not None:
            set_tensor_model_parallel_attributes(parameter, True, dim, 1)
        elif pair.place.experts and pair.place.size == 1:
            # tensor-parallel ranks hold different experts: each counts in the gradient's norm
            set_tensor_model_parallel_attributes(parameter, True, lead, 1)
        elif partial and not pair.place.experts and not any(parameter is p for p in whole):
            parameter.sequence_parallel = True  # type: ignore[attr-defined]


type Offsets = tuple[tuple[int, int, int], ...]


def sharded(
    pair: Pair, key_a: str, key_b: str, offsets: Offsets, metadata: dict[str, Any]
) -> dict[str, Any]:
    """Return both matrices as megatron's checkpoints describe them: the same for any layout.

    Args:
        pair: The matrices.
        key_a: Key of A.
        key_b: Key of B.
        offsets: Of the axes before the matrices' own, as megatron's layers hand them down.
        metadata: Of the state dict.
    """
    projection, lead = pair.projection, 1 if pair.place.experts else 0
    describe = _Describe(pair.place, offsets, metadata)
    if projection.kind == "embedding":
        a: Any = describe(key_a, pair.a, 0, resize=True)
        return {key_a: a, key_b: describe(key_b, pair.b, None)}
    a = describe(key_a, pair.a, 1 + lead if projection.split == 1 else None)
    sections, dim = projection.sections, lead if pair.split_b else None
    if len(sections) == 1:
        resize = projection.entry.rule.pad
        return {key_a: a, key_b: describe(key_b, pair.b, dim, resize=resize)}
    lengths = [n // (1 if dim is None else pair.place.size) for n in sections]

    def split(key: str, data: Tensor, replica: Any, _: object) -> list[ShardedTensor]:  # noqa: ANN401
        parts = torch.split(data, lengths, lead)
        return [describe(f"{key}.{i}", part, dim) for i, part in enumerate(parts)]

    def join(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, lead)

    replica = (0, pair.place.rank if dim is None else 0, describe.copy)
    return {key_a: a, key_b: ShardedTensorFactory(key_b, pair.b, split, join, replica)}


@dataclass(frozen=True, slots=True)
class _Describe:
    """Describes parts of tensors of one place."""

    place: Place
    offsets: Offsets
    metadata: dict[str, Any]

    @property
    def copy(self) -> int:
        """Which copy of the model this rank has."""
        if self.place.experts:
            return int(mpu.get_expert_data_parallel_rank())
        return int(self.metadata["dp_cp_group"].rank())

    def __call__(
        self, key: str, data: Tensor, dim: int | None, *, resize: bool = False
    ) -> ShardedTensor:
        """Return a tensor whose dimension `dim` the ranks of the place share evenly."""
        place, before = self.place, len(self.offsets)
        found = list(self.offsets)
        if place.experts:
            each = place.experts
            found.append((before, place.first_expert // each, place.total_experts // each))
        if dim is not None:
            found.append((before + dim, place.rank, place.size))
        return ShardedTensor.from_rank_offsets(
            key,
            data,
            *found,
            replica_id=(0, place.rank if dim is None else 0, self.copy),
            prepend_axis_num=before,
            allow_shape_mismatch=resize,
        )
