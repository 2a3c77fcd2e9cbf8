"""GRPO with LoRA on SmolLM2-135M, in the folder that MCORE_SMOLLM2 names, against TRL's curves."""

from statistics import fmean

from curve_runs import recorded, trained, trains


@trains
def test_the_reward_rises_as_trls_does(tmp_path):
    """One seed scatters by more than TRL's three lie apart, upwards too: it has to reach them."""
    rewards = trained("grpo", tmp_path)["rewards"]
    assert len(rewards) == 40
    assert fmean(rewards[-10:]) > fmean(rewards[:10]) + 0.2
    low, _ = recorded("grpo")["trl_range"]
    assert fmean(rewards[-10:]) >= low


def test_the_recorded_mean_of_three_seeds_lies_among_trls():
    assert recorded("grpo")["inside"]
