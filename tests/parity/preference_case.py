"""Pairs and labelled answers that no two micro-batches share the shape of."""

from itertools import chain
from types import SimpleNamespace

import numpy as np
from layer_cases import GROUPS, shape
from mcore_rlhf.config import ReferenceConfig, RLHFConfig
from mcore_rlhf.dpo.config import DPOConfig
from mcore_rlhf.dpo.recipe import DPORecipe
from mcore_rlhf.kto.config import KTOConfig
from mcore_rlhf.kto.recipe import KTORecipe
from mcore_rlhf.rm.config import RMConfig
from mcore_rlhf.rm.recipe import RMRecipe
from sft_case import SGD, SHAPES, VOCAB

from mcore_core.config.template import TemplateConfig
from mcore_core.testing.cases import Case

ARCHITECTURES = {**SHAPES, "moe": shape(moe=GROUPS, add_qkv_bias=True)}
TEMPLATE = SimpleNamespace(
    system=None,
    max_length=40,
    config=TemplateConfig(loss_scale="last_round"),
    tokenizer=SimpleNamespace(pad_token_id=None),
)
"""What recipes read of a template when they do not encode."""
GROUPS_OF = {
    "dpo": (RLHFConfig, DPOConfig, ReferenceConfig),
    "kto": (RLHFConfig, KTOConfig, ReferenceConfig),
    "rm": (RLHFConfig, RMConfig),
}
RECIPES = {"dpo": DPORecipe, "kto": KTORecipe, "rm": RMRecipe}
GATHERED = {"dpo": ("aot", "aot_unpaired", "bco_pair")}
MIXED = "sigmoid,ipo,apo_down,sft,orpo"
"""Losses of every kind: sums and means, with and without a reference, and the NLL."""


def side(rng):
    prompt, answer = int(rng.integers(1, 8)), int(rng.integers(1, 12))
    weights = np.repeat(np.float32([0, 1]), [prompt, answer])
    if rng.random() < 0.3:
        weights[-1] = 0.0
    weights[prompt] = 1.0
    return rng.integers(0, VOCAB, prompt + answer).astype(np.int32), weights, prompt


def pairs(rng, count):
    found = []
    for _ in range(count):
        (a, wa, _), (b, wb, _) = side(rng), side(rng)
        found.append(
            {
                "input_ids": np.concatenate((a, b)),
                "weights": np.concatenate((wa, wb)),
                "chosen_length": len(a),
                "length": len(a) + len(b),
                "margin": float(rng.random()),
            }
        )
    return found


def answers(rng, count):
    """One micro-batch in two has a single class."""
    found, alike = [], rng.random() < 0.5
    label = int(rng.random() < 0.5)
    for _ in range(count):
        ids, weights, prompt = side(rng)
        found.append(
            {
                "input_ids": ids,
                "weights": weights,
                "prompt_length": prompt,
                "label": label if alike else int(rng.random() < 0.5),
                "length": len(ids),
            }
        )
    return found


def data(recipe, steps=3, seed=1, sizes=(2, 1, 3, 2)):
    rng = np.random.default_rng(seed)
    make = answers if recipe == "kto" else pairs
    return [[make(rng, size) for size in sizes] for _ in range(steps)]


def joined(steps, dp):
    """The same data for one rank: micro-batches that stood on `dp` ranks at once are one."""
    return [
        [list(chain.from_iterable(step[i : i + dp])) for i in range(0, len(step), dp)]
        for step in steps
    ]


OPTIONS = {
    "dpo": {"lr": 0.5, "loss_type": MIXED, "beta": 0.3},
    "kto": {"lr": 0.5, "beta": 0.3, "desirable_weight": 1.3},
    "rm": {"lr": 0.05, "center_rewards_coefficient": 0.05},
}


def build(recipe, config):
    return RECIPES[recipe](config, TEMPLATE)


def preference_case(recipe, architecture="qk-norm", *, dp=1, steps=3, **options):
    """`dp` micro-batches are joined: the reference for a run on that many ranks."""
    base = {**SGD, "recompute_granularity": "none", **OPTIONS[recipe]}
    return Case(
        architecture=ARCHITECTURES[architecture],
        recipe=lambda config: build(recipe, config),
        steps=joined(data(recipe, steps), dp),
        options={k: list(v) if isinstance(v, tuple) else v for k, v in {**base, **options}.items()},
        groups=GROUPS_OF[recipe],
    )
