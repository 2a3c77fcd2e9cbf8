"""Losses of rerankers, values and gradients, against references in float64 written here."""

import numpy as np
import pytest
import torch
from task_tools import CASES, compare, documents, loss_of, mean, recipe


def judged(units, logits):
    """Log-odds of yes of each document, by unit: positives and negatives."""
    at, found = 0, []
    for unit in units:
        sides = {1: [], 2: []}
        for role in unit["roles"]:
            sides[role].append(logits[at, 0] - logits[at, 1])
            at += 1
        found.append((sides[1], sides[2]))
    return found


def pointwise(units, logits):
    losses = []
    for good, bad in judged(units, logits):
        losses += [torch.log(1 + torch.exp(-x)) for x in good]
        losses += [torch.log(1 + torch.exp(x)) for x in bad]
    return mean(losses)


def listwise(units, logits, temperature, least):
    losses = []
    for good, bad in judged(units, logits):
        for x in good:
            if len(bad) + 1 >= least:
                every = [x / temperature, *(y / temperature for y in bad)]
                losses.append(torch.log(sum(torch.exp(e) for e in every)) - every[0])
    return mean(losses)


def rankings(rng, **sizes):
    return [documents(rng, queries=0, positives=(1, 3), **sizes) for _ in range(rng.integers(1, 5))]


def test_pointwise_reranker():
    made = recipe("generative_reranker")
    for seed in range(CASES):
        rng = np.random.default_rng(seed)
        units = rankings(rng)
        values = rng.normal(size=(sum(len(u["lengths"]) for u in units), 2)) * 2
        compare(made, units, values, lambda v, u=units: pointwise(u, v))


@pytest.mark.parametrize(("temperature", "least"), [(1.0, 2), (0.5, 3)])
def test_listwise_reranker(temperature, least):
    made = recipe(
        "generative_reranker",
        loss_type="listwise_reranker",
        listwise_reranker_temperature=temperature,
        listwise_reranker_min_group_size=least,
    )
    for seed in range(CASES):
        rng = np.random.default_rng(seed)
        units = rankings(rng, negatives=(1, 5))
        units.append(documents(rng, queries=0, negatives=(4, 5)))
        values = rng.normal(size=(sum(len(u["lengths"]) for u in units), 2)) * 2
        compare(made, units, values, lambda v, u=units: listwise(u, v, temperature, least))


def test_reranker_measures():
    made = recipe("generative_reranker")
    for seed in range(CASES):
        rng = np.random.default_rng(seed)
        units = rankings(rng)
        values = torch.tensor(rng.normal(size=(sum(len(u["lengths"]) for u in units), 2)))
        out = loss_of(made, units, values)
        right, first, reciprocal = [], [], []
        for good, bad in judged(units, values):
            right += [x > 0 for x in good] + [x <= 0 for x in bad]
            if bad:
                rank = 1 + sum(y >= max(good) for y in bad)
                first.append(rank == 1)
                reciprocal.append(1 / float(rank))
        wanted = {"accuracy": right, "recall@1": first, "mrr": reciprocal}
        for name, values_of in wanted.items():
            total, count = out.metrics[name]
            assert float(count) == len(values_of)
            assert float(total) == pytest.approx(float(sum(map(float, values_of))))
