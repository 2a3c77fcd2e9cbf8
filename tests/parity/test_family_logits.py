"""On one rank, every family's loaded model computes transformers' logits and gradients."""

import pytest
import torch
from family_cases import CASES, family_of, save, write
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
        # a bias of keys changes nothing in a layer without positions: its gradient is noise
        assert gradient.norm() > 1e-3 or key.endswith(
            ("k_proj.bias", "correction_bias", "expert_bias")
        ), key
        assert error <= max(LIMIT * gradient.norm(), 1e-4), key


def _logits_of_each(folder, others, family, tokens_T):
    bridge, (chunk,) = build(folder, family)
    chunk.eval()
    found = []
    with torch.no_grad():
        for other in (folder, *others):
            bridge.load([chunk], other)
            found.append(forward(chunk, tokens_T))
    return found


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_perturbing_any_one_tensor_changes_both_models_alike(tmp_path, name):
    """Also what no gradient reaches: the bias for the choice of experts."""
    case = CASES[name]
    model = write(tmp_path / "model", case)
    tokens_T, _ = tokens_and_weights()
    expected, folders = [], []
    with torch.no_grad():
        before_TV = logits_of(model, tokens_T)
        seen = set()
        for key, tensor in model.state_dict().items():
            if tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            kept = tensor.clone()
            tensor.add_(torch.randn_like(tensor) * 0.3)
            expected.append((key, logits_of(model, tokens_T)))
            folders.append(tmp_path / key)
            save(model, case, folders[-1])
            tensor.copy_(kept)
    ((first_TV, *found),) = fork_ranks(
        lambda _: _logits_of_each(tmp_path / "model", folders, family_of(case), tokens_T), 1
    )
    scale = before_TV.std().item()
    assert (first_TV - before_TV).abs().max().item() < LIMIT * scale
    for (key, logits_TV), found_TV in zip(expected, found, strict=True):
        # with a bias of keys, scores change alike for all keys where there are no positions
        moved = (logits_TV - before_TV).abs().max().item()
        assert moved > 10 * LIMIT * scale or key.endswith("k_proj.bias"), key
        assert (found_TV - logits_TV).abs().max().item() < LIMIT * max(1, logits_TV.std()), key
