"""dpo, kto and rm: losses, metrics, gradients and three steps of every layout equal one rank's."""

import math
from functools import cache

import pytest
import torch
from preference_case import RECIPES, data, preference_case
from sft_case import ADAM, LAYOUTS

from mcore_core.parallel.topology import Layout
from mcore_core.testing.cases import Session, assert_same, run_case
from mcore_core.testing.ranks import fork_ranks

ALL = {**LAYOUTS, "ep2": Layout(world=2, ep=2), "ep2-tp2-sp": Layout(world=2, tp=2, sp=True, ep=2)}
REWARD = 1e-6
"""Rewards are small differences of sums of 10 to 50 nats in float32."""
MOE = {"ep2", "ep2-tp2-sp"}


@cache
def _one_rank(recipe, architecture, dp, options):
    case = preference_case(recipe, architecture, dp=dp, **dict(options))
    return run_case(case, LAYOUTS["one"])


def check(recipe, layout, architecture="qk-norm", *, joined=False, **options):
    dp = ALL[layout].dp if joined else 1
    reference = _one_rank(recipe, architecture, dp, tuple(options.items()))
    assert len(set(reference.losses)) == 3
    run = run_case(preference_case(recipe, architecture, **options), ALL[layout])
    assert_same(run, reference, relative=1e-5, absolute=REWARD)


def test_the_data_is_uneven():
    for recipe in RECIPES:
        for step in data(recipe):
            tokens = [sum(u["length"] for u in micro) for micro in step]
            assert len(set(tokens)) == len(tokens)
    labels = [{u["label"] for u in micro} for step in data("kto") for micro in step]
    assert {0} in labels or {1} in labels
    assert {0, 1} in labels


def test_the_reference_differs_from_the_policy_and_every_weight_trains():
    run = _one_rank("dpo", "qk-norm", 1, ())
    first = run.results[0].metrics
    assert abs(first["rewards/margins"]) > 1e-3
    assert min(r.grad_norm for r in run.results) > 0.1
    for key, gradient in run.gradients[0].items():
        assert gradient.abs().max() > 1e-6, key


@pytest.mark.parametrize(
    ("recipe", "layout", "architecture"),
    [
        ("dpo", "tp2-sp", "tied"),
        ("dpo", "pp2-vpp2", "qk-norm"),
        ("dpo", "cp2", "qk-norm"),
        ("dpo", "dp2", "qk-norm"),
        ("kto", "pp2", "qk-norm"),
        ("kto", "dp2", "qk-norm"),
        ("rm", "cp2", "qk-norm"),
        ("rm", "tp2-sp", "qk-norm"),
    ],
)
def test_layout(recipe, layout, architecture):
    check(recipe, layout, architecture)


@pytest.mark.parametrize(
    ("loss", "layout"), [("aot_unpaired,bco_pair", "dp2"), ("bco_pair", "pp2"), ("aot", "cp2")]
)
def test_losses_over_the_gathered_micro_batch(loss, layout):
    check("dpo", layout, joined=True, loss_type=loss)


def test_sorting_over_ranks_is_not_sorting_on_each():
    """The gathered micro-batch matters: one rank with unjoined micro-batches gives another loss."""
    joined = _one_rank("dpo", "qk-norm", 2, (("loss_type", "aot_unpaired"),))
    apart = _one_rank("dpo", "qk-norm", 1, (("loss_type", "aot_unpaired"),))
    assert joined.losses[0] != pytest.approx(apart.losses[0], rel=1e-4)


LORA = {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0.1}
"""Scores are made in eval mode, so the reference and kto's estimate know no dropout; the training
pass has it, with masks that a layout does not change."""


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [
        ("dpo", "tp2-sp"),
        *(
            pytest.param(r, x, marks=pytest.mark.parity)
            for r in RECIPES
            for x in ("tp2-sp", "pp2", "cp2", "dp2", "ep2")
            if (r, x) != ("dpo", "tp2-sp")
        ),
    ],
)
def test_lora(recipe, layout):
    """The reference is the policy with its adapters off."""
    options = {**LORA, "lora_dropout": 0.0, "lr": 0.1}
    if recipe == "rm":
        options |= {"modules_to_save": ("score",), "lr": 0.01}
    check(recipe, layout, "moe" if layout in MOE else "qk-norm", **options)


def test_the_ratio_of_lora_without_adapters_is_one():
    """With dropout in training and adapters that add nothing, policy and reference still agree."""
    case = preference_case("dpo", loss_type="sigmoid", **LORA)

    def first(_):
        session = Session(case, LAYOUTS["one"])
        with torch.no_grad():
            for chunk in session.chunks:
                for name, parameter in chunk.named_parameters():
                    if parameter.requires_grad and "_B" in name:
                        parameter.zero_()
        return session.train(1)[0]

    (result,) = fork_ranks(first, 1)
    assert result.loss == pytest.approx(math.log(2), abs=1e-6)
    assert result.metrics["rewards/margins"] == pytest.approx(0.0, abs=1e-6)


def test_scores_know_no_dropout():
    """Those of a policy that trains with dropout are those of one without, to the bit."""

    def scored(dropout):
        def first(_):
            case = preference_case("dpo", **{**LORA, "lora_dropout": dropout})
            units = [unit for micro in case.steps[0] for unit in micro]
            session = Session(case, LAYOUTS["one"])
            return [logps for logps, _ in session.models.score("policy", units)]

        (found,) = fork_ranks(first, 1)
        return found

    for with_dropout, without in zip(scored(0.5), scored(0.0), strict=True):
        assert (with_dropout == without).all()
        assert with_dropout.any()


def test_the_estimate_of_lora_sees_the_adapters():
    """kto's scores of the policy are those that it trains on; the reference's are others."""
    options = {**LORA, "lora_dropout": 0.0, "desirable_weight": 1.0}
    case = preference_case("kto", **options)
    units = [unit for micro in case.steps[0] for unit in micro]

    def first(_):
        session = Session(case, LAYOUTS["one"])
        sums = {
            name: [float(logps.sum()) for logps, _ in session.models.score(name, units)]
            for name in ("policy", "ref")
        }
        return sums, session.train(1)[0]

    ((sums, result),) = fork_ranks(first, 1)
    for side, good in (("chosen", 1), ("rejected", 0)):
        mine, reference = (
            [x for x, unit in zip(sums[name], units, strict=True) if unit["label"] == good]
            for name in ("policy", "ref")
        )
        mean = sum(mine) / len(mine)
        assert result.metrics[f"logps/{side}"] == pytest.approx(mean, rel=1e-5)
        gap = 0.3 * (mean - sum(reference) / len(reference))
        assert result.metrics[f"rewards/{side}"] == pytest.approx(gap, rel=1e-4, abs=REWARD)
        assert abs(gap) > 1e-3


@pytest.mark.parity
@pytest.mark.parametrize("layout", [n for n in ALL if n != "one"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_grid(recipe, layout):
    check(recipe, layout, "moe" if layout in MOE else "tied" if layout == "pp4" else "qk-norm")


@pytest.mark.parity
@pytest.mark.parametrize("loss", ["aot", "aot_unpaired", "bco_pair"])
@pytest.mark.parametrize("layout", ["tp2-sp", "pp2", "cp2", "dp2", "cp2-dp2", "pp2-dp2", "dp4"])
def test_gathered_grid(loss, layout):
    check("dpo", layout, joined=True, loss_type=loss, beta=0.3)


@pytest.mark.parity
@pytest.mark.parametrize("recipe", RECIPES)
def test_distributed_optimizer(recipe):
    options = {**ADAM, "lr": 1e-3}
    reference = _one_rank(recipe, "qk-norm", 1, tuple(options.items()))
    case = preference_case(recipe, **{**options, "use_distributed_optimizer": True})
    run = run_case(case, LAYOUTS["dp2"], gradients=False)
    assert_same(run, reference, relative=1e-5, absolute=REWARD)
