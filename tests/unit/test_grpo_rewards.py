"""Rewards: they equal TRL's functions, run beside each other, and none loses the batch."""

import asyncio
import threading
import time

import numpy as np
import pytest
from mcore_rewards.accuracy import Accuracy
from mcore_rewards.config import RewardsConfig
from mcore_rewards.cosine import Cosine
from mcore_rewards.form import Repetition, SoftOverlong, think_answer
from mcore_rewards.gym import rows, score
from mcore_rlhf.grpo.config import GRPOConfig
from mcore_rlhf.grpo.rewards import Rewards, check_scored
from mcore_rlhf.rollout.config import GenerationConfig
from trl.rewards import (
    accuracy_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
)

from mcore_core.config.kernel import kernel_config
from mcore_core.errors import UsageError
from mcore_core.failure import RunFailure
from mcore_core.protocols import Rollout

GROUPS = (GRPOConfig, GenerationConfig, RewardsConfig)


def config(**options):
    return kernel_config(*GROUPS, **options)


def rollout(text="", ids=(), **row):
    return Rollout(row=row, text=text, token_ids=ids, finished=True)


# -- the functions ---------------------------------------------------------------------------------

ANSWERS = [
    (r"so \boxed{\frac{1}{3}}", r"\frac{1}{3}"),
    (r"so \boxed{\frac{1}{2}}", r"\frac{1}{3}"),
    (r"first \boxed{1}, then \boxed{4}", "$4$"),
    (r"\boxed{0.5}", r"$\frac{1}{2}$"),
    (r"it is $x^2 + 1$", "$1 + x^2$"),
    ("no answer", "$7$"),
]


def test_accuracy_equals_trl_on_anchored_answers():
    texts, solutions = zip(*ANSWERS, strict=True)
    theirs = accuracy_reward([[{"content": t}] for t in texts], list(solutions))
    mine = Accuracy()([rollout(t, solution=s) for t, s in ANSWERS])
    for (text, _), a, b in zip(ANSWERS, mine, theirs, strict=True):
        assert b is None or a == b, text


def test_accuracy_reads_the_last_expression_and_nothing_before_the_end_of_thinking():
    found = Accuracy()(
        [
            rollout("the result is 42", solution="42"),
            rollout(r"<think>\boxed{1}</think> \boxed{2}", solution="1"),
            rollout("anything", other="1"),
            rollout("anything", solution=""),
        ]
    )
    assert found == [1.0, 0.0, None, None]


def test_format_wants_the_whole_text():
    good = "<think>a\nb</think>\n<answer>c</answer>"
    cases = {
        good: 1.0,
        "x" + good: 0.0,
        good + "x": 0.0,
        "<think>a</think>": 0.0,
        "<answer>c</answer><think>a</think>": 0.0,
        "<think>a</think><answer>b</answer><answer>c</answer>": 0.0,
        "": 0.0,
    }
    assert think_answer([rollout(t) for t in cases]) == list(cases.values())


def test_repetition_and_soft_overlong_equal_trl():
    rng = np.random.default_rng(0)
    ids = [tuple(rng.integers(0, 4, int(n)).tolist()) for n in rng.integers(0, 60, 100)]
    many = [rollout(ids=i) for i in ids]
    made = Repetition(config(repetition_n_grams=2, repetition_max_penalty=-0.7))
    assert made(many) == pytest.approx(get_repetition_penalty_reward(2, -0.7)(ids))
    made = SoftOverlong(config(soft_max_length=60, soft_cache_length=20))
    theirs = get_soft_overlong_punishment(60, 20)([list(i) for i in ids])
    assert made(many) == pytest.approx(theirs)


def test_cosine_goes_from_the_value_at_no_length_to_that_at_the_limit():
    made = Cosine(config(cosine_max_len=100))
    right = [made([rollout(r"\boxed{1}", (0,) * n, solution="1")])[0] for n in (0, 50, 100, 300)]
    wrong = [made([rollout(r"\boxed{2}", (0,) * n, solution="1")])[0] for n in (0, 50, 100, 300)]
    assert right == pytest.approx([1.0, 0.75, 0.5, 0.5])
    assert wrong == pytest.approx([-0.5, -0.25, 0.0, 0.0])


def test_reasoning_gym_is_a_dataset_and_a_reward():
    made = list(rows("leg_counting?size=5&seed=3&min_animals=2&max_animals=3"))
    assert len(made) == 5
    assert made == list(rows("leg_counting?size=5&seed=3&min_animals=2&max_animals=3"))
    assert made != list(rows("leg_counting?size=5&seed=4&min_animals=2&max_animals=3"))
    found = score(
        [
            rollout(f"hm <answer>{made[0]['answer']}</answer>", **made[0]),
            rollout("<answer>-1</answer>", **made[1]),
            rollout("1", question="not from there"),
        ]
    )
    assert found[0] == 1.0
    assert found[1] < 0.5
    assert found[2] is None
    with pytest.raises(UsageError, match="leg_counting"):
        list(rows("leg_countin?size=1"))
    with pytest.raises(UsageError, match="MC343"):
        list(rows("leg_counting?no_such_option=1"))


# -- running them ----------------------------------------------------------------------------------


def test_coroutines_wait_for_all_completions_at_once():
    waiting, everyone = [], asyncio.Event()

    async def slow(rollouts):
        waiting.append(rollouts)
        if len(waiting) == 2 * 256:
            everyone.set()
        await everyone.wait()  # one after another, this would last until the time-out
        return [1.0] * len(rollouts)

    found = Rewards({"a": slow, "b": slow}, 20.0)([rollout(str(i)) for i in range(256)])
    assert not found.problems
    assert (found.rewards_NF == 1.0).all()


def test_plain_functions_run_beside_each_other():
    together = threading.Barrier(4)

    def slow(rollouts):
        together.wait(20)
        return [2.0] * len(rollouts)

    found = Rewards({str(i): slow for i in range(4)}, 30.0)([rollout()])
    assert not found.problems
    assert (found.rewards_NF == 2.0).all()


@pytest.mark.parametrize("kind", ["batch", "each", "coroutine"])
def test_an_exception_names_the_row_and_keeps_the_others(kind):
    def one(r):
        if r.row["n"] == 2:
            raise KeyError("missing")
        return float(r.row["n"])

    def batch(rollouts):
        return [one(r) for r in rollouts]

    async def coroutine(rollouts):
        return [one(r) for r in rollouts]

    function = coroutine if kind == "coroutine" else batch
    if kind == "each":
        batch.each = True
    many = [rollout(n=n) for n in range(4)]
    found = Rewards({"mine": function}, 10.0)(many)
    np.testing.assert_array_equal(found.rewards_NF[:, 0], [0, 1, np.nan, 3])
    assert found.failed_NF[:, 0].tolist() == [False, False, True, False]
    assert '"n": 2' in found.problems[0]
    assert "KeyError" in found.problems[0]
    check_scored(found, many)  # a failure is no "does not apply"


def test_a_function_that_hangs_costs_its_own_scores_only():
    def hangs(rollouts):
        time.sleep(1.0)
        return [1.0] * len(rollouts)

    def partly(rollouts):
        if rollouts[0].row["n"] == 2:
            time.sleep(1.0)
        return [5.0]

    partly.each = True
    many = [rollout(n=n) for n in range(4)]
    functions = {"fine": lambda rs: [0.5 for _ in rs], "partly": partly}
    found = Rewards(functions, 0.3)(many)
    assert (found.rewards_NF[:, 0] == 0.5).all()
    np.testing.assert_array_equal(found.rewards_NF[:, 1], [5, 5, np.nan, np.nan])
    assert '"n": 2' in found.problems[0]
    with pytest.raises(RunFailure, match="MC841"):
        Rewards({"hangs": hangs}, 0.1)(many)


def test_what_is_no_list_of_numbers_stops_the_run():
    infinite = [float("-inf"), 1.0]  # its group would have no advantage that is a number
    for wrong in (lambda rs: [1.0], lambda rs: 3, lambda rs: ["x"] * len(rs), lambda rs: infinite):
        with pytest.raises(RunFailure, match="MC842"):
            Rewards({"wrong": wrong}, 5.0)([rollout(), rollout()])


def test_a_completion_that_nothing_applies_to_names_its_row():
    many = [rollout(n=0), rollout(n=1)]
    found = Rewards({"some": lambda rs: [1.0 if r.row["n"] == 0 else None for r in rs]}, 5.0)(many)
    with pytest.raises(RunFailure, match='"n": 1'):
        check_scored(found, many)


def test_functions_of_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def score(rollouts):\n    return [7.0] * len(rollouts)\n")
    made = Rewards.of(config(reward_funcs=[f"{file}:score", "format"]), device=lambda: "cpu")
    assert made.names == ("score", "format")
    assert made([rollout("x")]).rewards_NF.tolist() == [[7.0, 0.0]]
    with pytest.raises(UsageError, match="it has: score"):
        Rewards.of(config(reward_funcs=[f"{file}:scor"]), device=lambda: "cpu")
