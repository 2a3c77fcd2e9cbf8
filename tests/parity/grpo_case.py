"""GRPO with an engine whose completions are fixed: the same tokens whatever the layout."""

import json
import zlib
from pathlib import Path

import numpy as np
from mcore_rlhf.config import ReferenceConfig, RLHFConfig
from mcore_rlhf.grpo.config import GRPOConfig
from mcore_rlhf.grpo.recipe import GRPORecipe
from mcore_rlhf.rollout.config import GenerationConfig, RolloutConfig
from mcore_rlhf.rollout.native.config import NativeConfig
from sft_case import SHAPES, VOCAB

from mcore_core.protocols import Completion
from mcore_core.testing.cases import Case

GROUPS = (RLHFConfig, GRPOConfig, GenerationConfig, RolloutConfig, NativeConfig, ReferenceConfig)
REWARD = f"{Path(__file__).parent / 'grpo_reward.py'}:parity"


class FixedEngine:
    """Completions that depend on the request's id alone."""

    def __init__(self, context=None):
        self.waiting, self.version = [], 0

    def submit(self, requests):
        self.waiting += requests

    def poll(self, *, wait=True):
        found = [self.complete(request) for request in self.waiting]
        self.waiting = []
        return found[::-1]  # an engine keeps no order

    def complete(self, request):
        rng = np.random.default_rng(zlib.crc32(request.id.encode()))
        n = int(rng.integers(1, request.sampling.max_tokens + 1))
        cut = n == request.sampling.max_tokens
        return Completion(
            request.id,
            tuple(rng.integers(2, VOCAB, n).tolist()),
            rng.normal(-3, 1, n).astype(np.float32),
            np.full(n, self.version, np.int64),
            "length" if cut else "stop",
            np.ones(n, bool),
        )

    def cancel(self, ids):
        self.waiting = [r for r in self.waiting if r.id not in set(ids)]

    def update_weights(self, *, step):
        self.version = step

    def sleep(self):
        """Nothing to give back."""

    wake = close = sleep


class Words:
    """As much of a tokenizer as the recipe asks for."""

    eos_token_id, name_or_path = 1, None

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


class Plain:
    """As much of a template."""

    tokenizer, system = Words(), None


def prompts(rng, number):
    found = []
    for _ in range(number):
        n = int(rng.integers(2, 12))
        message = {"role": "user", "content": str(n)}
        kept = {"row": {"prompt": str(n)}, "messages": [message]}
        ids = rng.integers(2, VOCAB, n).astype(np.int32)
        found.append({"input_ids": ids, "length": n, "row": json.dumps(kept)})
    return found


BASE = {
    "global_batch_size": 8,
    "micro_batch_size": 2,
    "num_generations": 4,
    "max_completion_length": 14,
    "reward_funcs": [REWARD],
    "beta": 0.1,
}


def build(config):
    return GRPORecipe(config, Plain())


def data(options, rounds=2):
    rng = np.random.default_rng(3)
    size = options["global_batch_size"] * options.get("steps_per_generation", 1)
    number = size // options["num_generations"]
    return [[prompts(rng, number)] for _ in range(rounds)]


def grpo_case(shape="qk-norm", rounds=2, **options):
    """A global batch of 8 completions, 4 of each prompt, in micro-batches of 2."""
    chosen = {**BASE, **options}
    return Case(
        architecture=SHAPES[shape] if isinstance(shape, str) else shape,
        recipe=build,
        steps=data(chosen, rounds),
        options=chosen,
        groups=GROUPS,
        engine=FixedEngine,
    )
