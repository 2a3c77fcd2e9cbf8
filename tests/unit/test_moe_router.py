"""The router's choice against each family's own description, written token by token."""

import dataclasses

import pytest
import torch

from mcore_core import compat

compat.apply()

from mcore_core.model.moe.choice import choose, limit_groups  # noqa: E402
from mcore_core.model.shapes import MoEShape  # noqa: E402

TOKENS, EXPERTS = 40, 8
SHAPE = MoEShape(num_experts=EXPERTS, topk=3, ffn_hidden_size=4, layers=(0,))


def logits(seed=0):
    return 2 * torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed))


def as_dict(weights, chosen):
    rows = zip(weights.tolist(), chosen.tolist(), strict=True)
    return [dict(sorted(zip(c, w, strict=True))) for w, c in rows]


def close(a, b):
    assert [list(x) for x in a] == [list(x) for x in b]
    for x, y in zip(a, b, strict=True):
        assert list(x.values()) == pytest.approx(list(y.values()), rel=1e-5)


def test_mixtral_renormalizes_over_the_chosen():
    x = logits()
    top, index = x.topk(3, -1)
    close(as_dict(*choose(x, SHAPE, None)), as_dict(top.softmax(-1), index))


def test_qwen2_moe_does_not():
    x = logits()
    top, index = x.softmax(-1).topk(3, -1)
    shape = dataclasses.replace(SHAPE, pre_softmax=True, scaling_factor=1.5)
    close(as_dict(*choose(x, shape, None)), as_dict(top * 1.5, index))


def test_a_single_expert_with_softmax_has_weight_one():
    weights, _ = choose(logits(), dataclasses.replace(SHAPE, topk=1), None)
    assert weights.flatten().tolist() == pytest.approx([1.0] * TOKENS)


def test_deepseek_v3_chooses_with_the_bias_and_weighs_without():
    x, bias = logits(), torch.linspace(-0.5, 0.5, EXPERTS)
    shape = dataclasses.replace(
        SHAPE,
        score_function="sigmoid",
        num_groups=4,
        group_topk=2,
        expert_bias=True,
        scaling_factor=2.5,
    )
    expected = []
    for row in x.tolist():
        scores = [1 / (1 + 2.718281828459045**-v) for v in row]
        biased = [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
        groups = [biased[i : i + 2] for i in range(0, EXPERTS, 2)]
        best = sorted(range(4), key=lambda g: -sum(groups[g]))[:2]
        allowed = [e for e in range(EXPERTS) if e // 2 in best]
        chosen = sorted(allowed, key=lambda e: -biased[e])[:3]
        total = sum(scores[e] for e in chosen)
        expected.append({e: 2.5 * scores[e] / total for e in sorted(chosen)})
    close(as_dict(*choose(x, shape, bias)), expected)
    assert as_dict(*choose(x, shape, bias)) != as_dict(*choose(x, shape, None))


def test_deepseek_v2_ranks_groups_by_their_best_expert():
    shape = dataclasses.replace(SHAPE, num_groups=2, group_topk=1, pre_softmax=True)
    row = torch.tensor([[0.9, 0.0, 0.0, 0.0, 0.8, 0.8, 0.8, 0.8]])
    assert limit_groups(row, shape).isfinite().tolist() == [[True] * 4 + [False] * 4]
    sigmoid = dataclasses.replace(shape, score_function="sigmoid")
    assert limit_groups(row, sigmoid).isfinite().tolist() == [[False] * 4 + [True] * 4]


def test_ernie_adds_a_bias_to_softmax():
    x, bias = logits(), torch.linspace(-0.3, 0.3, EXPERTS)
    scores = x.softmax(-1)
    index = (scores + bias).topk(3, -1).indices
    top = scores.gather(-1, index)
    shape = dataclasses.replace(SHAPE, expert_bias=True)
    close(as_dict(*choose(x, shape, bias)), as_dict(top / top.sum(-1, keepdim=True), index))
