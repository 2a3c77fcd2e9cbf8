"""The reference's sums: computed once for each unit, kept in checkpoints, not for another one."""

import json
import os

import numpy as np
import pytest
from mcore_rlhf.config import ReferenceConfig, RLHFConfig
from mcore_rlhf.dpo.config import DPOConfig
from mcore_rlhf.pairs import sum_sides
from mcore_rlhf.reference import ReferenceScores
from preference_tools import View, config, random_pair


class Counting(View):
    """Counts the units that the reference is asked about."""

    def __init__(self, **more):
        super().__init__(**more)
        self.asked = 0

    def score(self, model, units):
        assert model == "ref"
        self.asked += len(units)
        return [np.asarray(u["input_ids"], np.float32) * (u["weights"] > 0) for u in units]


def scores(model="m", **options):
    made = config(RLHFConfig, DPOConfig, ReferenceConfig, model=str(model), **options)
    return ReferenceScores(made, sum_sides)


def units(count=4, seed=0):
    rng = np.random.default_rng(seed)
    return [random_pair(rng) for _ in range(count)]


def test_each_unit_is_scored_once_whatever_epoch_and_order():
    made, run, given = scores(), Counting(), units()
    first = made(given, run)
    assert run.asked == 4
    scored = Counting().score("ref", given)
    assert first == [sum_sides(u, logps) for u, logps in zip(given, scored, strict=True)]
    again = made([given[i] for i in (2, 0, 3)], run)
    assert run.asked == 4
    assert again == [first[i] for i in (2, 0, 3)]


@pytest.mark.parametrize("change", ["input_ids", "weights", "chosen_length"])
def test_a_unit_that_differs_in_anything_is_another(change):
    made, run, (unit,) = scores(), Counting(), units(1)
    made([unit], run)
    other = {**unit, change: np.copy(unit[change])}
    if change == "chosen_length":
        other[change] = unit[change] - 1
    elif change == "weights":
        other[change][-1] = 1 - other[change][-1]
    else:
        other[change][-1] += 1
    (found,) = made([other], run)
    assert run.asked == 2
    assert found == sum_sides(other, Counting().score("ref", [other])[0])


def test_a_batch_with_a_new_unit_on_any_rank_is_scored_on_all():
    """Scoring is collective: a rank that knows all of its units takes part."""
    made, given = scores(), units(2)
    run = Counting()
    made(given, run)

    def gather(value):
        return [value, True] if isinstance(value, bool) else [value]

    before = made(given, Counting())
    elsewhere = Counting(gather=gather)
    assert made(given, elsewhere) == before
    assert elsewhere.asked == 2


def test_a_resumed_run_goes_on_with_the_same_numbers():
    made, run, given = scores(), Counting(), units()
    before = made(given, run)
    other, run = scores(), Counting()
    other.load_state_dict(made.state_dict())
    assert other(given, run) == before
    assert run.asked == 0


def folder(path, text="weights"):
    path.mkdir()
    (path / "model.safetensors").write_text(text)
    return path


def checkpoint(run, step):
    path = run / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "training.json").write_text(json.dumps({"step": step}))


def rewrite(path):
    file = path / "model.safetensors"
    file.write_text("weights")  # as long as before
    os.utime(file, ns=(1, 1))


CHANGES = {
    "another model": (lambda at: {}, lambda at: {"ref_model": "other"}),
    "another policy": (lambda at: {"model": "a"}, lambda at: {"model": "b"}),
    "an adapter": (lambda at: {}, lambda at: {"ref_adapters": [str(folder(at / "adapter"))]}),
    "weights that were written again": (
        lambda at: {"ref_model": str(folder(at / "m"))},
        lambda at: rewrite(at / "m") or {"ref_model": str(at / "m")},
    ),
    "a run that has gone on": (
        lambda at: checkpoint(at / "run", 1) or {"ref_load": str(at / "run")},
        lambda at: checkpoint(at / "run", 2) or {"ref_load": str(at / "run")},
    ),
    "adapters of a run that has gone on": (
        lambda at: checkpoint(at / "run", 1) or {"ref_adapter_load": str(at / "run")},
        lambda at: checkpoint(at / "run", 2) or {"ref_adapter_load": str(at / "run")},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_numbers_of_another_reference_are_not_taken_up(name, tmp_path):
    before, after = CHANGES[name]
    given, run = units(), Counting()
    made = scores(**before(tmp_path))
    made(given, run)
    state = made.state_dict()
    other, run = scores(**after(tmp_path)), Counting()
    other.load_state_dict(state)
    other(given, run)
    assert run.asked == 4
