"""Recipes that read scores, hidden states and logits, with losses that couple sequences."""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from sft_case import SGD, SHAPE, SHAPES, VOCAB
from torch import Tensor

from mcore_core.data.collate import last_token, pack_marked
from mcore_core.protocols import Batch, HeadSpec, LossOutput
from mcore_core.testing.cases import Case

TOKENS = (3, VOCAB - 1)
HEADS = {
    "scores": HeadSpec(output="scores", scores=3),
    "hidden": HeadSpec(output="hidden"),
    "logits": HeadSpec(output="logits", tokens=TOKENS, temperature=0.7),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedBatch(Batch):
    labels_S: Tensor


class Coupled:
    """Every sequence against those of all ranks: a softmax over products with each of them."""

    token_local = False

    def __init__(self, head):
        self.head = head
        self.frozen = {}

    def prepare(self, units, run):
        yield units

    def collate(self, units):
        fields = pack_marked([(u["input_ids"], last_token(u["input_ids"], 0)) for u in units])
        labels = torch.tensor([u["label"] for u in units])
        return MarkedBatch(**fields, labels_S=labels)

    def loss(self, out, batch, reduce, /):
        values_SN = reduce.per_seq(out.values_TN)
        everyone_GN = reduce.gather_seqs(values_SN)
        labels_G = reduce.gather_seqs(batch.labels_S)
        mine = reduce.rows_of_gathered(len(values_SN))
        near_SG = values_SN @ everyone_GN.t() / 7
        want_SG = (batch.labels_S[:, None] - labels_G[None]).abs().float()
        own = torch.arange(len(labels_G), device=near_SG.device)[mine]
        near_SG = near_SG.scatter(1, own[:, None], 0.0)
        loss_S = ((near_SG - want_SG) ** 2).mean(1) * (1 + batch.labels_S)
        loss_S = torch.where(reduce.owns_S, loss_S, 0.0)
        count = reduce.owns_S.sum()
        spread = (values_SN.detach().abs().sum(1) * reduce.owns_S).sum()
        return LossOutput(loss_S.sum(), count, {"spread": (spread, count)})


def units(rng, *, gathered):
    """`gathered` micro-batches of a step stand on as many ranks and are coupled."""
    found = []
    for _ in range(gathered):
        ids = rng.integers(1, VOCAB, int(rng.integers(3, 24))).astype(np.int32)
        found.append({"input_ids": ids, "label": int(rng.integers(0, 3)), "length": len(ids)})
    return found


def data(steps=3, micros=4, seed=0, sizes=(2, 3, 1, 4)):
    rng = np.random.default_rng(seed)
    return [[units(rng, gathered=sizes[i % 4]) for i in range(micros)] for _ in range(steps)]


def joined(steps, dp):
    """The same data for one rank: micro-batches that stood on `dp` ranks at once are one."""
    return [
        [list(chain.from_iterable(step[i : i + dp])) for i in range(0, len(step), dp)]
        for step in steps
    ]


def head_case(name, shape="qk-norm", *, dp=1, **options):
    """`dp` micro-batches are joined: the reference for a run on that many ranks."""
    return Case(
        architecture=SHAPES.get(shape, SHAPE),
        recipe=lambda _: Coupled(HEADS[name]),
        steps=joined(data(), dp),
        options={**SGD, "lr": 0.02, "recompute_granularity": "none", **options},
    )
