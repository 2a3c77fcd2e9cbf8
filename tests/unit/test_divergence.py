"""The chunked divergence against TRL's function in float64: values and gradients."""

import warnings

import numpy as np
import pytest
import torch

from mcore_core import compat

compat.apply()  # before anything imports megatron

from mcore_core.model import head  # noqa: E402
from mcore_core.model.divergence import Teacher  # noqa: E402
from mcore_core.model.head import VocabRange, local_loss  # noqa: E402
from mcore_core.protocols import Divergence, HeadSpec, LossOutput  # noqa: E402

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.gkd import GKDTrainer

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def draw(rng, tokens, vocab, hidden):
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    scale = float(rng.choice([0.3, 1.0, 3.0]))
    return (
        scale * torch.randn(tokens, hidden, generator=generator, dtype=torch.float64),
        torch.randn(vocab, hidden, generator=generator, dtype=torch.float64) / hidden**0.5,
    )


def reference(student_TV, teacher_TV, weights_T, beta, temperature):
    """TRL's, weighted by token."""
    each = [
        GKDTrainer.generalized_jsd_loss(
            s[None, None], t[None, None], beta=beta, temperature=temperature, reduction="sum"
        )
        for s, t in zip(student_TV, teacher_TV, strict=True)
    ]
    return (torch.stack(each) * weights_T).sum()


def ours(hidden, weight, targets, weights_T, teacher, *, alpha=0.0):
    def loss(out, where):
        total = (out.divergence_T * weights_T[where]).sum()
        if alpha:
            total = total - alpha * (out.logps_T * weights_T[where]).sum()
        return LossOutput(total, weights_T[where].sum())

    vocab = VocabRange(start=0, rows=len(weight))
    spec = HeadSpec(divergence=teacher.spec)
    return local_loss(hidden, weight, targets, loss, vocab=vocab, spec=spec, teacher=teacher)


@pytest.mark.parametrize("seed", range(120))
def test_value_and_gradient_equal_trl(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    tokens, mine, theirs = (int(rng.integers(1, n)) for n in (40, 50, 50))
    tokens, mine, theirs = tokens + 1, mine + 2, theirs + 2 if seed % 2 else mine + 2
    # several chunks: of 16 tokens each
    monkeypatch.setattr(head, "CHUNK_BYTES", 1)
    beta, temperature = BETAS[seed % 5], float(rng.choice([0.5, 0.9, 1.0, 2.0]))
    hidden, weight = draw(rng, tokens, mine, 8)
    teacher_hidden, teacher_weight = draw(rng, tokens, theirs, 6)
    hidden.requires_grad_()
    weight.requires_grad_()
    targets = torch.from_numpy(rng.integers(0, mine, tokens))
    weights_T = torch.from_numpy(rng.choice([0.5, 1.0, 2.0], tokens))
    common = min(mine, theirs)
    alpha = 0.3 if seed % 3 == 0 else 0.0
    expected = reference(
        (hidden @ weight.T)[:, :common],
        (teacher_hidden @ teacher_weight.T)[:, :common],
        weights_T,
        beta,
        temperature,
    )
    nll = -(hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    expected = expected + alpha * (nll * weights_T).sum()
    wanted = torch.autograd.grad(expected, (hidden, weight))
    teacher = Teacher(
        hidden_TH=teacher_hidden,
        weight=teacher_weight,
        vocab=VocabRange(start=0, rows=common),
        spec=Divergence(model="teacher", beta=beta, temperature=temperature),
    )
    out = ours(hidden, weight, targets, weights_T, teacher, alpha=alpha)
    found = torch.autograd.grad(out.total, (hidden, weight))
    assert out.count == weights_T.sum()
    # log-probabilities and the weight's gradient are float32
    tolerance = 1e-5 if alpha else 1e-10
    assert abs(out.total - expected) <= tolerance * max(1.0, abs(float(expected)))
    assert (found[0] - wanted[0]).abs().max() <= tolerance * max(1.0, float(wanted[0].abs().max()))
    assert (found[1] - wanted[1]).abs().max() <= 1e-5 * max(1.0, float(wanted[1].abs().max()))


def test_equal_distributions_do_not_diverge():
    hidden, weight = draw(np.random.default_rng(0), 9, 20, 8)
    weights_T = torch.ones(9, dtype=torch.float64)
    for beta in BETAS:
        teacher = Teacher(
            hidden_TH=hidden,
            weight=weight,
            vocab=VocabRange(start=0, rows=20),
            spec=Divergence(model="teacher", beta=beta),
        )
        mine = hidden.clone().requires_grad_()
        out = ours(mine, weight, torch.zeros(9, dtype=torch.long), weights_T, teacher)
        (gradient,) = torch.autograd.grad(out.total, mine)
        assert abs(float(out.total)) < 1e-12
        assert gradient.abs().max() < 1e-12


def test_no_logits_of_all_tokens_exist(monkeypatch):
    """The largest tensor that is made has the tokens of one chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor) and 300 in tensor.shape:
                    sizes.append(tensor.numel() // 300)
            return out

    monkeypatch.setattr(head, "CHUNK_BYTES", 1)
    rng = np.random.default_rng(1)
    hidden, weight = draw(rng, 200, 300, 8)
    teacher_hidden, teacher_weight = draw(rng, 200, 300, 8)
    teacher = Teacher(
        hidden_TH=teacher_hidden,
        weight=teacher_weight,
        vocab=VocabRange(start=0, rows=300),
        spec=Divergence(model="teacher"),
    )
    hidden.requires_grad_()
    with Watch():
        out = ours(hidden, weight, torch.zeros(200).long(), torch.ones(200), teacher)
        out.total.backward()
    assert sizes
    assert max(sizes) == 16
