"""Losses over pairs are the global batch's: micro-batches, padding and order change nothing."""

import numpy as np
import pytest
from dpo_tools import case, prepared, recipe
from mcore_rlhf.dpo.loss import LOSSES
from preference_tools import loss_of

SPLIT = {
    **{n: {"loss_type": n} for n in LOSSES if n not in ("aot", "aot_unpaired", "bco_pair")},
    "smoothed": {"loss_type": "sigmoid,robust,simpo", "label_smoothing": 0.2},
    "weighted": {"loss_type": "hinge,sft,orpo,ipo", "loss_weights": [0.5, 2.0, 0.1, -0.3]},
    "divergence": {"loss_type": "sigmoid,hinge", "f_divergence_type": "js_divergence"},
}


def lengthened(unit, values, rng):
    """Return the same pair with untrained tokens behind both answers: padding, as losses see it."""
    at = unit["chosen_length"]
    more = [int(n) for n in rng.integers(0, 4, 2)]
    parts = {"input_ids": unit["input_ids"], "weights": unit["weights"], "logps": values}
    filled = {
        name: np.concatenate(
            [
                piece
                for side, n in zip((part[:at], part[at:]), more, strict=True)
                for piece in (side, (-rng.random(n) * (name == "logps")).astype(part.dtype))
            ]
        )
        for name, part in parts.items()
    }
    longer = {**unit, **filled, "chosen_length": at + more[0], "length": unit["length"] + sum(more)}
    return longer, longer.pop("logps")


def trained_gradients(logps_T, units):
    """Return the gradient of each unit's trained tokens."""
    parts = np.split(logps_T.grad.numpy(), np.cumsum([u["length"] for u in units])[:-1])
    shifted = [np.roll(u["weights"], -1) > 0 for u in units]
    return [part[trains] for part, trains in zip(parts, shifted, strict=True)]


@pytest.mark.parametrize("name", SPLIT)
def test_split_padding_and_order_change_nothing(name):
    """The sum over micro-batches of any size, in any order, padded or not, is the batch's."""
    made = recipe(**{"beta": 0.3, "rpo_alpha": 0.2, **SPLIT[name]})
    for seed in range(6):
        rng = np.random.default_rng(seed)
        units, logps = case(seed, pairs=9)
        whole = prepared(made, units)
        reference, reference_T = loss_of(made, whole, logps)
        reference.total.backward()
        wanted = trained_gradients(reference_T, units)
        order = rng.permutation(9)
        cuts = sorted(rng.choice(range(1, 9), int(rng.integers(1, 9)), replace=False))
        total = count = 0.0
        metrics = {}
        for part in np.split(order, cuts):
            longer = [lengthened(whole[i], logps[i], rng) for i in part]
            some = [unit for unit, _ in longer]
            out, logps_T = loss_of(made, some, [values for _, values in longer])
            out.total.backward()
            total, count = total + out.total.item(), count + out.count.item()
            for key, (a, b) in out.metrics.items():
                x, y = metrics.get(key, (0.0, 0.0))
                metrics[key] = (x + float(a), y + float(b))
            for i, found in zip(part, trained_gradients(logps_T, some), strict=True):
                np.testing.assert_allclose(found, wanted[i], rtol=1e-9, atol=1e-12)
        assert total == pytest.approx(reference.total.item(), rel=1e-12)
        assert count == reference.count.item()
        for key, (a, b) in reference.metrics.items():
            assert metrics[key] == pytest.approx((float(a), float(b)), rel=1e-9), key


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "bco_pair"])
def test_order_and_padding_of_a_gathered_micro_batch_change_nothing(name):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        units, logps = case(seed, pairs=7)
        found = []
        for order in (np.arange(7), rng.permutation(7)):
            made = recipe(loss_type=name, beta=0.3)
            longer = [lengthened(u, x, rng) for u, x in zip(units, logps, strict=True)]
            some, values = zip(*[longer[i] for i in order], strict=True)
            out, logps_T = loss_of(made, prepared(made, some), values)
            out.total.backward()
            back = np.argsort(order)
            gradients = trained_gradients(logps_T, some)
            found.append((out.total.item(), np.concatenate([gradients[i] for i in back])))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
        np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-9, atol=1e-12)
