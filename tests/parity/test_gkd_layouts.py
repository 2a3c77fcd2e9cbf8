"""Distillation in every layout equals one rank's, whoever writes the answers."""

import dataclasses
from functools import cache

import numpy as np
import pytest
from sft_case import LAYOUTS, SGD, SHAPE, VOCAB

from mcore_core.testing.cases import Case, Session, assert_same, run_case
from mcore_core.testing.ranks import fork_ranks

STUDENT = dataclasses.replace(SHAPE, qk_layernorm=True)
TEACHERS = {
    # deeper, wider, and a vocabulary that is larger, or smaller, than the student's
    "larger": dataclasses.replace(
        SHAPE, num_layers=8, hidden_size=48, vocab_size=VOCAB + 8, add_qkv_bias=True
    ),
    "smaller": dataclasses.replace(SHAPE, hidden_size=16, vocab_size=VOCAB - 8),
    "tied": dataclasses.replace(SHAPE, tie_word_embeddings=True),
}


def recipe(config):
    from mcore_rlhf.gkd.recipe import GKDRecipe

    class Bare(GKDRecipe):
        """Without a tokenizer: answers end by their length."""

    made = Bare(config, Tokenizer())
    return made


class Tokenizer:
    """What stands for the template: it only samples."""

    class tokenizer:
        eos_token_id = None
        name_or_path = ""


def engine(context):
    from mcore_rlhf.rollout.native.engine import NativeEngine

    return NativeEngine(context)


def units(rng, *, masked):
    found = []
    for _ in range(rng.integers(1, 4)):
        prompt, answer = int(rng.integers(1, 9)), int(rng.integers(2, 16))
        ids = rng.integers(0, VOCAB - 8, prompt + answer).astype(np.int32)
        weights = np.zeros(prompt + answer, np.float32)
        weights[prompt:] = rng.choice([0.5, 1.0, 2.0]) * (rng.random(answer) < 0.8)
        found.append(
            {
                "input_ids": ids,
                "weights": weights * (not masked),
                "prompt_ids": ids[:prompt],
                "length": prompt + answer,
            }
        )
    return found


def case(teacher="larger", **options):
    from mcore_rlhf.gkd.plugin import GKDPlugin

    rng = np.random.default_rng(0)
    plain = {"lmbda": 0.0, "beta": 0.3, "temperature": 0.9, "sft_alpha": 0.2, **SGD}
    return Case(
        architecture=STUDENT,
        recipe=recipe,
        steps=[[units(rng, masked=i == 2) for i in range(4)] for _ in range(3)],
        options={"max_completion_length": 6, **plain, **options},
        groups=tuple(GKDPlugin().mcore_config_groups()),
        frozen={"teacher": TEACHERS[teacher]},
        engine=engine,
    )


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
