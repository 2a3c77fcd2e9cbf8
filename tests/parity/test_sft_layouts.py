"""One run, every layout: losses, gradients and three optimizer steps of sft equal one rank's."""

from functools import cache

import pytest
from sft_case import ADAM, LAYOUTS, MASKED, RECOMPUTE, SGD, SHAPES, data, sft_case

from mcore_core.testing.cases import assert_same, run_case


@cache
def _one_rank(shape, optimizer):
    """The reference recomputes nothing."""
    options = {"sgd": SGD, "adam": ADAM}[optimizer]
    return run_case(sft_case(shape, **options, **RECOMPUTE["none"]), LAYOUTS["one"])


def check(layout, recompute="none", shape="qk-norm", optimizer="sgd", gradients=True, **options):
    base = {"sgd": SGD, "adam": ADAM}[optimizer]
    case = sft_case(shape, **{**base, **RECOMPUTE[recompute], **options})
    run = run_case(case, LAYOUTS[layout], gradients=gradients)
    assert len(run.results) == 3
    assert len(run.gradients) == (3 if gradients else 0)
    assert_same(run, _one_rank(shape, optimizer), relative=1e-5)


def test_the_data_is_uneven():
    """What the layouts are compared on would show a wrong divisor or a lost token."""
    for step in data():
        tokens = [sum(u["length"] for u in micro) for micro in step]
        trained = [sum(u["weights"][1:].sum() for u in micro) for micro in step]
        assert len(set(tokens)) == len(tokens)
        assert trained[MASKED] == 0
        others = trained[:MASKED] + trained[MASKED + 1 :]
        assert all(others)
        assert len(set(others)) == len(others)
    assert len({len(micro) for step in data() for micro in step}) > 1


def test_three_steps_change_the_model():
    reference = _one_rank("qk-norm", "sgd")
    assert len(set(reference.losses)) == 3
    assert min(r.grad_norm for r in reference.results) > 1  # clipped to 1: the norm matters
    for key, gradient in reference.gradients[0].items():
        assert gradient.abs().max() > 1e-5, key


PAIRS = [
    # layout, recompute, shape: each recompute mode under each kind of layout, each shape under each
    ("one", "full", "qk-norm"),
    ("one", "selective-wide", "qkv-bias"),
    ("tp2", "selective", "tied"),
    ("tp2-sp", "none", "qk-norm"),
    ("tp2-sp", "full", "layernorm-window-sinks"),
    ("pp2", "none", "tied"),
    ("pp2", "full", "qkv-bias"),
    ("pp2-vpp2", "none", "qk-norm"),
    ("pp2-vpp2", "full", "tied"),
    ("cp2", "none", "layernorm-window-sinks"),
    ("cp2", "full", "qk-norm"),
    ("cp2-tp2-sp", "selective", "qkv-bias"),
    ("dp2", "selective", "qkv-bias"),
    ("tp2-pp2-sp", "block", "tied"),
]


@pytest.mark.parametrize(("layout", "recompute", "shape"), PAIRS)
def test_layout(layout, recompute, shape):
    check(layout, recompute, shape)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("dp2", {}),
        ("dp2", {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    ],
    ids=["dp2", "dp2-overlap"],
)
def test_distributed_optimizer(layout, options):
    """As it runs: gradients are reduced by shard, so losses, norms and weights tell."""
    check(layout, optimizer="adam", gradients=False, use_distributed_optimizer=True, **options)


def test_distributed_optimizer_gradients():
    check("dp2", optimizer="adam", use_distributed_optimizer=True)


def test_samples_count_alike():
    """calculate_per_token_loss false: a mean over samples, each counted once under CP."""
    options = {**SGD, **RECOMPUTE["none"], "calculate_per_token_loss": False}
    case = sft_case(**options)
    reference = run_case(case, LAYOUTS["one"])
    assert reference.losses[0] != _one_rank("qk-norm", "sgd").losses[0]
    assert_same(run_case(case, LAYOUTS["cp2"]), reference, relative=1e-5)


@pytest.mark.parametrize("text", ["Ettt|tL", "E|t|t*2|tL"])
def test_uneven_stages(text):
    layout = LAYOUTS["pp2" if text.count("|") == 1 else "pp2-vpp2"]
    case = sft_case(**SGD, **RECOMPUTE["none"], pipeline_model_parallel_layout=text)
    assert_same(run_case(case, layout), _one_rank("qk-norm", "sgd"), relative=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "one"])
def test_grid(layout, recompute):
    check(layout, recompute)


@pytest.mark.parity
@pytest.mark.parametrize("shape", [n for n in SHAPES if n not in ("dropout", "qk-norm")])
@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "one"])
def test_shapes_grid(layout, shape):
    check(layout, "selective", shape)


@pytest.mark.parity
@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "one"])
def test_distributed_optimizer_grid(layout):
    check(layout, optimizer="adam", gradients=False, use_distributed_optimizer=True)
