"""On one rank, every family's loaded model computes transformers' logits and gradients."""

import pytest
import torch
from family_cases import CASES, draw_, family_of, save, tensors_of, write
from family_runs import (
    build,
    forward,
    gradients_of,
    logits_of,
    to_gradients,
    tokens_and_weights,
)

from mcore_core.testing.ranks import fork_ranks

LIMIT = 1e-4
"""Of the logits' standard deviation; for gradients, of the norm of each."""


def _run(folder, family, tokens_T, out_TV):
    bridge, (chunk,) = build(folder, family)
    bridge.load([chunk], folder)
    chunk.eval()
    logits_TV = forward(chunk, tokens_T)
    (logits_TV * out_TV).sum().backward()
    to_gradients([chunk])
    return logits_TV.detach(), {n: t.clone() for n, t in bridge.export([chunk])}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_transformers(tmp_path, name):
    case = CASES[name]
    model = write(tmp_path / "model", case)
    tokens_T, out_TV = tokens_and_weights()
    logits_TV = logits_of(model, tokens_T)
    (logits_TV * out_TV).sum().backward()
    expected = gradients_of(model, case, tmp_path / "gradients")
    ((found_TV, gradients),) = fork_ranks(
        lambda _: _run(tmp_path / "model", family_of(case), tokens_T, out_TV), 1
    )
    scale = logits_TV.std().item()
    assert scale >= 1
    assert (found_TV - logits_TV).abs().max().item() < LIMIT * scale
    assert gradients.keys() == expected.keys()
    for key, gradient in expected.items():
        error = (gradients[key] - gradient).norm()
        assert error <= LIMIT * gradient.norm(), key
