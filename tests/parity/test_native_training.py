"""The native engine says of its tokens what training says: rollouts have no mismatch."""

import dataclasses

import numpy as np
import pytest
from grpo_case import grpo_case
from layer_cases import LAYOUTS, SHAPES
from mcore_rlhf.rollout.native.engine import NativeEngine
from sft_case import SGD

from mcore_core.testing.cases import Session
from mcore_core.testing.ranks import fork_ranks

OPTIONS = {
    **SGD,
    "lr": 0.02,
    "recompute_granularity": "none",
    "temperature": 0.8,
    "top_k": 20,
    "num_iterations": 2,
    "log_rollout_offpolicy_metrics": True,
}


def generated(layout, shape, **options):
    """Two rounds, in which the policy has moved; the engine's and training's log-probabilities."""

    def one(_):
        case = grpo_case(shape, **{**OPTIONS, **options})
        session = Session(dataclasses.replace(case, engine=NativeEngine), LAYOUTS[layout])
        seen, recipe = [], session.stepper.recipe
        assembler = recipe.parts[2]

        def assemble(sampled, run, steps):
            found = type(assembler).__call__(assembler, sampled, run, steps)
            seen.extend((u["old"][u["trains"]], u["rollout"][u["trains"]]) for u in found.units)
            return found

        recipe._parts = (*recipe.parts[:2], assemble)
        return seen, [r.metrics for r in session.train(2)]

    return fork_ranks(one, LAYOUTS[layout].world)


def check(layout, shape, **options):
    for seen, metrics in generated(layout, shape, **options):
        assert len(seen) == 16 and len(metrics) == 4
        for old, rollout in seen:
            assert np.abs(old - rollout).max() < 1e-5
        for step in metrics:
            assert step["rollout/abs_diff_max"] < 1e-5
            assert abs(step["rollout/kl"]) < 2e-6
            assert 0 <= step["rollout/k3_kl"] < 1e-10
            assert abs(step["rollout/log_ppl_diff"]) < 2e-6
            assert abs(step["rollout/ess"] - 1) < 1e-9
            assert step["rollout/is_clipped"] == 0


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2"])
def test_layout(layout):
    check(layout, "qk-norm")


def test_experts():
    check("ep2", SHAPES["moe-softmax"])


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["one", "tp2", "pp2", "cp2", "dp2", "tp2-pp2-sp"])
@pytest.mark.parametrize("shape", ["postnorm", "mla", "gdn"])
def test_grid(layout, shape):
    check(layout, SHAPES[shape])


def test_adapters():
    """They are part of what generates: the second round differs from the base model."""
    check("one", "qk-norm", tuner_type="lora", lora_rank=4, lora_dropout=0.1)
