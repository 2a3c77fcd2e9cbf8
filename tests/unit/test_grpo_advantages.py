"""Advantages equal TRL's code or a float64 reference; importance correction equals its formulas."""

import inspect
import math
import textwrap
from functools import cache

import numpy as np
import pytest
import torch
from mcore_rlhf.grpo.advantages import (
    advantages,
    gdpo_advantages,
    group_std,
    weighted,
    with_kl,
)
from mcore_rlhf.grpo.correction import Sampled, diagnostics, importance
from trl.trainer import grpo_trainer, rloo_trainer
from trl.trainer.utils import nanstd

CASES = range(100)


@cache
def compiled(function, first, last):
    """The stretch of lines of a function of TRL."""
    source = textwrap.dedent(inspect.getsource(function)).splitlines()
    start = next(i for i, line in enumerate(source) if first in line)
    stop = next(i for i, line in enumerate(source) if i > start and last in line)
    return compile(textwrap.dedent("\n".join(source[start : stop + 1])), "trl", "exec")


def lines_of(function, first, last, **names):
    """Run a stretch of lines of a function of TRL; return its local variables."""
    scope = {"torch": torch, "nanstd": nanstd, "math": math, **names}
    exec(compiled(function, first, last), scope)
    return scope


class Trainer:
    """The attributes that TRL's lines read."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


def trl_advantages(rewards_NF, weights_F, group, scale, gdpo=False):
    functions = rewards_NF.shape[1]
    trainer = Trainer(
        multi_objective_aggregation="normalize_then_sum" if gdpo else "sum_then_normalize",
        scale_rewards=scale,
        reward_weights=torch.tensor(weights_F),
        reward_funcs=[None] * functions,
    )
    scope = lines_of(
        grpo_trainer.GRPOTrainer._generate_and_score_completions,
        "unscorable_mask = torch.isnan",
        "advantages = torch.nan_to_num",
        rewards_per_func=torch.tensor(rewards_NF),
        self=trainer,
        num_generations=group,
        device="cpu",
    )
    return scope["advantages"].numpy()


def rewards(seed, functions=1, group=4, prompts=3):
    rng = np.random.default_rng(seed)
    kind = rng.integers(3)
    shape = (prompts * group, functions)
    if kind == 0:
        return rng.normal(0, 2, shape)
    if kind == 1:
        return rng.integers(0, 2, shape).astype(float)
    values = rng.normal(0, 2, shape)
    values[:group] = 0.1  # equal rewards whose mean is not exact
    return values


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpo_equals_trl(scale):
    for seed in CASES:
        values, group = rewards(seed), 4 if seed % 2 else 2
        mine = advantages(values[:, 0], group, scale=scale)
        theirs = trl_advantages(values, np.ones(1), group, scale)
        np.testing.assert_allclose(mine, theirs, rtol=1e-7, atol=1e-7)


def test_several_rewards_equal_trl_where_all_apply():
    for seed in CASES:
        values = rewards(seed, functions=3)
        weights = np.random.default_rng(seed).normal(0, 1, 3)
        mine = advantages(weighted(values, weights), 4)
        np.testing.assert_allclose(
            mine, trl_advantages(values, weights, 4, "group"), rtol=1e-7, atol=1e-7
        )


def test_gdpo_equals_trl():
    for seed in CASES:
        values = rewards(seed, functions=2) + np.random.default_rng(seed).normal(0, 1, (12, 2))
        weights = np.array([1.0, 0.3])
        mine = gdpo_advantages(values, weights, 4, epsilon=1e-4)
        np.testing.assert_allclose(
            mine, trl_advantages(values, weights, 4, "batch", gdpo=True), rtol=1e-7, atol=1e-7
        )


def test_gdpo_makes_nothing_of_groups_without_a_spread():
    """Rounding divided by 1e-8 and whitened would give advantages near 1."""
    values = np.full((8, 2), 0.1)
    values[:4, 1] = 0.3
    assert not gdpo_advantages(values, np.ones(2), 4).any()


def test_rloo_equals_trl():
    for seed in CASES:
        values = rewards(seed)[:, 0]
        scope = lines_of(
            rloo_trainer.RLOOTrainer._generate_and_score_completions,
            "grouped_rewards = rewards.view",
            "advantages = torch.nan_to_num",
            rewards=torch.tensor(values),
            num_generations=4,
            self=Trainer(normalize_advantages=False),
        )
        mine = advantages(values, 4, estimator="rloo", scale="none")
        np.testing.assert_allclose(mine, scope["advantages"].numpy(), rtol=1e-7, atol=1e-7)


def test_reinforce_plus_plus_is_scaled_by_the_advantages_of_the_batch():
    for seed in CASES:
        values = rewards(seed)[:, 0]
        centred = (values.reshape(-1, 4) - values.reshape(-1, 4).mean(1, keepdims=True)).reshape(-1)
        wanted = centred / (centred.std(ddof=1) + 1e-4)
        mine = advantages(values, 4, estimator="reinforce_plus_plus", scale="batch")
        np.testing.assert_allclose(mine, wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_plus_plus"])
def test_a_group_of_one_has_no_advantage(estimator):
    values = np.array([1.0, 5.0, -2.0])
    assert not advantages(values, 1, estimator=estimator, scale="group").any()
    assert not group_std(values, 1).any()


def test_equal_rewards_have_exactly_no_advantage():
    values = np.array([0.1, 0.1, 0.1, 1.0, 0.0, 0.0])
    assert not advantages(values, 3)[:3].any()
    assert group_std(values, 3)[0] == 0.0


def test_a_completion_that_could_not_be_scored_moves_nothing():
    """As in TRL: it has advantage 0, and no baseline counts it."""
    values = np.array([1.0, np.nan, 0.0, 0.5])
    mine = advantages(values, 4)
    assert mine[1] == 0.0
    theirs = trl_advantages(values[:, None], np.ones(1), 4, "group")
    np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_what_does_not_apply_leaves_its_weight_to_the_others():
    values = np.array([[1.0, np.nan], [1.0, 3.0], [np.nan, np.nan]])
    found = weighted(values, np.array([0.5, 1.5]))
    np.testing.assert_allclose(found[:2], [2.0, 5.0])
    assert np.isnan(found[2])
    # a reward of weight 0 that is the only one to apply gives 0, not a division by 0
    assert weighted(np.array([[np.nan, 3.0]]), np.array([1.0, 0.0]))[0] == 0.0


def test_kl_in_the_reward():
    np.testing.assert_allclose(
        with_kl(np.array([1.0, 2.0]), np.array([0.5, -1.0]), 0.1), [0.95, 2.1]
    )


# -- importance correction -------------------------------------------------------------------------


def sampled(seed, n=6):
    rng = np.random.default_rng(seed)
    old = rng.normal(-1, 1, n)
    trains = rng.random(n) < 0.7
    trains[0] = True
    return old, old + rng.normal(0, 0.8, n), trains


@pytest.mark.parametrize(
    "mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
)
def test_importance_equals_its_formula(mode):
    hit = 0
    for seed in CASES:
        old, rollout, trains = sampled(seed)
        threshold = 1.3
        found = importance(old, rollout, trains, mode=mode, threshold=threshold)
        ratios = [math.exp(a - b) for a, b in zip(old, rollout, strict=True)]
        kept = [math.log(r) for r, t in zip(ratios, trains, strict=True) if t]
        mean = math.exp(sum(kept) / len(kept))
        for i, ratio in enumerate(ratios):
            wanted = {
                "token_truncate": min(ratio, threshold),
                "token_mask": ratio if ratio <= threshold else 0.0,
                "sequence_truncate": min(mean, threshold),
                "sequence_mask": ratio if mean <= threshold else 0.0,
            }[mode]
            assert found[i] == pytest.approx(wanted if trains[i] else 1.0, rel=1e-6)
            hit += wanted in (0.0, threshold)
    assert hit > 20


def test_importance_is_bounded_and_survives_missing_numbers():
    trains = np.ones(3, bool)
    old, rollout = np.array([0.0, -1.0, -1.0]), np.array([-1000.0, np.nan, -1.0])
    found = importance(old, rollout, trains, mode="token_mask", threshold=1e12)
    np.testing.assert_allclose(found, [math.exp(20), 1.0, 1.0], rtol=1e-6)


def test_diagnostics_equal_their_formulas_and_vanish_where_nothing_differs():
    for seed in CASES:
        old, rollout, trains = sampled(seed)
        other, other_rollout, other_trains = sampled(seed + 1000, n=9)
        parts = [
            Sampled(old[trains], rollout[trains]),
            Sampled(other[other_trains], other_rollout[other_trains]),
        ]
        found = diagnostics(parts, threshold=2.0)
        diff = np.concatenate([p.old - p.rollout for p in parts])
        w = np.exp(diff)
        assert found["rollout/kl"] == pytest.approx(-diff.mean())
        assert found["rollout/k3_kl"] == pytest.approx((w - diff - 1).mean())
        assert found["rollout/chi2_token"] == pytest.approx((w * w).mean() - 1)
        ppl = np.mean([np.exp(-p.old.mean()) for p in parts])
        assert found["rollout/training_ppl"] == pytest.approx(ppl)
        assert found["rollout/is_clipped"] == pytest.approx((w > 2).mean())
    same = diagnostics([Sampled(old, old)], threshold=2.0)
    for name in ("kl", "k3_kl", "abs_diff_max", "chi2_token", "chi2_seq", "log_ppl_diff"):
        assert same[f"rollout/{name}"] == 0.0
