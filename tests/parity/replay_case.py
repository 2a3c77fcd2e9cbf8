"""GRPO on a model with experts, whose routing in training is what another pass recorded."""

import dataclasses
import zlib

import grpo_case
import numpy as np
from layer_cases import GROUPS, shape
from mcore_rlhf.rollout.native.engine import NativeEngine
from sft_case import SGD

EXPERTS = shape(moe=dataclasses.replace(GROUPS, aux_loss_coeff=0.0), qk_layernorm=True)
LAYERS = 3
OPTIONS = {**SGD, "recompute_granularity": "none", "lr": 0.02, "num_iterations": 2}


class Arbitrary(grpo_case.FixedEngine):
    """Completions and experts that no router would choose, by the request's id alone."""

    def complete(self, request):
        done = super().complete(request)
        rng = np.random.default_rng(zlib.crc32(request.id.encode()) + 1)
        read = len(request.token_ids) + len(done.token_ids)
        routing = np.stack(
            [np.stack([rng.permutation(8)[:3] for _ in range(LAYERS)]) for _ in range(read)]
        ).astype(np.int16)
        routing[-1] = -1
        return dataclasses.replace(done, routing=routing)


def case(mode, engine=Arbitrary, **options):
    base = grpo_case.grpo_case(EXPERTS, **{**OPTIONS, "router_replay_mode": mode, **options})
    return dataclasses.replace(base, engine=engine)


def generated(mode="R3", **options):
    """The same with the native engine."""
    return case(mode, NativeEngine, **options)
