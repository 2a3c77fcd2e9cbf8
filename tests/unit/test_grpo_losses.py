"""Losses of the GRPO family equal TRL's code in value and gradient; the traps do not spring."""

from functools import partial

import numpy as np
import pytest
import torch
from grpo_tools import Completions
from mcore_rlhf.grpo import loss as losses
from mcore_rlhf.grpo.loss import Constants, policy_loss

CASES = range(100)
NAMES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")


def check(mine, theirs):
    value, gradients, _ = mine
    expected, wanted, _ = theirs
    assert value == pytest.approx(expected, rel=1e-6, abs=2e-7)
    for a, b in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def ours(data, name, constants, **more):
    objective = getattr(losses, name)
    function = partial(policy_loss, objective=objective, c=constants)
    return data.ours(function, divisor=objective.divisor, **more)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_equal_trl(name, level):
    for seed in CASES:
        rng = np.random.default_rng([seed, 1])
        data = Completions(seed)
        beta = float(rng.choice([0.0, 0.3]))
        low, high = rng.uniform(0.05, 0.3, 2)
        delta = None if rng.random() < 0.5 else float(1 + high + rng.uniform(0, 0.5))
        micros = int(rng.choice([1, 2]))
        constants = Constants(
            epsilon=low,
            epsilon_high=high,
            delta=delta,
            beta=beta,
            level=level,
            cispo_max_ratio=1 + high,
        )
        mine = ours(data, name, constants, micros=micros)
        theirs = data.trl(
            micros=micros,
            loss_type=name,
            beta=beta,
            epsilon_low=low,
            epsilon_high=1 + high if name == "cispo" else high,
            delta=delta,
            importance_sampling_level=level,
        )
        check(mine, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_corrections_and_masks_equal_trl(name):
    """Importance correction, off-policy mask and the KL added after both."""
    dropped = 0
    for seed in CASES:
        data = Completions(seed, spread=0.5)
        constants = Constants(beta=0.1, off_policy_sequence_mask_delta=0.05, cispo_max_ratio=1.2)
        mine = ours(data, name, constants, policy=True)
        theirs = data.trl(
            loss_type=name,
            beta=0.1,
            policy=True,
            off_policy_mask_threshold=0.05,
            epsilon_high=1.2 if name == "cispo" else 0.2,
        )
        check(mine, theirs)
        dropped += mine[2]["off_policy_masked"][0] > 0
    assert 10 < dropped < 90


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "bnpo"])
def test_overlong_filter_equals_trl(name):
    """Filtered completions have no loss; dapo does not count their tokens, grpo counts them."""
    for seed in CASES:
        data = Completions(seed)
        data.kept = [True, True, False, True]
        check(ours(data, name, Constants()), data.trl(loss_type=name))


def test_clip_fractions_equal_trl():
    for seed in CASES:
        data = Completions(seed)
        _, _, mine = ours(data, "grpo", Constants(epsilon=0.1, epsilon_high=0.25))
        _, _, theirs = data.trl(epsilon_low=0.1, epsilon_high=0.25)
        for name in ("low_mean", "high_mean", "region_mean"):
            total, count = mine[f"clip_ratio/{name}"]
            assert total / count == pytest.approx(theirs[f"clip_ratio/{name}"][0])
    assert mine["clip_ratio/region_mean"][0] > 0


def test_sequence_token_has_the_sequences_value_and_the_tokens_gradient():
    """GSPO-token against its formula, differentiated by autograd in float64."""
    for seed in CASES:
        data = Completions(seed)
        wide = Constants(level="sequence_token", epsilon=0.99, epsilon_high=50.0)
        value, gradients, _ = ours(data, "grpo", wide)
        expected = 0.0
        for i, trains in enumerate(data.trains):
            mean = float((data.new[i] - data.old[i])[trains].mean())
            expected -= np.exp(mean) * data.advantages[i] / len(data.sizes)
            wanted = -np.exp(mean) * data.advantages[i] / trains.sum() / len(data.sizes) * trains
            np.testing.assert_allclose(gradients[i], wanted, rtol=1e-5, atol=1e-7)
        assert value == pytest.approx(expected, rel=1e-6, abs=2e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
def test_before_the_first_update_the_ratio_is_exactly_one(name, level):
    """Without old log-probabilities they are those of this pass: dropout changes nothing."""
    data = Completions(3)
    seen = []

    def term(ratio_T, *rest):
        seen.append(ratio_T.detach().clone())
        return getattr(losses, name).term(ratio_T, *rest)

    objective = losses.Objective(term, getattr(losses, name).divisor)
    constants = Constants(level=level, epsilon=0.0, epsilon_high=0.0)
    function = partial(policy_loss, objective=objective, c=constants)
    _, gradients, metrics = data.ours(function, divisor=objective.divisor, old=False)
    assert torch.equal(seen[0], torch.ones_like(seen[0]))
    assert metrics["clip_ratio/region_mean"][0] == 0
    assert any(np.abs(g).max() > 0 for g in gradients)


def test_delta_bounds_only_the_branch_that_is_not_clipped():
    """With A < 0 and a huge ratio the loss is delta |A|; without delta it would be r |A|."""
    data = Completions(0, sizes=(1,))
    data.new, data.old = [np.array([0.0])], [np.array([-3.0])]
    data.advantages = np.array([-1.0])
    assert ours(data, "grpo", Constants())[0] == pytest.approx(np.exp(3.0))
    assert ours(data, "grpo", Constants(delta=1.5))[0] == pytest.approx(1.5)
    data.advantages = np.array([1.0])
    assert ours(data, "grpo", Constants(delta=1.5))[0] == pytest.approx(-1.2)


def test_cispos_bound_is_its_own():
    """Ratios between 1.2 and 5 are not cut by epsilon."""
    data = Completions(0, sizes=(1,))
    data.new, data.old = [np.array([0.0])], [np.array([-1.0])]
    data.advantages, data.trains = np.array([1.0]), [np.array([True])]
    (gradient,) = ours(data, "cispo", Constants())[1]
    assert gradient[0] == pytest.approx(-np.e)
    data.old = [np.array([-3.0])]
    assert ours(data, "cispo", Constants())[1][0][0] == pytest.approx(-5.0)


@pytest.mark.parametrize("name", ["dapo", "cispo"])
def test_tokens_of_the_whole_step_are_counted_once(name):
    """However the step is cut into micro-batches, the loss is the same."""
    data = Completions(5, sizes=(9, 2, 4, 1, 6, 3))
    whole = ours(data, name, Constants())
    for micros in (2, 3, 6):
        cut = ours(data, name, Constants(), micros=micros)
        assert cut[0] == pytest.approx(whole[0], rel=1e-9)
        for a, b in zip(cut[1], whole[1], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_steps_of_a_generation_divide_nothing():
    """TRL counts the tokens of a generation and rescales them; a step here counts its own."""
    data = Completions(5)
    for name in ("dapo", "cispo"):
        constants = Constants(cispo_max_ratio=1.2)
        theirs = data.trl(loss_type=name, rounds=3, epsilon_high=1.2 if name == "cispo" else 0.2)
        check(ours(data, name, constants), theirs)


def test_what_does_not_train_has_no_gradient_even_where_it_is_not_finite():
    data = Completions(2)
    for i, trains in enumerate(data.trains):
        data.new[i] = np.where(trains, data.new[i], -np.inf)
    value, gradients, _ = ours(data, "grpo", Constants(beta=0.1))
    assert np.isfinite(value)
    for g, trains in zip(gradients, data.trains, strict=True):
        assert np.isfinite(g).all()
        assert not g[~trains].any()
