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
        yield from assemble(plan, weights, ranks, names, to=None).items()


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


def assemble(
    plan: "Plan",
    weights: Mapping[str, torch.Tensor],
    ranks: "Ranks",
    names: Sequence[str],
    *,
    to: int | None,
) -> dict[str, torch.Tensor]:
    """Return HF tensors whole: on every rank of the replica, or on the rank `to` alone.

    Collective over the replica. The others get an empty dict. With `to` the tensors are on the CPU.
    """
    given = transfers_of(plan, ranks, names)
    receives = to is None or to == ranks.rank
    held = ranks.held
    dtypes = {n: held[plan.hf[n].held_by[0][0]].dtype for n in names}
    device = _device(weights)
    whole = {
        n: torch.empty(
            plan.hf[n].shape, dtype=dtypes[n], device=device if to is None else torch.device("cpu")
        )
        for n in (names if receives else ())
    }
    for owner, dtype in sorted(given, key=str):
        transfers = given[owner, dtype]
        mine = owner == ranks.rank
        if mine and (ranks.size == 1 or to == owner):
            for t in transfers:
                _place(whole, t, weights[t.weight].detach()[t.piece.slices])
        elif mine or receives:
            numel = sum(t.piece.numel for t in transfers)
            flat = (
                flatten(weights, transfers)
                if mine
                else torch.empty(numel, dtype=dtype, device=device)
            )
            _move(ranks, flat, owner, to)
            if receives:
                scatter(whole, transfers, flat)
    return whole


def _device(weights: Mapping[str, torch.Tensor]) -> torch.device:
    """Return where the weights are; a rank may hold none of a tuner's."""
    first = next(iter(weights.values()), None)
    if first is not None:
        return first.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def transfers_of(
    plan: "Plan", ranks: "Ranks", names: Sequence[str]
) -> dict[tuple[int, torch.dtype], list[Transfer]]:
    """Return what each rank gives to these tensors: computed alike on every rank, by type."""
    out: dict[tuple[int, torch.dtype], list[Transfer]] = {}
    for name in names:
        for key, position in plan.hf[name].held_by:
            weight = plan.weights[key]
            shard = weight.rule.shard
            owners = ranks.owners(key, shard.group)
            if shard.dim is None:
                owners = owners[:1]
            for owner, part in owners:
                held = ranks.members[owner].held[key]
                out.setdefault((owner, held.dtype), []).extend(
                    Transfer(name, key, piece)
                    for piece in weight.pieces(held.shape, part, ranks.sizes[shard.group])
                    if piece.hf == position
                )
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
    whole: Mapping[str, torch.Tensor], transfers: Sequence[Transfer], flat: torch.Tensor
) -> None:
    """Put the data of one rank's transfers where it belongs in the whole tensors."""
    start = 0
    for t in transfers:
        _place(whole, t, flat[start : start + t.piece.numel].view(t.piece.size))
        start += t.piece.numel


def _place(whole: Mapping[str, torch.Tensor], t: Transfer, box: torch.Tensor) -> None:
    to_weight(whole[t.hf][t.piece.hf_slices], t.piece).copy_(box)
