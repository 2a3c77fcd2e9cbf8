"""What megatron-core or a small slip does wrong under tensor and pipeline parallelism is seen.

Each trap is planted, in a layout whose numbers are right without it: a comparison that a trap does
not fail would not have found it.
"""

import dataclasses
from functools import cache

import pytest
from layer_cases import LAYOUTS, layer_case
from sft_case import RECOMPUTE, SGD, sft_case

from mcore_core.testing.cases import Session, assert_same, run_case


def case_of(name):
    return sft_case(name, **SGD, **RECOMPUTE["none"]) if name == "tied" else layer_case(name)


@cache
def one_rank(name):
    return run_case(case_of(name), LAYOUTS["one"])


def planted(monkeypatch, trap):
    keep = Session.keep_gradients

    def with_trap(session):
        trap(session)
        keep(session)

    monkeypatch.setattr(Session, "keep_gradients", with_trap)


def sums_norms_over_ranks(session):
    """As megatron-core with qk_layernorm: every rank has the whole gradient, their sum is twice."""
    session.stepper.config.qk_layernorm = True


def counts_replicas(session):
    """The norm takes every rank's copy of a whole weight for a part of its own."""
    for chunk in session.chunks:
        for parameter in chunk.parameters():
            parameter.tensor_model_parallel = True


def counts_the_copy_of_tied_embeddings(session):
    """The last stage's copy is the first stage's embedding, of which the norm has seen all."""
    for chunk in session.chunks:
        for parameter in chunk.parameters():
            parameter.shared = False


@pytest.mark.parametrize(("name", "layout"), [("mla", "tp2"), ("tied", "pp2")])
def test_the_numbers_are_right_without_a_trap(name, layout):
    assert_same(run_case(case_of(name), LAYOUTS[layout]), one_rank(name))


def test_a_latent_norms_gradient_that_is_summed_over_ranks(monkeypatch):
    planted(monkeypatch, sums_norms_over_ranks)
    run = run_case(case_of("mla"), LAYOUTS["tp2"])
    reference = one_rank("mla")
    key = next(k for k in reference.gradients[0] if k.endswith("q_layernorm.weight"))
    ratio = run.gradients[0][key] / reference.gradients[0][key]
    assert ratio.min() == pytest.approx(2, rel=1e-4) and ratio.max() == pytest.approx(2, rel=1e-4)
    with pytest.raises(AssertionError, match="step 1: grad_norm"):
        assert_same(run, reference)
    with pytest.raises(AssertionError, match=r"step 1: the gradient of .*q_layernorm"):
        assert_same(dataclasses.replace(run, results=reference.results), reference)


@pytest.mark.parametrize(
    ("name", "layout", "trap"),
    [
        ("mla", "tp2", counts_replicas),
        ("tied", "pp2", counts_the_copy_of_tied_embeddings),
    ],
)
def test_a_norm_that_counts_something_twice(monkeypatch, name, layout, trap):
    """Losses and gradients of the first step agree all the same; only the norm tells."""
    planted(monkeypatch, trap)
    run, reference = run_case(case_of(name), LAYOUTS[layout]), one_rank(name)
    assert run.results[0].grad_norm > reference.results[0].grad_norm * 1.001
    with pytest.raises(AssertionError, match="step 1: grad_norm"):
        assert_same(run, reference)
    right = dataclasses.replace(run.results[0], grad_norm=reference.results[0].grad_norm)
    parts = {"results": [right], "gradients": run.gradients[:1], "weights": reference.weights}
    first = dataclasses.replace(
        reference, results=reference.results[:1], gradients=reference.gradients[:1]
    )
    assert_same(dataclasses.replace(run, **parts), first)
