"""Score heads, hidden states and chosen logits: every layout gives one rank's numbers."""

from functools import cache

import pytest
from head_case import HEADS, head_case
from sft_case import ADAM, LAYOUTS

from mcore_core.testing.cases import assert_same, run_case


@cache
def _one_rank(head, shape, dp, tied=False):
    return run_case(head_case(head, shape, dp=dp), LAYOUTS["one"])


def check(head, layout, shape="qk-norm"):
    reference = _one_rank(head, shape, LAYOUTS[layout].dp)
    assert len(set(reference.losses)) == 3
    assert_same(run_case(head_case(head, shape), LAYOUTS[layout]), reference, relative=1e-5)


@pytest.mark.parametrize(
    ("head", "layout", "shape"),
    [
        ("scores", "tp2-sp", "qk-norm"),
        ("scores", "cp2", "tied"),
        ("scores", "dp2", "qk-norm"),
        ("hidden", "tp2", "tied"),
        ("hidden", "pp2-vpp2", "qk-norm"),
        ("logits", "tp2-sp", "tied"),
        ("logits", "cp2", "qk-norm"),
    ],
)
def test_layout(head, layout, shape):
    check(head, layout, shape)


def test_every_weight_of_a_classifier_trains():
    run = _one_rank("scores", "qk-norm", 1)
    assert "score.weight" in run.weights
    assert "output_layer.weight" not in run.weights
    assert run.weights["score.weight"].shape == (3, 32)
    for key, gradient in run.gradients[0].items():
        assert gradient.abs().max() > 1e-6, key


def test_distributed_optimizer():
    options = {**ADAM, "lr": 1e-3, "recompute_granularity": "none"}
    reference = run_case(head_case("scores", dp=2, **options), LAYOUTS["one"])
    options["use_distributed_optimizer"] = True
    options |= {"overlap_grad_reduce": True, "overlap_param_gather": True}
    run = run_case(head_case("scores", **options), LAYOUTS["dp2"], gradients=False)
    assert_same(run, reference, relative=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("shape", ["qk-norm", "tied"])
@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n not in ("one", "dp4")])
@pytest.mark.parametrize("head", HEADS)
def test_grid(head, layout, shape):
    check(head, layout, shape)
