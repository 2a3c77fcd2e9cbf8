"""Distillation in every layout equals one rank's, whoever writes the answers."""

import dataclasses
from functools import cache

import pytest
from gkd_case import TEACHERS, case
from grid_cases import grid_case, layout
from sft_case import LAYOUTS

from mcore_core.testing.cases import Session, assert_same, run_case
from mcore_core.testing.ranks import fork_ranks


@cache
def one_rank(teacher, options):
    return run_case(case(teacher, **dict(options)), LAYOUTS["one"])


def check(layout, teacher="larger", **options):
    run = run_case(case(teacher, **options), LAYOUTS[layout])
    assert_same(run, one_rank(teacher, tuple(options.items())), relative=1e-5)


def test_three_steps_change_the_student():
    reference = one_rank("larger", ())
    assert len(set(reference.losses)) == 3
    for key, gradient in reference.gradients[0].items():
        assert gradient.abs().max() > 1e-6, key
    assert all(0 < r.metrics["divergence"] < r.loss for r in reference.results)


@pytest.mark.parametrize(
    ("layout", "teacher"),
    [("tp2-sp", "larger"), ("pp2", "tied"), ("cp2", "larger"), ("dp2", "smaller")],
)
def test_layout(layout, teacher):
    check(layout, teacher)


def test_a_dense_teacher_beside_divided_experts():
    """Ranks that have other experts of the student hold the same of the teacher."""
    reference = run_case(grid_case("gkd", "moe"), LAYOUTS["one"])
    run = run_case(grid_case("gkd", "moe"), layout("ep2"))
    assert_same(run, reference, relative=1e-5)


STUDENT_ANSWERS = {"lmbda": 1.0, "sft_alpha": 0.0}
TEACHER_ANSWERS = {"seq_kd": True, "sft_alpha": 0.0}


@pytest.mark.parametrize("layout", ["tp2-pp2-sp"])
def test_generated_answers(layout):
    check(layout, **STUDENT_ANSWERS)


@pytest.mark.parity
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "one"])
def test_grid(layout, teacher):
    check(layout, teacher)


@pytest.mark.parity
@pytest.mark.parametrize("options", [STUDENT_ANSWERS, TEACHER_ANSWERS], ids=["student", "teacher"])
@pytest.mark.parametrize("layout", ["tp2-sp", "pp2", "cp2", "dp2", "pp2-vpp2"])
def test_generated_grid(layout, options):
    check(layout, **options)


@pytest.mark.parity
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("layout", ["tp2-sp", "pp2", "cp2", "dp2"])
def test_betas(layout, beta):
    check(layout, "smaller", beta=beta)


def test_an_offloaded_teacher_gives_the_same():
    """Its weights are elsewhere between steps: the results are equal to the bit."""

    def train(offloads):
        from mcore_core.train.offload import HostWeights

        session = Session(case("larger", seq_kd=True, sft_alpha=0.0), LAYOUTS["one"])
        if offloads:
            model = session.models.frozen["teacher"]
            host = HostWeights(model.chunks, session.stepper.device)
            moved = dataclasses.replace(model, host=host)
            session.stepper.guide.model = moved
            session.services.generators._models = {"teacher": moved}
        return [r.loss for r in session.train(2)]

    (resident,) = fork_ranks(lambda _: train(False), 1)
    (offloaded,) = fork_ranks(lambda _: train(True), 1)
    assert resident == offloaded
