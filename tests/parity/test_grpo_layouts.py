"""One run, every layout, rollouts held fixed: losses, metrics, gradients and weights of grpo."""

from functools import cache

import pytest
from grpo_case import grpo_case
from sft_case import LAYOUTS, SGD

from mcore_core.testing.cases import assert_same, run_case

VARIANTS = {
    # two optimizer steps a round, twice: ratios differ from 1, and there is a reference
    "grpo": {"steps_per_generation": 2, "num_iterations": 2, "log_entropy": True},
    "dapo": {
        "loss_type": "dapo",
        "num_iterations": 2,
        "overlong_filter": True,
        "top_entropy_quantile": 0.5,
        "rollout_importance_sampling_mode": "token_truncate",
        "log_rollout_offpolicy_metrics": True,
        "epsilon_high": 0.3,
    },
    "gspo": {
        "importance_sampling_level": "sequence",
        "num_iterations": 2,
        "off_policy_sequence_mask_delta": 0.1,
        "advantage_estimator": "rloo",
    },
    "bnpo": {"loss_type": "bnpo", "num_iterations": 2, "kl_in_reward": True},
}
LORA = {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0.0}
TUNERS = {"full": {}, "lora": LORA}


def options(variant, tuner):
    small = {"lr": 0.03}  # eight steps: rounding grows with each
    return {**SGD, **small, **VARIANTS[variant], **TUNERS[tuner], "recompute_granularity": "none"}


@cache
def _one_rank(variant, tuner):
    return run_case(grpo_case(**options(variant, tuner)), LAYOUTS["one"])


def check(layout, variant, tuner="full"):
    run = run_case(grpo_case(**options(variant, tuner)), LAYOUTS[layout])
    reference = _one_rank(variant, tuner)
    assert len(run.results) == len(reference.results) >= 4
    assert_same(run, reference, relative=2e-5, absolute=2e-6)


def test_the_steps_are_worth_comparing():
    """Ratios leave 1 after the first step, and the KL is not 0."""
    results = _one_rank("grpo", "full").results
    assert len(results) == 8
    assert all(r.metrics["kl"] > 0 for r in results)
    assert results[0].metrics["clip_ratio/region_mean"] == 0
    assert results[4].metrics["clip_ratio/region_mean"] == 0
    assert any(r.metrics["clip_ratio/region_mean"] > 0 for r in results)


@pytest.mark.parametrize(
    ("layout", "variant", "tuner"),
    [
        ("tp2-sp", "dapo", "full"),
        ("pp2", "grpo", "lora"),
        ("cp2", "gspo", "full"),
        ("dp2", "bnpo", "full"),
    ],
)
def test_layout(layout, variant, tuner):
    check(layout, variant, tuner)


@pytest.mark.parity
@pytest.mark.parametrize("variant", ["grpo", "gspo"])
def test_experts(variant):
    """EP2: experts are spread over the two data-parallel ranks."""
    from layer_cases import LAYOUTS as WITH_EXPERTS
    from layer_cases import SHAPES

    case = grpo_case(SHAPES["moe-softmax"], **{**options(variant, "full"), "lr": 0.02})
    run = run_case(case, WITH_EXPERTS["ep2"])
    assert_same(run, run_case(case, LAYOUTS["one"]), relative=5e-5, absolute=5e-6)


@pytest.mark.parity
@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["tp2-sp", "pp2", "pp2-vpp2", "cp2", "dp2", "cp2-tp2-sp"])
def test_grid(layout, variant, tuner):
    check(layout, variant, tuner)
