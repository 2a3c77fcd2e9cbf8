"""Reward models: the loss and metrics against TRL's own code, and where scores are read."""

import numpy as np
import pytest
import torch
import trl_losses
from mcore_rlhf.config import RLHFConfig
from mcore_rlhf.rm.config import RMConfig
from mcore_rlhf.rm.recipe import RMRecipe
from preference_tools import config, random_pair, reduce_of, template

from mcore_core.protocols import HeadOut
from mcore_core.train.place import select


def recipe(**options):
    return RMRecipe(config(RLHFConfig, RMConfig, **options), template())


def loss_of(made, units, scores):
    """Scores [2 P] -> what the recipe says; the head gives those of marked tokens alone."""
    batch = made.collate(units)
    kept = batch.weights_T.nonzero().squeeze(-1)
    values_KN = scores[:, None]
    assert len(kept) == len(scores)
    out = HeadOut(logps_T=torch.zeros(len(kept)), values_TN=values_KN)
    return made.loss(out, batch, reduce_of(batch).take(kept))


@pytest.mark.parametrize("center", [None, 0.02])
@pytest.mark.parametrize("margins", [False, True])
def test_loss_is_trls(center, margins):
    made = recipe(center_rewards_coefficient=center)
    for seed in range(100):
        rng = np.random.default_rng(seed)
        units = [random_pair(rng) for _ in range(rng.integers(1, 6))]
        margin = rng.random(len(units)) * 2 * margins
        units = [{**u, "margin": float(m)} for u, m in zip(units, margin, strict=True)]
        scores = torch.tensor(rng.normal(size=2 * len(units)) * 2, requires_grad=True)
        mine = scores.detach().clone().requires_grad_()
        tensor = torch.tensor(margin) if margins else None
        wanted, metrics = trl_losses.rm(scores[0::2], scores[1::2], tensor, center)
        wanted.backward()
        out = loss_of(made, units, mine)
        (out.total / out.count).backward()
        torch.testing.assert_close(out.total / out.count, wanted, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(mine.grad, scores.grad, rtol=1e-10, atol=1e-12)
        for name in ("accuracy", "margin", "mean_reward"):
            total, count = out.metrics[name]
            assert (total / count).item() == pytest.approx(metrics[name], rel=1e-6, abs=1e-7)
        assert out.highest["max_reward"].item() == pytest.approx(metrics["max_reward"])
        assert out.lowest["min_reward"].item() == pytest.approx(metrics["min_reward"])


def test_scores_are_read_at_the_last_token_of_each_side():
    rng = np.random.default_rng(0)
    units = [random_pair(rng) for _ in range(4)]
    batch = recipe().collate(units)
    ends = np.cumsum(batch.lengths) - 1
    assert batch.weights_T.nonzero().squeeze(-1).tolist() == ends.tolist()


def test_split_and_order_change_nothing():
    made = recipe(center_rewards_coefficient=0.1)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        units = [{**random_pair(rng), "margin": float(rng.random())} for _ in range(6)]
        scores_P2 = torch.tensor(rng.normal(size=(6, 2)), requires_grad=True)
        whole = loss_of(made, units, scores_P2.flatten())
        whole.total.backward()
        wanted, scores_P2.grad = scores_P2.grad, None
        cuts = sorted(rng.choice(range(1, 6), int(rng.integers(1, 6)), replace=False))
        order = np.split(rng.permutation(6), cuts)
        parts = [loss_of(made, [units[i] for i in p], scores_P2[p].flatten()) for p in order]
        sum(p.total for p in parts).backward()
        torch.testing.assert_close(scores_P2.grad, wanted, rtol=1e-12, atol=0)
        assert sum(p.total.item() for p in parts) == pytest.approx(whole.total.item(), rel=1e-12)
        assert sum(p.count.item() for p in parts) == whole.count.item() == 6
        for name, (total, count) in whole.metrics.items():
            shares = [p.metrics[name] for p in parts]
            assert sum(float(t) for t, _ in shares) == pytest.approx(float(total), rel=1e-12), name
            assert sum(float(c) for _, c in shares) == float(count)
        highest, lowest = (s.item() for s in (scores_P2.max(), scores_P2.min()))
        assert max(p.highest["max_reward"] for p in parts) == highest == whole.highest["max_reward"]
        assert min(p.lowest["min_reward"] for p in parts) == lowest == whole.lowest["min_reward"]


def test_a_rank_counts_the_scores_of_its_own_sequences_alone():
    """Under context parallelism every rank has the sums, and one counts them."""
    made = recipe()
    rng = np.random.default_rng(2)
    units = [random_pair(rng) for _ in range(2)]
    batch = made.collate(units)
    scores = torch.tensor([5.0, -5.0, 1.0, -1.0], dtype=torch.float64)
    kept = batch.weights_T.nonzero().squeeze(-1)
    reduce = reduce_of(batch).take(kept)
    reduce.owns_S[:2] = False
    out = HeadOut(logps_T=torch.zeros(4), values_TN=scores[:, None])
    found = made.loss(out, select(batch, kept), reduce)
    assert (found.highest["max_reward"], found.lowest["min_reward"]) == (1.0, -1.0)
    reduce.owns_S[:] = False
    found = made.loss(out, select(batch, kept), reduce)
    assert (found.highest["max_reward"], found.lowest["min_reward"]) == (-np.inf, np.inf)
