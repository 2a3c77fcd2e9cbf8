"""Units of every task, of which no two micro-batches share the shape."""

import dataclasses
from types import SimpleNamespace

import numpy as np
from layer_cases import GROUPS as EXPERTS
from layer_cases import shape
from mcore_sft.tasks.components import LOSSES
from mcore_sft.tasks.config import EmbeddingConfig, RerankerConfig, TaskConfig
from mcore_sft.tasks.embedding import Embedding
from mcore_sft.tasks.reranker import GenerativeReranker
from mcore_sft.tasks.seq_cls import SequenceClassification
from mcore_sft.tasks.sides import joined
from preference_case import ARCHITECTURES
from preference_case import joined as joined_micros
from sft_case import SGD, VOCAB

from mcore_core.config.template import TemplateConfig
from mcore_core.testing.cases import Case

SHAPES = {
    **ARCHITECTURES,
    # a balancing loss is over a micro-batch: joined ones would have another
    "moe-free": shape(moe=dataclasses.replace(EXPERTS, aux_loss_coeff=0.0), add_qkv_bias=True),
}
GROUPS = (TaskConfig, EmbeddingConfig, RerankerConfig)
RECIPES = {
    "seq_cls": SequenceClassification,
    "embedding": Embedding,
    "generative_reranker": GenerativeReranker,
}
LABELS = 3
ANSWERS = {"yes": VOCAB - 1, "no": 3}
"""On different tensor-parallel ranks."""


class Words:
    """What recipes read of a tokenizer when they do not encode."""

    pad_token_id = None
    unk_token_id = None

    def __call__(self, word, **_):
        return {"input_ids": [ANSWERS[word]]}


TEMPLATE = SimpleNamespace(system=None, max_length=40, config=TemplateConfig(), tokenizer=Words())
BASE = {
    "seq_cls": {"num_labels": LABELS, "lr": 0.05},
    # similarities divided by 0.1 amplify float32 noise
    "embedding": {"infonce_temperature": 0.5, "lr": 0.05},
    "generative_reranker": {"lr": 0.05},
}


def text(rng):
    return rng.integers(0, VOCAB, int(rng.integers(2, 16))).astype(np.int32)


def labelled(rng):
    ids = text(rng)
    weights = np.zeros(len(ids), np.float32)
    weights[-1] = 1.0
    label = np.array([rng.integers(0, LABELS)], np.float64)
    return {"input_ids": ids, "weights": weights, "labels": label, "length": len(ids)}


def asked(rng, *, queries, negatives):
    sides = [text(rng) for _ in range(queries)]
    bad = [text(rng) for _ in range(int(rng.integers(*negatives)))]
    return {**joined(sides, [text(rng)], bad), "label": float(rng.integers(0, 2))}


MAKE = {
    "seq_cls": labelled,
    "embedding": lambda rng: asked(rng, queries=1, negatives=(0, 3)),
    "generative_reranker": lambda rng: asked(rng, queries=0, negatives=(1, 4)),
}


def data(task, steps=3, seed=2, sizes=(2, 1, 3, 2)):
    rng = np.random.default_rng(seed)
    return [[[MAKE[task](rng) for _ in range(n)] for n in sizes] for _ in range(steps)]


def build(task, config):
    made = RECIPES[task](config, TEMPLATE)
    name = config[TaskConfig].loss_type
    if name is not None:
        made.use_losses({c.name: c for c in LOSSES if c.name == name})
    return made


def task_case(task, architecture="qk-norm", *, dp=1, steps=3, **options):
    """`dp` micro-batches are joined: the reference for a run on that many ranks."""
    base = {**SGD, "recompute_granularity": "none", "task_type": task, **BASE[task]}
    lists = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    return Case(
        architecture=SHAPES[architecture],
        recipe=lambda config: build(task, config),
        steps=joined_micros(data(task, steps), dp),
        options={**base, **lists},
        groups=GROUPS,
    )
