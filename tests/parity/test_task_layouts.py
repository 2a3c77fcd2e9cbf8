"""Tasks: losses, metrics, gradients and three steps of every layout equal one rank's."""

from functools import cache

import pytest
from sft_case import ADAM, LAYOUTS
from task_case import RECIPES, data, task_case

from mcore_core.parallel.topology import Layout
from mcore_core.testing.cases import assert_same, run_case

ALL = {**LAYOUTS, "ep2": Layout(world=2, ep=2), "ep2-tp2-sp": Layout(world=2, tp=2, sp=True, ep=2)}
MOE = {"ep2", "ep2-tp2-sp"}
EXPERTS = {**dict.fromkeys(RECIPES, "moe"), "embedding": "moe-free"}
SMALL = 1e-6
"""Margins and similarities are differences of larger numbers, in float32."""


@cache
def one_rank(task, architecture, dp, options):
    return run_case(task_case(task, architecture, dp=dp, **dict(options)), LAYOUTS["one"])


def check(task, layout, architecture="qk-norm", **options):
    dp = ALL[layout].dp if task == "embedding" else 1
    reference = one_rank(task, architecture, dp, tuple(options.items()))
    assert len(set(reference.losses)) == len(reference.losses)
    run = run_case(task_case(task, architecture, **options), ALL[layout])
    assert_same(run, reference, relative=1e-5, absolute=SMALL)


def test_the_data_is_uneven_and_every_weight_trains():
    for task in RECIPES:
        for step in data(task):
            tokens = [sum(u["length"] for u in micro) for micro in step]
            assert len(set(tokens)) == len(tokens)
    for task in RECIPES:
        run = one_rank(task, "qk-norm", 1, ())
        assert min(r.grad_norm for r in run.results) > 0.01
        for key, gradient in run.gradients[0].items():
            assert gradient.abs().max() > 1e-7, (task, key)


def test_in_batch_negatives_are_those_of_all_ranks():
    """Micro-batches that stand on two ranks at once are one: else the losses would be others."""
    together = one_rank("embedding", "qk-norm", 2, ())
    apart = one_rank("embedding", "qk-norm", 1, ())
    assert together.losses[0] > apart.losses[0] + 0.1


@pytest.mark.parametrize(
    ("task", "layout"),
    [
        ("seq_cls", "pp2"),
        ("embedding", "dp2"),
        ("embedding", "cp2"),
        ("generative_reranker", "tp2-sp"),
    ],
)
def test_layout(task, layout):
    check(task, layout)


@pytest.mark.parity
@pytest.mark.parametrize("layout", [n for n in ALL if n != "one"])
@pytest.mark.parametrize("task", RECIPES)
def test_grid(task, layout):
    check(
        task, layout, EXPERTS[task] if layout in MOE else "tied" if layout == "pp4" else "qk-norm"
    )


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["tp2-sp", "pp2", "cp2", "dp2", "cp2-dp2", "pp2-dp2"])
@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "cosine_similarity"},
        {"loss_type": "online_contrastive", "contrastive_margin": 1.5},
        {"infonce_include_qq": True, "infonce_include_dd": True, "mrl_dims": (32, 8)},
        {"infonce_use_batch": False},
    ],
    ids=["cosine", "online", "qq-dd-mrl", "own"],
)
def test_losses_of_embeddings(options, layout):
    check("embedding", layout, **options)


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["tp2-sp", "pp2", "cp2", "dp2"])
def test_listwise(layout):
    check("generative_reranker", layout, loss_type="listwise_reranker")


@pytest.mark.parity
@pytest.mark.parametrize(
    ("problem", "labels"), [("regression", 1), ("multi_label_classification", 1)]
)
@pytest.mark.parametrize("layout", ["tp2-sp", "cp2"])
def test_problems(problem, labels, layout):
    """A label of the data is one number: read as one label of that problem."""
    check("seq_cls", layout, problem_type=problem, num_labels=labels)


@pytest.mark.parity
@pytest.mark.parametrize("task", RECIPES)
@pytest.mark.parametrize("layout", ["tp2-sp", "pp2", "cp2", "dp2", "ep2"])
def test_lora(task, layout):
    options = {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0.0, "lr": 0.02}
    check(task, layout, EXPERTS[task] if layout in MOE else "qk-norm", **options)


@pytest.mark.parity
@pytest.mark.parametrize("task", RECIPES)
def test_distributed_optimizer(task):
    options = {**ADAM, "lr": 1e-3}
    dp = 2 if task == "embedding" else 1
    reference = one_rank(task, "qk-norm", dp, tuple(options.items()))
    case = task_case(task, **{**options, "use_distributed_optimizer": True})
    run = run_case(case, LAYOUTS["dp2"], gradients=False)
    assert_same(run, reference, relative=1e-5, absolute=SMALL)
