"""Every loss and its gradient in every weight, against a decoder written in plain float64."""

import dataclasses

import pytest
import torch
from float64_decoder import Decoder
from mcore_sft.config import SFTConfig
from sft_case import LAYOUTS, RECOMPUTE, SGD, SHAPES, data, recipe

from mcore_core.model.names import named_weights
from mcore_core.testing.cases import Case, Session
from mcore_core.testing.ranks import fork_ranks

FACTOR = 0.3


def case(depths, **options):
    steps = data(steps=1)
    for i, unit in enumerate(u for micro in steps[0] for u in micro):
        unit["channel"] = ("code", "math", "")[i % 3]
        unit["weights"][0] = 0  # nothing predicts a sample's first token
    return Case(
        architecture=dataclasses.replace(SHAPES["qk-norm"], mtp_layers=depths),
        recipe=recipe,
        steps=steps,
        options={
            **SGD,
            **RECOMPUTE["none"],
            "mtp_loss_scaling_factor": FACTOR,
            "enable_channel_loss": True,
            **options,
        },
        groups=(SFTConfig,),
    )


def run(what):
    """The result of one step, the weights before it and the gradients of it, by canonical name."""

    def one_rank(_):
        session = Session(what, LAYOUTS["one"])
        weights = named_weights(session.chunks)
        before = {n: w.detach().clone() for n, w in weights.items()}
        session.keep_gradients()
        config, gradients = session.stepper.config, {}
        finalize = config.finalize_model_grads_func

        def wrapped(*args, **kwargs):
            finalize(*args, **kwargs)
            gradients.update({n: w.main_grad.clone() for n, w in weights.items()})

        config.finalize_model_grads_func = wrapped
        (result,) = session.train(1)
        return result, before, gradients

    return fork_ranks(one_rank, 1)[0]


def reference(what, weights, *, dft, per_token):
    """Loss, loss of the depths, and of each channel, sample by sample."""
    decoder = Decoder(what.architecture, weights)
    zero = torch.zeros((), dtype=torch.float64)
    depths = what.architecture.mtp_layers
    total, count, channels = zero, 0.0, {}
    ahead = [(zero, 0.0)] * depths
    for unit in (u for micro in what.steps[0] for u in micro):
        ids = torch.from_numpy(unit["input_ids"]).long()
        w = torch.from_numpy(unit["weights"]).double()
        if not w[1:].any():
            continue
        w = w if per_token else w / w[1:].sum()
        logps, *deeper = decoder.predictions(ids)
        each = -w[1:] * logps
        if dft:
            each = each * logps.detach().exp()
        counted = float(w[1:].sum()) if per_token else 1.0
        total, count = total + each.sum(), count + counted
        if unit["channel"]:
            a, b = channels.get(unit["channel"], (0.0, 0.0))
            channels[unit["channel"]] = (a + float(each.sum().detach()), b + counted)
        for depth, found in enumerate(deeper):
            a, b = ahead[depth]
            later = w[depth + 2 :]
            ahead[depth] = (a - (later * found).sum(), b + float(later.sum()))
    loss = total / count
    mtp = [a / b for a, b in ahead]
    whole = loss + (FACTOR * sum(mtp) / depths if depths else 0.0)
    reported = sum(float(a.detach()) for a, _ in ahead) / max(sum(b for _, b in ahead), 1e-30)
    return whole, float(loss.detach()), reported, {n: a / b for n, (a, b) in channels.items()}


@pytest.mark.parametrize(
    ("depths", "dft", "per_token"),
    [
        (2, False, True),
        (1, True, False),
        pytest.param(0, True, True, marks=pytest.mark.parity),
        pytest.param(0, False, False, marks=pytest.mark.parity),
        pytest.param(2, True, True, marks=pytest.mark.parity),
    ],
)
def test_loss_and_gradients(depths, dft, per_token):
    what = case(depths, enable_dft_loss=dft, calculate_per_token_loss=per_token)
    result, weights, gradients = run(what)
    wide = {n: w.double().requires_grad_() for n, w in weights.items()}
    whole, loss, ahead, channels = reference(what, wide, dft=dft, per_token=per_token)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert set(channels) == {"code", "math"}
    for name, value in channels.items():
        assert result.metrics[f"loss/{name}"] == pytest.approx(value, rel=1e-5)
    if depths:
        assert result.metrics["mtp_loss"] == pytest.approx(ahead, rel=1e-5)
    whole.backward()
    assert gradients.keys() == wide.keys()
    for name, weight in wide.items():
        largest = float(weight.grad.abs().max())
        assert largest > 0, name
        off = float((gradients[name].double() - weight.grad).abs().max()) / largest
        assert off < 1e-4, (name, off)
