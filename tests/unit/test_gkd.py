"""Distillation's options, its units, and which step has whose answers."""

import csv
from pathlib import Path

import numpy as np
import pytest
from mcore_rlhf.gkd.batch import answered, collate
from mcore_rlhf.gkd.loss import distillation
from mcore_rlhf.gkd.plugin import GKDPlugin

from mcore_core.cli.args import describe
from mcore_core.cli.prepare import open_session
from mcore_core.config.kernel import kernel_config
from mcore_core.config.option import collect_options
from mcore_core.protocols import HeadOut
from mcore_core.testing.contracts import PluginContract


class TestGKD(PluginContract):
    plugin = "gkd"


class TestRollout(PluginContract):
    plugin = "rollout"


def test_options_are_as_specified():
    session = open_session()
    session.active = session.manager.activate(["gkd"])
    found = {
        name: describe(option, session.defaults)
        for name, option in collect_options(session.groups).items()
    }
    file = Path(__file__).parents[1] / "data" / "arguments.tsv"
    rows = [r for r in csv.DictReader(file.open(), delimiter="\t") if r["group"] == "GKD"]
    assert len(rows) == 11
    for row in rows:
        default = found[row["name"]]["default"]
        text = str(default).lower() if isinstance(default, bool) else str(default)
        assert text.replace("None", "none") == row["default"], row["name"]


def config(**options):
    return kernel_config(*GKDPlugin().mcore_config_groups(), **options)


def problems(**options):
    given = {"teacher_model": "teacher", **options}
    found = GKDPlugin().mcore_validate_config(
        config=config(**{k: v for k, v in given.items() if v is not None})
    )
    return [p.message if hasattr(p, "message") else str(p) for p in found]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"teacher_model": None}, "needs a teacher"),
        ({"lmbda": 1.0, "seq_kd": True}, "--seq_kd does nothing with --lmbda 1"),
        ({"lmbda": 1.0, "sft_alpha": 0.1}, "--sft_alpha does nothing with --lmbda 1"),
        ({"seq_kd": True, "sft_alpha": 0.1}, "--sft_alpha does nothing with --seq_kd true"),
        ({"lmbda": 0.0, "top_k": 5}, "--top_k does nothing with --lmbda 0"),
        ({"lmbda": 0.0, "seq_kd": True, "top_k": 5}, None),
        (
            {"lmbda": 0.0, "seq_kd": True, "use_vllm": True},
            "--use_vllm does nothing with --lmbda 0",
        ),
        ({"lmbda": 0.1, "seq_kd": True, "use_vllm": True}, None),
        ({"sft_alpha": 0.1, "beta": 0.0}, None),
    ],
)
def test_contradictions(options, expected):
    found = problems(**options)
    assert (expected is None) is not found
    if expected is not None:
        assert len(found) == 1
        assert expected in found[0]


def unit(n=6, prompt=2, weight=1.0, **more):
    weights = np.zeros(n, np.float32)
    weights[prompt:] = weight
    ids = np.arange(10, 10 + n, dtype=np.int32)
    return {"input_ids": ids, "weights": weights, "prompt_ids": ids[:prompt], "length": n, **more}


def test_a_generated_answer_takes_the_place_of_the_datasets():
    made = answered(unit(), (90, 91, 92))
    assert made["input_ids"].tolist() == [10, 11, 90, 91, 92]
    assert made["weights"].tolist() == [0, 0, 1, 1, 1]
    assert made["length"] == 5


def test_only_answers_of_the_dataset_have_a_likelihood_term():
    batch = collate([unit(weight=0.5), answered(unit(), (90, 91))], sft_alpha=0.4)
    assert batch.lengths == (6, 4)
    assert batch.weights_T.tolist() == [0, 0.5, 0.5, 0.5, 0.5, 0, 0, 1, 1, 0]
    assert batch.nll_T.tolist() == pytest.approx([0, 0.2, 0.2, 0.2, 0.2, 0, 0, 0, 0, 0])


def test_loss():
    import torch

    batch = collate([unit(weight=2.0)], sft_alpha=0.5)
    divergence_T = torch.arange(6.0)
    logps_T = -torch.ones(6)
    out = distillation(HeadOut(logps_T=logps_T, divergence_T=divergence_T), batch, None)
    assert out.count == 8
    assert out.total == 2 * (1 + 2 + 3 + 4) + 0.5 * 2 * 4
    assert [float(x) for x in out.metrics["divergence"]] == [20, 8]


class Step:
    def __init__(self, step, training=True):
        self.step, self.training = step, training


def recipe(**options):
    from mcore_rlhf.gkd.recipe import GKDRecipe

    return GKDRecipe(config(teacher_model="teacher", **options), None)


@pytest.mark.parametrize("lmbda", [0.0, 0.3, 1.0])
def test_whose_answers_a_step_has(lmbda):
    """By the seed and the step alone: every rank and a resumed run decide alike."""
    made = recipe(lmbda=lmbda)
    steps = [made.source(Step(i)) for i in range(1, 2001)]
    assert steps == [recipe(lmbda=lmbda).source(Step(i)) for i in range(1, 2001)]
    assert steps.count("student") == pytest.approx(2000 * lmbda, abs=60 if 0 < lmbda < 1 else 0)
    assert set(steps) <= {"student", "dataset"}
    if 0 < lmbda < 1:
        assert steps != [recipe(lmbda=lmbda, seed=7).source(Step(i)) for i in range(1, 2001)]
        taught = recipe(lmbda=lmbda, seq_kd=True)
        assert {taught.source(Step(i)) for i in range(1, 99)} == {"student", "teacher"}
    wanted = "student" if lmbda == 1 else "dataset"
    assert made.source(Step(5, training=False)) == wanted


def test_how_long_sequences_become():
    assert recipe(max_completion_length=9).generated_length == 9
    assert recipe(max_completion_length=9, lmbda=0.0, seq_kd=True).generated_length == 9
    assert recipe(lmbda=0.0).generated_length == 0


def test_the_teacher():
    made = recipe(teacher_model_revision="main", offload_teacher_model=True, beta=0.1)
    teacher = made.frozen["teacher"]
    assert (teacher.model, teacher.revision, teacher.offload) == ("teacher", "main", True)
    assert teacher.own_vocabulary
    assert (made.head.divergence.beta, made.head.divergence.temperature) == (0.1, 0.9)
    assert made.head.temperature == 1.0, "the likelihood of the dataset's answers is not tempered"
