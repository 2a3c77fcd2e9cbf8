"""Distillation on answers that no two micro-batches share the shape of."""

import dataclasses

import numpy as np
from mcore_rlhf.gkd.plugin import GKDPlugin
from mcore_rlhf.gkd.recipe import GKDRecipe
from sft_case import SGD, SHAPE, VOCAB

from mcore_core.testing.cases import Case

STUDENT = dataclasses.replace(SHAPE, qk_layernorm=True)
TEACHERS = {
    # deeper, wider, and a vocabulary that is larger, or smaller, than the student's
    "larger": dataclasses.replace(
        SHAPE, num_layers=8, hidden_size=48, vocab_size=VOCAB + 8, add_qkv_bias=True
    ),
    "smaller": dataclasses.replace(SHAPE, hidden_size=16, vocab_size=VOCAB - 8),
    "tied": dataclasses.replace(SHAPE, tie_word_embeddings=True),
}


def recipe(config):
    class Bare(GKDRecipe):
        """Without a tokenizer: answers end by their length."""

    made = Bare(config, Tokenizer())
    return made


class Tokenizer:
    """What stands for the template: it only samples."""

    class tokenizer:
        eos_token_id = None
        name_or_path = ""


def engine(context):
    from mcore_rlhf.rollout.native.engine import NativeEngine

    return NativeEngine(context)


def units(rng, *, masked):
    found = []
    for _ in range(rng.integers(1, 4)):
        prompt, answer = int(rng.integers(1, 9)), int(rng.integers(2, 16))
        ids = rng.integers(0, VOCAB - 8, prompt + answer).astype(np.int32)
        weights = np.zeros(prompt + answer, np.float32)
        weights[prompt:] = rng.choice([0.5, 1.0, 2.0]) * (rng.random(answer) < 0.8)
        found.append(
            {
                "input_ids": ids,
                "weights": weights * (not masked),
                "prompt_ids": ids[:prompt],
                "length": prompt + answer,
            }
        )
    return found


PLAIN = {"lmbda": 0.0, "beta": 0.3, "temperature": 0.9, "sft_alpha": 0.2}
GROUPS = tuple(GKDPlugin().mcore_config_groups())


def data():
    rng = np.random.default_rng(0)
    return [[units(rng, masked=i == 2) for i in range(4)] for _ in range(3)]


def case(teacher="larger", **options):
    plain = {**PLAIN, **SGD}
    return Case(
        architecture=STUDENT,
        recipe=recipe,
        steps=data(),
        options={"max_completion_length": 6, **plain, **options},
        groups=GROUPS,
        frozen={"teacher": TEACHERS[teacher]},
        engine=engine,
    )
