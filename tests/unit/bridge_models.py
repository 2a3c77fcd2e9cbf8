"""Megatron ranks simulated without processes: who holds which part of which weight."""

from dataclasses import dataclass

import torch
from family_cases import CASES, family_of, plan_for
from mcore_hfbridge.export import bytes_of, flatten, scatter, split, transfers_of
from mcore_hfbridge.load import load
from mcore_hfbridge.ranks import Held, Member, Ranks

from mcore_core.model.resolve import read_hf_config


@dataclass(frozen=True)
class Grid:
    """Sizes of the groups; a pipeline stage has as many ranks as the larger of both kinds."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def stage(self):
        return max(self.tp, self.ep * self.etp)

    @property
    def sizes(self):
        return {"tp": self.tp, "etp": self.etp}

    def at(self, rank):
        return {"tp": rank % self.stage % self.tp, "etp": rank % self.stage % self.etp}

    def holds(self, weight, rank, architecture):
        stage = self.pp - 1
        if "l" in weight.index:
            stage = weight.index["l"] * self.pp // architecture.num_layers
        elif weight.name.startswith("embedding"):
            stage = 0
        if rank // self.stage != stage:
            return False
        if "e" not in weight.index:
            return True
        each = architecture.moe.num_experts // self.ep
        return weight.index["e"] // each == rank % self.stage // self.etp % self.ep


ONE = Grid()


def empty_ranks(plan, architecture, grid=ONE, dtype=torch.float32):
    """Return one dict of weights a rank, full of NaN."""
    out = []
    for rank in range(grid.stage * grid.pp):
        weights = {}
        for w in plan.weights.values():
            if grid.holds(w, rank, architecture):
                shape, size = w.rule.shape, grid.sizes[w.rule.shard.group]
                if w.rule.pad:
                    shape = (-(-shape[0] // size) * size, *shape[1:])
                local = w.rule.shard.local_shape(shape, size)
                weights[w.name] = torch.full(local, float("nan"), dtype=dtype)
        out.append(weights)
    return out


def rank_of(weights_of, rank, grid=ONE):
    """Return the Ranks that rank `rank` would see."""
    members = tuple(
        Member(at=grid.at(r), held={n: Held(tuple(w.shape), w.dtype) for n, w in weights.items()})
        for r, weights in enumerate(weights_of)
    )
    return Ranks(rank=rank, size=len(weights_of), sizes=grid.sizes, members=members)


def described(folder, name):
    """Return the plan and the architecture of a folder that holds a case's model."""
    case = CASES[name]
    return plan_for(folder, case), family_of(case).architecture(read_hf_config(folder))


def loaded(folder, name, grid=ONE, dtype=torch.float32):
    """Return the plan and every rank's weights, loaded."""
    plan, architecture = described(folder, name)
    return plan, load_ranks(plan, architecture, folder, grid, dtype)


def load_ranks(plan, architecture, folder, grid=ONE, dtype=torch.float32, others=()):
    """Return every rank's weights, loaded from a folder."""
    weights_of = empty_ranks(plan, architecture, grid, dtype)
    for rank, weights in enumerate(weights_of):
        load([plan, *others], weights, folder, rank_of(weights_of, rank, grid))
    return weights_of


def assemble_all(plan, weights_of, grid=ONE, *, bucket=10**9):
    """Return every HF tensor, from what each simulated rank gives, a bucket of bytes at once."""
    ranks = rank_of(weights_of, 0, grid)
    whole = {n: torch.full(p.shape, float("nan")) for n, p in plan.hf.items()}
    for parts in split(plan, bytes_of(plan, ranks), bucket):
        boxes = {p.name: whole[p.name][p.start : p.stop] for p in parts}
        assert sum(b.nbytes for b in boxes.values()) <= bucket or boxes[parts[0].name].shape[0] == 1
        for (owner, _), transfers in transfers_of(plan, ranks, parts).items():
            scatter(boxes, transfers, flatten(weights_of[owner], transfers))
    return whole
