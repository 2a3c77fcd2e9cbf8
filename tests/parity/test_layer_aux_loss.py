"""Balancing losses count as a mean over micro-batches, whatever the main loss counts."""

import pytest
import torch
from layer_cases import LAYOUTS, layer_case
from mcore_moe.config import MoEConfig

from mcore_core.model.moe.router import Router
from mcore_core.model.names import unwrap
from mcore_core.testing.cases import Session, run_case
from mcore_core.testing.parity import assemble, parts
from mcore_core.testing.ranks import fork_ranks

COEFFICIENT = 4.0


def options(coefficient, kind, per_token):
    return {
        "groups": (MoEConfig,),
        "moe_aux_loss_coeff": coefficient,
        "moe_router_load_balancing_type": kind,
        "calculate_per_token_loss": per_token,
    }


def balance(logits_TE, sequence_T, topk, kind):
    """The textbook form in float64: experts x sum of (share of tokens x mean probability)."""
    logits = logits_TE.double().view(len(sequence_T), -1)
    scores = logits.softmax(-1)
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(topk, -1).indices, 1.0)
    groups = sorted(set(sequence_T.tolist()) - {0})
    members = [sequence_T == g for g in groups]
    if kind != "seq_aux_loss":
        members = [sequence_T > 0]
    losses = [
        logits.shape[1] * (chosen[m].mean(0) / topk * scores[m].mean(0)).sum() for m in members
    ]
    return torch.stack(losses).mean()


def _join(values):
    return torch.cat(values) if isinstance(values[0], torch.Tensor) else values[0]


def reference(kind):
    """Gradients of the mean over micro-batches of the sum over layers, by autograd alone."""

    def one_rank(_):
        session = Session(layer_case("moe-softmax", **options(0.0, kind, True)), LAYOUTS["one"])
        seen = []
        route = Router.route

        def spy(self, logits, tokens):
            seen.append((logits, tokens.sequence_T, self.moe.topk))
            return route(self, logits, tokens)

        Router.route = spy
        placed = session.stepper.place(session.micros(0))
        micros = []
        for micro in placed:
            unwrap(session.chunks[0])(micro.batch.tokens_T, micro.row)
            micros.append(list(seen))
            seen.clear()
        layers = list(zip(*micros, strict=True))
        if kind == "global_aux_loss":  # as if the batch were one row
            layers = [[tuple(map(_join, zip(*layer, strict=True)))] for layer in layers]
        means = [torch.stack([balance(*row, kind) for row in layer]).mean() for layer in layers]
        total = COEFFICIENT * torch.stack(means).sum()
        weights = list(unwrap(session.chunks[0]).parameters())
        gradients = torch.autograd.grad(total, weights, allow_unused=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.main_grad.zero_()
            if gradient is not None:
                weight.main_grad.copy_(gradient)
        return parts(session.chunks, gradients=True)

    return assemble(fork_ranks(one_rank, 1))


@pytest.mark.parametrize(
    "kind",
    [
        "aux_loss",
        pytest.param("seq_aux_loss", marks=pytest.mark.parity),
        "global_aux_loss",
    ],
)
def test_gradient_is_that_of_the_mean_over_micro_batches(kind):
    expected = reference(kind)
    for per_token in (True, False):
        for layout in ("one", "ep2"):
            runs = [
                run_case(
                    layer_case("moe-softmax", steps=1, **options(c, kind, per_token)),
                    LAYOUTS[layout],
                )
                for c in (COEFFICIENT, 0.0)
            ]
            with_loss, without = (run.gradients[0] for run in runs)
            for key, gradient in expected.items():
                found = with_loss[key] - without[key]
                scale = max(float(gradient.abs().max()), 1e-4)
                worst = float((found - gradient).abs().max()) / scale
                assert worst < 2e-3, (key, per_token, layout, worst)
            assert float(expected["decoder.layers.1.mlp.router.weight"].abs().max()) > 1e-3
