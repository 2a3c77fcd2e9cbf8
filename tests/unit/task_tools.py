"""Recipes of tasks without a model or ranks, and random units for them."""

from mcore_core import compat

compat.apply()  # before anything imports megatron

import numpy as np  # noqa: E402
import torch  # noqa: E402
from data_tools import make_template  # noqa: E402
from mcore_sft.config import SFTConfig  # noqa: E402
from mcore_sft.tasks.config import EmbeddingConfig, RerankerConfig, TaskConfig  # noqa: E402
from mcore_sft.tasks.embedding import Embedding  # noqa: E402
from mcore_sft.tasks.reranker import GenerativeReranker  # noqa: E402
from mcore_sft.tasks.seq_cls import SequenceClassification  # noqa: E402
from mcore_sft.tasks.sides import joined  # noqa: E402

from mcore_core.config.kernel import kernel_config  # noqa: E402
from mcore_core.parallel.reduce import RowReduce  # noqa: E402
from mcore_core.protocols import HeadOut  # noqa: E402

GROUPS = (SFTConfig, TaskConfig, EmbeddingConfig, RerankerConfig)
RECIPES = {
    "seq_cls": SequenceClassification,
    "embedding": Embedding,
    "generative_reranker": GenerativeReranker,
}
ANSWERS = {"reranker_positive_token": "y", "reranker_negative_token": "n"}
"""The tokenizer of the tests has a token for each byte."""


def config(**options):
    return kernel_config(*GROUPS, **options)


def recipe(task, *, template=None, **options):
    if task == "generative_reranker":
        options = {**ANSWERS, **options}
    made = RECIPES[task](config(task_type=task, **options), template or make_template())
    if options.get("loss_type"):
        from mcore_sft.tasks.components import LOSSES

        made.use_losses({c.name: c for c in LOSSES if c.name == options["loss_type"]})
    return made


def ids(rng, longest=7):
    return rng.integers(0, 50, rng.integers(1, longest)).astype(np.int32)


def documents(rng, *, positives=(1, 2), negatives=(0, 4), queries=1, label=None):
    """A unit of random texts: so many positives and negatives, as ranges."""
    sides = [ids(rng) for _ in range(queries)]
    good, bad = ([ids(rng) for _ in range(rng.integers(*r))] for r in (positives, negatives))
    unit = joined(sides, good, bad)
    return unit if label is None else {**unit, "label": label}


def reduce_of(batch):
    """The reductions of one rank: it has every token."""
    numbers = torch.repeat_interleave(torch.arange(len(batch.lengths)), torch.tensor(batch.lengths))
    return RowReduce(numbers, torch.ones(len(batch.lengths), dtype=torch.bool))


def loss_of(made, units, values_SN):
    """What the recipe says where the head gives these numbers, one row a sequence."""
    batch = made.collate(units)
    kept = batch.weights_T.nonzero().squeeze(-1)
    assert len(kept) == len(values_SN) == len(batch.lengths)
    out = HeadOut(logps_T=torch.zeros(len(kept)), values_TN=values_SN)
    return made.loss(out, batch, reduce_of(batch).take(kept))


CASES = 100
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def compare(made, units, values, reference):
    """Value and gradient of the recipe's mean against those of the reference's."""
    mine, theirs = (torch.tensor(values, requires_grad=True) for _ in range(2))
    out = loss_of(made, units, mine)
    wanted = reference(theirs)
    torch.testing.assert_close(out.total / out.count, wanted, **EXACT)
    (out.total / out.count).backward()
    wanted.backward()
    torch.testing.assert_close(mine.grad, theirs.grad, **EXACT)
    return out


def mean(values):
    return torch.stack(list(values)).mean()
