"""Whole HF tensors from the parts that ranks hold: a bucket at a time, one collective an owner."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from mcore_hfbridge.load import to_weight

if TYPE_CHECKING:
    from mcore_core.model.family import Piece
    from mcore_hfbridge.plan import HFPart, Plan
    from mcore_hfbridge.ranks import Ranks

BUCKET = 256 * 2**20
"""Bytes of whole HF tensors moved at once."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one HF tensor."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """What one rank gives to one HF tensor."""

    hf: str
    weight: str
    piece: "Piece"


def export(
    plan: "Plan", weights: Mapping[str, torch.Tensor], ranks: "Ranks"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every HF tensor whole, in the plan's order, on every rank. Collective."""
    for names in buckets(plan, ranks, BUCKET):
        yield from assemble(plan, weights, ranks, whole(plan, names), to=None).items()


def dtype_of(ranks: "Ranks", part: "HFPart") -> torch.dtype:
    """Return the type that an HF tensor is exported in: its weight's."""
    return ranks.held[part.held_by[0][0]].dtype


def bytes_of(plan: "Plan", ranks: "Ranks") -> dict[str, int]:
    """Return the bytes of every HF tensor, in the order of export."""
    held = ranks.held
    return {
        name: prod(part.shape) * held[part.held_by[0][0]].dtype.itemsize
        for name, part in plan.hf.items()
    }


def buckets(plan: "Plan", ranks: "Ranks", limit: int) -> Iterator[list[str]]:
    """Yield neighbouring HF tensors, of `limit` bytes or of one tensor."""
    yield from pack(bytes_of(plan, ranks), limit)


def pack(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Yield runs of names whose sizes sum to at most `limit`; a larger one is alone."""
    run: list[str] = []
    total = 0
    for name, size in sizes.items():
        if run and total + size > limit:
            yield run
            run, total = [], 0
        run.append(name)
        total += size
    if run:
        yield run


def whole(plan: "Plan", names: Sequence[str]) -> list[Part]:
    """Return HF tensors as parts of all their rows."""
    return [Part(name, 0, plan.hf[name].shape[0]) for name in names]


def split(plan: "Plan", sizes: Mapping[str, int], limit: int) -> Iterator[list[Part]]:
    """Yield runs of parts of at most `limit` bytes, or of one row; a larger tensor is cut."""
    for names in pack(sizes, limit):
        rows = plan.hf[names[0]].shape[0]
        step = max(1, rows * limit // max(1, sizes[names[0]]))
        if len(names) > 1 or step >= rows:
            yield whole(plan, names)
            continue
        for start in range(0, rows, step):
            yield [Part(names[0], start, min(rows, start + step))]


def assemble(
    plan: "Plan",
    weights: Mapping[str, torch.Tensor],
    ranks: "Ranks",
    parts: Sequence[Part],
    *,
    to: int | None,
) -> dict[str, torch.Tensor]:
    """Return parts of HF tensors by name: on every rank of the replica, or on the rank `to` alone.

    Collective over the replica. The others get an empty dict. With `to` the tensors are on the CPU.
    """
    given = transfers_of(plan, ranks, parts)
    receives = to is None or to == ranks.rank
    held = ranks.held
    device = _device(weights)
    found = {
        part.name: torch.empty(
            (part.stop - part.start, *plan.hf[part.name].shape[1:]),
            dtype=held[plan.hf[part.name].held_by[0][0]].dtype,
            device=device if to is None else torch.device("cpu"),
        )
        for part in (parts if receives else ())
    }
    for owner, dtype in sorted(given, key=str):
        transfers = given[owner, dtype]
        mine = owner == ranks.rank
        if mine and (ranks.size == 1 or to == owner):
            for t in transfers:
                _place(found, t, weights[t.weight].detach()[t.piece.slices])
        elif mine or receives:
            numel = sum(t.piece.numel for t in transfers)
            flat = (
                flatten(weights, transfers)
                if mine
                else torch.empty(numel, dtype=dtype, device=device)
            )
            _move(ranks, flat, owner, to)
            if receives:
                scatter(found, transfers, flat)
    return found


def _device(weights: Mapping[str, torch.Tensor]) -> torch.device:
    """Return where the weights are; a rank may hold none of a tuner's."""
    first = next(iter(weights.values()), None)
    if first is not None:
        return first.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def transfers_of(
    plan: "Plan", ranks: "Ranks", parts: Sequence[Part]
) -> dict[tuple[int, torch.dtype], list[Transfer]]:
    """Return what each rank gives to these parts: computed alike on every rank, by type."""
    out: dict[tuple[int, torch.dtype], list[Transfer]] = {}
    for part in parts:
        for key, position in plan.hf[part.name].held_by:
            weight = plan.weights[key]
            shard = weight.rule.shard
            owners = ranks.owners(key, shard.group)
            if shard.dim is None:
                owners = owners[:1]
            for owner, place in owners:
                held = ranks.members[owner].held[key]
                gives = [
                    Transfer(part.name, key, inside)
                    for piece in weight.pieces(held.shape, place, ranks.sizes[shard.group])
                    if piece.hf == position
                    and (inside := piece.in_rows(part.start, part.stop)) is not None
                ]
                if gives:
                    out.setdefault((owner, held.dtype), []).extend(gives)
    return out


def flatten(weights: Mapping[str, torch.Tensor], transfers: Sequence[Transfer]) -> torch.Tensor:
    """Return the data of one rank's transfers, one after another."""
    parts = [weights[t.weight].detach()[t.piece.slices].reshape(-1) for t in transfers]
    return torch.cat(parts)


def _move(ranks: "Ranks", flat: torch.Tensor, owner: int, to: int | None) -> None:
    if to is None:
        dist.broadcast(flat, ranks.global_rank(owner), group=ranks.group)
    elif owner == ranks.rank:
        dist.send(flat, ranks.global_rank(to), group=ranks.group)
    else:
        dist.recv(flat, ranks.global_rank(owner), group=ranks.group)


def scatter(
    found: Mapping[str, torch.Tensor], transfers: Sequence[Transfer], flat: torch.Tensor
) -> None:
    """Put the data of one rank's transfers where it belongs in the parts of HF tensors."""
    start = 0
    for t in transfers:
        _place(found, t, flat[start : start + t.piece.numel].view(t.piece.size))
        start += t.piece.numel


def _place(found: Mapping[str, torch.Tensor], t: Transfer, box: torch.Tensor) -> None:
    to_weight(found[t.hf][t.piece.hf_slices], t.piece).copy_(box)
