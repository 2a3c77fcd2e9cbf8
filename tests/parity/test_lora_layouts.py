"""LoRA in every layout: losses, gradients and three steps equal one rank's."""

from functools import cache

import pytest
from sft_case import ADAM, LAYOUTS, RECOMPUTE, SGD, sft_case

from mcore_core.testing.cases import assert_same, run_case

LORA = {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0.0}


@cache
def _one_rank(shape, optimizer, targets):
    base = {"sgd": SGD, "adam": ADAM}[optimizer]
    options = {**base, **LORA, "target_modules": list(targets), **RECOMPUTE["none"]}
    return run_case(sft_case(shape, **options), LAYOUTS["one"])


def check(layout, targets=("all-linear",), shape="qk-norm", optimizer="sgd", **options):
    base = {"sgd": SGD, "adam": ADAM}[optimizer]
    more = {"target_modules": list(targets), **RECOMPUTE["none"], **options}
    run = run_case(sft_case(shape, **{**base, **LORA, **more}), LAYOUTS[layout])
    assert_same(run, _one_rank(shape, optimizer, tuple(targets)), relative=1e-5)


def test_only_adapters_train():
    run = _one_rank("qk-norm", "sgd", ("all-linear",))
    assert len(set(run.losses)) == 3
    assert run.gradients[0]
    for key, gradient in run.gradients[0].items():
        assert ".adapter." in key
        assert gradient.abs().max() > 1e-6, key


@pytest.mark.parametrize(
    "layout",
    ["tp2-sp", *(pytest.param(x, marks=pytest.mark.parity) for x in ("tp2", "pp2", "cp2", "dp2"))],
)
def test_layout(layout):
    check(layout)
