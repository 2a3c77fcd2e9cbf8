"""On one rank, a loaded model computes transformers' logits and gradients."""

import pytest
import torch
from bridge_runs import MODELS, build, write

from mcore_core.testing.ranks import fork_ranks

LENGTHS = (9, 14)


def _run(folder, name, tokens_T, out_TV):
    """Return logits, and HF-named gradients of sum(logits * out) for chosen parameters."""
    from mcore_core.model.names import named_weights
    from mcore_core.model.packed import PackedRow

    bridge, (chunk,) = build(folder, name)
    bridge.load([chunk], folder)
    chunk.eval()
    cu = [0, LENGTHS[0], sum(LENGTHS)]
    row = PackedRow.build(cu, torch.cat([torch.arange(n) for n in LENGTHS]))
    logits_TV = chunk(tokens_T, row).squeeze(1) @ chunk.head_weight().T
    (logits_TV * out_TV).sum().backward()
    with torch.no_grad():
        for p in named_weights([chunk]).values():
            p.copy_(p.grad)
    return logits_TV.detach(), dict(bridge.export([chunk]))


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_equal_transformers(tmp_path, name):
    model = write(tmp_path, name)
    tokens_T = torch.randint(0, 101, (sum(LENGTHS),))
    out_TV = torch.randn(sum(LENGTHS), 101)
    ((found_TV, gradients),) = fork_ranks(lambda _: _run(tmp_path, name, tokens_T, out_TV), 1)
    parts = [model(part.unsqueeze(0)).logits[0] for part in tokens_T.split(LENGTHS)]
    logits_TV = torch.cat(parts)
    (logits_TV * out_TV).sum().backward()
    scale = logits_TV.std().item()
    assert scale > 0.3
    assert (found_TV - logits_TV).abs().max().item() < 1e-5 * max(1.0, scale)
    expected = {k: p.grad for k, p in model.named_parameters()}
    assert gradients.keys() == expected.keys()
    for key, gradient in expected.items():
        error = (gradients[key] - gradient).norm() / gradient.norm()
        assert error.item() < 2e-5, key
