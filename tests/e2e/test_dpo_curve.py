"""DPO with LoRA on SmolLM2-135M, in the folder that MCORE_SMOLLM2 names, against TRL's curves."""

from importlib import import_module

import pytest
from curve_runs import bench, recorded, trained, trains

PAIR = 1 / 64
"""What one pair that is held out counts."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained("dpo", tmp_path_factory.mktemp("dpo"))


@pytest.mark.parametrize("held", [None, "held.jsonl"])
def test_options_with_and_without_held_out_pairs(held):
    """As the curve and as bench/dpo_cpu.py, which measures speed alone, give them."""
    from mcore_core.cli.run import prepare

    with bench():
        module, aside = import_module("dpo_cpu"), import_module("aside")
        about = {"model": "m", "data": "d.jsonl", "adapter": "a", "steps": 3, "seed": 1}
        side = aside.Side(side="ours", held=held, **about)
        program, *argv = module.command(side, "t.jinja", "out")
    assert program == "run"
    assert prepare(argv).config.get("val_dataset") == ([] if held is None else [held])


@trains
def test_accuracies_rise(run):
    assert len(run["accuracies"]) == 30
    assert run["held_out"]["30"] > 0.8


@trains
def test_the_curve_is_trls(run):
    """The same rows in the same order from the same adapter: what differs is rounding."""
    theirs = recorded("dpo")["trl"][0]
    assert run["losses"] == pytest.approx(theirs["losses"], abs=2e-3)
    for step, accuracy in theirs["held_out"].items():
        assert run["held_out"][step] == pytest.approx(accuracy, abs=PAIR + 1e-9), step


def test_the_recorded_mean_of_three_seeds_lies_among_trls():
    curves = recorded("dpo")
    assert curves["inside"]
    assert min(curves["last_ten"]["ours"]) > 0.8
    for mine, theirs in zip(curves["ours"], curves["trl"], strict=True):
        assert mine["losses"] == pytest.approx(theirs["losses"], abs=2e-3)
