"""Every part of a decoder, every layout: losses, gradients and three steps equal one rank's."""

from functools import cache

import pytest
from layer_cases import LAYOUTS, SHAPES, layer_case

from mcore_core.testing.cases import assert_same, run_case


@cache
def _one_rank(name):
    return run_case(layer_case(name), LAYOUTS["one"])


def check(name, layout, relative=1e-5, **options):
    run = run_case(layer_case(name, **options), LAYOUTS[layout])
    assert len(run.results) == 3
    assert_same(run, _one_rank(name), relative=relative)


PAIRS = [
    ("postnorm", "tp2"),
    ("postnorm", "tp2-sp"),
    ("postnorm", "pp2"),
    ("postnorm", "cp2"),
    ("gate", "tp2-sp"),
    ("gate", "cp2"),
    ("moe-softmax", "tp2-sp-etp2"),
    ("moe-softmax", "pp2"),
    ("moe-softmax", "cp2-ep2"),
    ("moe-softmax", "ep2"),
    ("moe-groups", "tp2-sp-ep2"),
    ("moe-groups", "ep2"),
    ("moe-groups", "cp2"),
    ("moe-groups", "pp2-ep2"),
    ("moe-gpt-oss", "tp2-sp-etp2"),
    ("moe-gpt-oss", "tp2-sp-ep2"),
    ("moe-gpt-oss", "cp2"),
    ("mla", "tp2"),
    ("mla", "tp2-sp"),
    ("mla", "cp2"),
    ("mla", "pp2"),
    ("mla-direct", "tp2-sp"),
    ("mla-moe", "tp2-sp-ep2"),
    ("gdn", "tp2"),
    ("gdn", "tp2-sp"),
    ("gdn", "cp2"),
    ("gdn", "pp2-vpp2"),
    ("gdn", "dp2"),
    ("gdn-moe", "ep2"),
    ("mtp", "cp2"),
    ("mtp", "tp2-sp"),
    ("mtp", "pp2"),
    ("mtp-tied", "pp2"),
    ("mtp-tied", "tp2"),
    ("mla-moe-mtp", "tp2-sp-ep2"),
    ("mla-moe-mtp", "cp2"),
]


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_layout(name, layout):
    check(name, layout)


def _possible(name, layout):
    sizes, shape = LAYOUTS[layout], SHAPES[name]
    if shape.moe is None:
        return sizes.ep == sizes.etp == 1
    return sizes.tp == 1 or sizes.sp


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "layout"),
    [(n, at) for n in SHAPES for at in LAYOUTS if at != "one" and _possible(n, at)],
)
def test_grid(name, layout):
    check(name, layout)


@pytest.mark.parametrize("name", SHAPES)
def test_three_steps_change_every_weight(name):
    """A part that trains nothing would agree everywhere."""
    reference = _one_rank(name)
    assert len(set(reference.losses)) == 3
    for key, gradient in reference.gradients[0].items():
        assert gradient.abs().max() > 1e-7, key
