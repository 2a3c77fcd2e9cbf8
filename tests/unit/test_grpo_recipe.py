"""GRPO's recipe: rounds and their steps, staleness, turns, resumption, what each option changes."""

import numpy as np
import pytest
from grpo_run import Engine, Run, prompts, recipe, steps
from mcore_rlhf.grpo.balance import balanced
from mcore_rlhf.grpo.entropy import keep_highest

from mcore_core.errors import UsageError


def test_one_round_is_one_step_and_needs_no_scores(tmp_path):
    run = Run(Engine())
    (units,) = steps(recipe(tmp_path), prompts(1), run)
    assert len(units) == 4
    assert run.scored == []
    assert all("old" not in u for u in units)
    rewards = np.array([u["reward"] for u in units])
    wanted = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
    np.testing.assert_allclose([u["advantage"] for u in units], wanted)
    assert run.logs[0]["reward"] == pytest.approx(rewards.mean())


def test_steps_and_iterations_of_a_round(tmp_path):
    """Every completion trains once in each iteration; only the very first step has ratio 1."""
    made = recipe(tmp_path, steps_per_generation=2, num_iterations=3)
    assert (made.rounds.prompts, made.rounds.steps) == (2, 6)
    run = Run(Engine())
    taken = steps(made, prompts(2), run)
    assert [len(units) for units in taken] == [4] * 6
    keys = [tuple(tuple(u["input_ids"].tolist()) for u in units) for units in taken]
    assert sorted(keys[0] + keys[1]) == sorted(keys[2] + keys[3]) == sorted(keys[4] + keys[5])
    assert [all("old" in u for u in units) for units in taken] == [False] + [True] * 5
    assert run.scored == ["policy"]
    assert run.engine.log.count(("weights", 0)) == 1


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_resume_between_two_steps_repeats_the_rest_exactly(tmp_path, after):
    options = {"steps_per_generation": 2, "num_iterations": 2, "beta": 0.1}
    run = Run(Engine())
    whole = steps(recipe(tmp_path, **options), prompts(2), run)
    made, run = recipe(tmp_path, **options), Run(Engine())
    rounds = made.prepare(prompts(2), run)
    for _ in range(after):
        next(rounds)
        run.step += 1
    state = made.state_dict()
    again, other = recipe(tmp_path, **options), Run(Engine(), step=after + 1)
    again.load_state_dict(state)
    rest = [[u for micro in s.micros for u in micro] for s in again.resume(other)]
    assert len(rest) == 4 - after
    assert other.scored == [] and other.engine.log == []
    for mine, theirs in zip(rest, whole[after:], strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.keys() == b.keys()
            for key in a:
                np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.parametrize(("given", "copies", "wanted"), [(2, 2, 4), (None, 4, 2), (16, 16, 1)])
def test_evaluations_have_a_number_of_completions_of_their_own(tmp_path, given, copies, wanted):
    """A global batch of them, of fewer or more prompts; training keeps num_generations."""
    made = recipe(tmp_path, num_generations_eval=given, global_batch_size=8)
    assert (made.rounds.prompts, made.rounds.eval_prompts) == (2, max(1, wanted))
    run = Run(Engine())
    run.training = False
    (units,) = steps(made, prompts(wanted), run)
    assert len(units) == wanted * copies
    asked = [tuple(u["input_ids"][:2].tolist()) for u in units]
    assert all(asked.count(prompt) == copies for prompt in set(asked))
    for prompt in set(asked):  # compared with those of the same prompt
        group = [u["advantage"] for u, p in zip(units, asked, strict=True) if p == prompt]
        assert sum(group) == pytest.approx(0, abs=1e-9)
    run = Run(Engine())
    (units,) = steps(made, prompts(2), run)
    assert len(units) == 8


def test_nothing_is_left_after_the_last_step(tmp_path):
    made = recipe(tmp_path)
    steps(made, prompts(1), Run(Engine()))
    assert made.state_dict()["prepared"] is None


def test_requests_of_a_resumed_run_are_those_of_the_uninterrupted_one(tmp_path):
    made, engine = recipe(tmp_path), Engine()
    run = Run(engine)
    steps(made, prompts(1), run)
    state = made.state_dict()
    steps(made, prompts(1, 5), run)
    again, other = recipe(tmp_path), Engine()
    again.load_state_dict(state)
    steps(again, prompts(1, 5), Run(other, step=2))
    assert set(other.requests) == set(engine.requests) - {f"t0-{i}-0" for i in range(4)}


# -- asynchrony ------------------------------------------------------------------------------------


def test_generation_runs_ahead_by_a_bounded_number_of_rounds(tmp_path):
    """The next round is under way while one trains, and no round is older than allowed."""
    for staleness in (0, 1, 2):
        made = recipe(
            tmp_path, async_generate=staleness > 0, max_staleness=max(1, staleness), use_vllm=True
        )
        engine = Engine(slow=lambda id: 2 if id.endswith("3-0") else 0)
        run = Run(engine, draws=(prompts(1, i) for i in range(10, 30)))
        for i in range(5):
            steps(made, prompts(1, i), run)
            assert len(engine.waiting) <= 4 * staleness
        stale = [log.get("rollout/staleness_max", 0) for log in run.logs]
        assert max(stale) <= staleness
        assert (max(stale) > 0) == (staleness > 0)
        submitted = [e for e in engine.log if e[0] == "submit"]
        assert len(submitted) == 5 + staleness


def test_weights_change_only_when_nothing_is_under_way_unless_rollouts_are_partial(tmp_path):
    mixed = []
    for partial in (False, True):
        made = recipe(
            tmp_path, async_generate=True, max_staleness=2, partial_rollouts=partial, use_vllm=True
        )
        engine = Engine(slow=lambda id: 3 if id.endswith("1-0") else 0)
        run = Run(engine, draws=(prompts(1, i) for i in range(10, 30)))
        before = engine.update_weights
        busy = []

        def update(*, step, before=before, busy=busy, engine=engine):
            busy.append(bool(engine.waiting))
            before(step=step)

        engine.update_weights = update
        for i in range(5):
            steps(made, prompts(1, i), run)
        mixed.append(any(busy))
    assert mixed == [False, True]


def test_a_resumed_run_trains_the_rounds_that_were_ahead(tmp_path):
    """No prompt is lost and none comes twice; what was under way is asked for anew."""
    options = {"async_generate": True, "max_staleness": 2, "use_vllm": True, "beta": 0.1}

    def asked(taken):
        return [sorted({int(u["input_ids"][1]) for u in units}) for units in taken]

    def train(made, run, source, number):
        return [units for _ in range(number) for units in steps(made, next(source), run)]

    whole_source = (prompts(1, i) for i in range(30))
    whole = train(recipe(tmp_path, **options), Run(Engine(), draws=whole_source), whole_source, 5)
    source = (prompts(1, i) for i in range(30))
    made = recipe(tmp_path, **options)
    before = train(made, Run(Engine(), draws=source), source, 2)
    again, other = recipe(tmp_path, **options), Engine()
    again.load_state_dict(made.state_dict())
    after = train(again, Run(other, draws=source, step=3), source, 3)
    assert asked(before) + asked(after) == asked(whole)
    assert len({tuple(a) for a in asked(whole)}) == 5
    assert len(other.requests) == 4 * 5, "two rounds that were ahead, and three more"


def test_asynchrony_corrects_for_what_is_stale(tmp_path):
    made = recipe(tmp_path, async_generate=True, use_vllm=True)
    run = Run(Engine(), draws=(prompts(1, i) for i in range(10, 30)))
    (units,) = steps(made, prompts(1), run)
    assert run.scored == ["policy"]
    assert all(np.all(u["policy"][u["trains"]] == 1.0) for u in units)  # old equals rollout here


# -- conversations ---------------------------------------------------------------------------------


SCHEDULER = """
class Twice:
    def __init__(self, config):
        pass

    async def __call__(self, turn):
        if turn.number > {turns} or turn.row["n"] < 0:
            return None
        return [{{"role": "tool", "content": f"r{{turn.number}}"}}]
"""


def test_turns_keep_the_models_tokens_and_train_nothing_of_the_tools(tmp_path):
    file = tmp_path / "turns.py"
    file.write_text(SCHEDULER.format(turns=2))
    made = recipe(tmp_path, multi_turn_scheduler=f"{file}:Twice", max_completion_length=80)
    engine = Engine()
    (units,) = steps(made, prompts(1), Run(engine))
    assert len([key for key in engine.requests if key.split("-")[1] == "0"]) == 3
    first, second, third = (engine.requests[f"t0-0-{turn}"] for turn in range(3))
    said = engine.complete(first, 0).token_ids
    assert second.token_ids[: len(first.token_ids)] == first.token_ids
    assert second.token_ids[len(first.token_ids) :][: len(said)] == said  # never tokenized again
    tool = second.token_ids[len(first.token_ids) + len(said) :]
    text = "[tool]r1[assistant]"
    assert list(tool) == [60 + ord(c) % 30 for c in text]
    assert third.sampling.max_tokens < second.sampling.max_tokens < 80
    unit = next(
        u for u in units if tuple(u["input_ids"][: len(third.token_ids)]) == third.token_ids
    )
    start = len(first.token_ids) + len(said)
    assert not unit["trains"][start : start + len(tool)].any()
    assert unit["trains"][len(first.token_ids) : start].all()
    assert unit["trains"].sum() == len(unit["input_ids"]) - 2 - 2 * len(tool)


def test_max_turns_ends_a_conversation(tmp_path):
    file = tmp_path / "turns.py"
    file.write_text(SCHEDULER.format(turns=9))
    engine = Engine()
    made = recipe(
        tmp_path, multi_turn_scheduler=f"{file}:Twice", max_turns=2, max_completion_length=80
    )
    steps(made, prompts(1), Run(engine))
    assert {key.split("-")[2] for key in engine.requests} == {"0", "1"}


# -- options ---------------------------------------------------------------------------------------


def test_dynamic_sample_draws_until_every_prompt_has_a_spread(tmp_path):
    body = "[len(r.token_ids) if r.row['n'] % 2 else 1.0 for r in rollouts]"
    made = recipe(tmp_path, body, dynamic_sample=True, global_batch_size=8)
    run = Run(Engine(), draws=[prompts(2, i) for i in (2, 4, 6)])
    (units,) = steps(made, prompts(2), run)
    assert len(units) == 8
    assert {int(u["input_ids"][1]) - 71 for u in units} == {1, 3}
    assert run.warnings == {}


def test_dynamic_sample_goes_on_with_what_it_has_and_says_so(tmp_path):
    made = recipe(tmp_path, "[1.0 for r in rollouts]", dynamic_sample=True, max_resample_times=2)
    run = Run(Engine(), draws=[prompts(1, i) for i in range(1, 9)])
    (units,) = steps(made, prompts(1), run)
    assert len(units) == 4
    assert "after 2 more rounds 1 of 1" in run.warnings["dynamic_sample"]
    assert len(list(run.draws)) == 6


def test_entropy_quantile_is_taken_over_the_step():
    """The threshold is that of all completions together: one of them may keep nothing."""
    low = {"trains": np.array([False, True, True]), "kept": True, "entropy": np.array([9.0, 0, 1])}
    high = {"trains": np.ones(4, bool), "kept": True, "entropy": np.array([5.0, 6, 7, 8])}
    keep_highest([low, high], 0.5)
    assert low["policy"].tolist() == [1, 0, 0]
    assert high["policy"].tolist() == [0, 1, 1, 1]


def test_rounding_does_not_choose_among_equal_entropies():
    """First tokens of one prompt's completions have the same entropy, and the quantile is there."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        first = 3.974178 + rng.integers(-2, 3, 4) * 2.4e-7
        units = [
            {"trains": np.ones(3, bool), "kept": True, "entropy": np.array([e, 5.0, 1.0])}
            for e in first
        ]
        keep_highest(units, 0.5)
        assert all(u["policy"].tolist() == [1, 1, 0] for u in units)


def test_kl_in_the_reward_and_the_reference(tmp_path):
    made = recipe(tmp_path, beta=0.2, advantage_estimator="rloo")
    assert made.constants.beta == 0.0
    run = Run(Engine())
    (units,) = steps(made, prompts(1), run)
    assert run.scored == ["policy", "ref"]
    less = np.array([u["reward"] - 0.2 * 0.5 * u["trains"].sum() for u in units])
    k = len(units)
    np.testing.assert_allclose(
        [u["advantage"] for u in units], (less - less.mean()) * k / (k - 1), rtol=1e-5
    )


def test_the_reference_follows_the_policy(tmp_path):
    made = recipe(
        tmp_path, beta=0.1, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.3
    )
    run = Run(Engine())
    for i in range(6):
        steps(made, prompts(1, i), run)
    assert run.blended == [(3, "ref", 0.3), (5, "ref", 0.3)]


def test_overlong_filter_keeps_a_step_that_would_be_empty(tmp_path):
    made = recipe(tmp_path, overlong_filter=True)
    engine = Engine()
    complete = engine.complete

    def cut(request, started):
        import dataclasses

        return dataclasses.replace(complete(request, started), stop="length")

    engine.complete = cut
    run = Run(engine)
    (units,) = steps(made, prompts(1), run)
    assert "overlong_filter" in run.warnings
    assert all(u["kept"] and u["advantage"] == 0 for u in units)


def test_completions_are_shown_with_their_rewards(tmp_path):
    made = recipe(tmp_path, log_completions=True)
    run = Run(Engine())
    steps(made, prompts(1), run)
    (rows,) = run.shown
    assert len(rows) == 4
    assert set(rows[0]) >= {"prompt", "completion", "reward", "rewards", "advantage", "finished"}


def test_micro_batches_have_about_as_many_tokens():
    rng = np.random.default_rng(0)
    for _ in range(100):
        lengths = rng.integers(1, 100, int(rng.integers(1, 40))).tolist()
        cells = balanced(lengths, 4)
        assert sorted(i for cell in cells for i in cell) == list(range(len(lengths)))
        sizes = [len(cell) for cell in cells]
        assert max(sizes) - min(sizes) <= 1
        tokens = [sum(lengths[i] for i in cell) for cell in cells]
        if len(lengths) >= 8:
            assert max(tokens) - min(tokens) <= 2 * max(lengths)


def problems(about="replay", **options):
    from grpo_run import GROUPS
    from mcore_rlhf.grpo.rules import check

    from mcore_core.config.kernel import kernel_config

    config = kernel_config(*GROUPS, global_batch_size=8, reward_funcs=["format"], **options)
    return [(p.code, p.message) for p in check(config) if about in p.message]


def test_router_replay_is_refused_where_it_would_do_nothing(tmp_path):
    assert problems(router_replay_mode="R3") == []
    assert problems(router_replay_mode="R2", num_iterations=2) == []
    ((code, fact),) = problems(router_replay_mode="R2")
    assert code == "MC321" and "one optimizer step a round" in fact
    ((code, _),) = problems(router_replay_mode="R3", rollout_engine="vllm")
    assert code == "MC362"


@pytest.mark.parametrize("reference", [{}, {"ref_model": "base"}])
def test_a_reference_follows_weights_and_not_adapters(reference):
    moving = {"sync_ref_model": True, "beta": 0.1, **reference}
    assert problems("sync_ref_model", **moving) == []
    ((code, fact),) = problems("sync_ref_model", tuner_type="lora", **moving)
    assert code == "MC358" and "the adapters are what trains" in fact


@pytest.mark.parametrize("option", [{"ref_adapters": ["a"]}, {"ref_adapter_load": "run"}])
def test_a_reference_with_adapters_of_its_own_stays(option):
    ((code, fact),) = problems("sync_ref_model", sync_ref_model=True, beta=0.1, **option)
    assert code == "MC358" and f"--{next(iter(option))} adds" in fact


def test_an_engine_that_records_no_routing(tmp_path):
    with pytest.raises(UsageError, match="MC362"):
        steps(recipe(tmp_path, router_replay_mode="R3"), prompts(1), Run(Engine()))
