"""Dynamic fine-tuning and the channels' curves are the same in every layout."""

from functools import cache

import numpy as np
import pytest
from mcore_sft.config import SFTConfig
from sft_case import LAYOUTS, MASKED, RECOMPUTE, SGD, SHAPES, data, recipe

from mcore_core.testing.cases import Case, assert_same, run_case

CHANNELS = ("code", "math", "", "poetry")


def steps():
    """Micro-batch i has channels that others lack; "code" only comes up in the second step."""
    rng = np.random.default_rng(1)
    found = data()
    for s, step in enumerate(found):
        for i, micro in enumerate(step):
            for unit in micro:
                known = CHANNELS[1 if s == 0 else 0 :]
                unit["channel"] = "poetry" if i == 1 else str(rng.choice(known[:-1]))
    return found


def case(**options):
    return Case(
        architecture=SHAPES["qk-norm"],
        recipe=recipe,
        steps=steps(),
        options={
            **SGD,
            **RECOMPUTE["none"],
            "enable_dft_loss": True,
            "enable_channel_loss": True,
            **options,
        },
        groups=(SFTConfig,),
    )


@cache
def one_rank(per_token):
    return run_case(case(calculate_per_token_loss=per_token), LAYOUTS["one"])


def check(layout, per_token):
    run = run_case(case(calculate_per_token_loss=per_token), LAYOUTS[layout])
    assert_same(run, one_rank(per_token), relative=1e-5)


def test_the_channels_add_up_to_the_loss():
    """Of the samples that have one: what a curve shows is the mean over the global batch."""
    whole = case(enable_dft_loss=False)
    named = [[[u for u in m if u["channel"]] for m in s] for s in whole.steps]
    first = run_case(
        Case(
            architecture=whole.architecture,
            recipe=recipe,
            steps=named[:1],
            options=whole.options,
            groups=whole.groups,
        ),
        LAYOUTS["one"],
    ).results[0]
    weights = {}
    for unit in (u for m in named[0] for u in m):
        have = weights.get(unit["channel"], 0.0)
        weights[unit["channel"]] = have + float(unit["weights"][1:].sum())
    names = {n.removeprefix("loss/") for n in first.metrics}
    assert names == {n for n, w in weights.items() if w} == {"math", "poetry"}
    total = sum(first.metrics[f"loss/{n}"] * weights[n] for n in names)
    assert first.loss == pytest.approx(total / sum(weights.values()), rel=1e-5)


def test_dft_is_another_loss():
    plain = run_case(case(enable_dft_loss=False), LAYOUTS["one"], gradients=False)
    dft = one_rank(True)
    assert dft.losses[0] < 0.2 * plain.losses[0]
    assert "loss/code" not in dft.results[0].metrics
    assert "loss/code" in dft.results[1].metrics
    assert all(not sum(u["weights"].sum() for u in s[MASKED]) for s in steps())


@pytest.mark.parametrize("layout", ["cp2", "dp2"])
def test_layout(layout):
    check(layout, per_token=layout == "cp2")


@pytest.mark.parity
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize(
    "layout", ["tp2-sp", "pp2", "pp2-vpp2", "cp2", "dp2", "cp2-dp2", "tp2-pp2-cp2"]
)
def test_grid(layout, per_token):
    check(layout, per_token)
