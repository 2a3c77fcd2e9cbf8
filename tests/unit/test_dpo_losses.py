"""Every loss over pairs, value and gradient, against TRL's own code or a float64 formula."""

import math

import numpy as np
import pytest
import torch
import trl_losses
from dpo_tools import case, prepared, recipe
from mcore_rlhf.dpo import plugin, rules
from mcore_rlhf.dpo.config import DPOConfig
from mcore_rlhf.dpo.loss import LOSSES
from preference_tools import View, loss_of, padded, random_pair

CASES = 100
IN_TRL = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
"""TRL has bco_pair without its running mean, and sigmoid without label smoothing."""


def in_trl_order(grad_T, units):
    """Return a packed row's gradient as padded [2 P, L] rows, chosen first."""
    parts, start = [], 0
    for unit in units:
        parts.append(grad_T[start : start + unit["length"]].numpy())
        start += unit["length"]
    return padded(units, parts)[0]


def check_against_trl(made, seed, relative=1e-9, scale=4.0, ahead=0.0):
    """`ahead` is added to TRL's reference, and its rewards are then not compared."""
    units, logps = case(seed, scale=scale)
    values, mask = padded(units, logps)
    values.requires_grad_()
    ref = torch.tensor([u["ref_logps"][side] for side in (0, 1) for u in units])
    wanted, metrics = trl_losses.dpo(values, mask, ref.double() + ahead, made.options)
    wanted.backward()
    out, logps_T = loss_of(made, prepared(made, units), logps)
    (out.total / out.count).backward()
    assert out.count == len(units)
    torch.testing.assert_close(out.total / out.count, wanted, rtol=relative, atol=1e-12)
    expected = torch.where(mask, values.grad, 0.0)
    got = in_trl_order(logps_T.grad, units)
    torch.testing.assert_close(got, expected, rtol=relative, atol=1e-12)
    assert logps_T.grad[np.roll(np.concatenate([u["weights"] for u in units]), -1) == 0].sum() == 0
    for name, (total, count) in out.metrics.items():
        is_reward = name in ("rewards/chosen", "rewards/rejected")
        if (ahead and is_reward) or (not made.frozen and name.startswith("rewards/")):
            continue
        if name in metrics:
            assert float(total / count) == pytest.approx(metrics[name], rel=1e-6), name
    assert metrics.keys() - {"num_tokens"} <= out.metrics.keys()


@pytest.mark.parametrize("name", IN_TRL)
def test_loss_is_trls(name):
    smoothed = {"robust": 0.1, "exo_pair": 2**-10, "aot": 0.2, "aot_unpaired": 0.2}
    for seed in range(CASES):
        made = recipe(
            loss_type=name,
            beta=[0.1, 0.5, 0.02][seed % 3],
            label_smoothing=smoothed.get(name, 0.0),
        )
        # TRL takes exo_pair's smoothing in float32
        check_against_trl(made, seed, 1e-6 if name == "exo_pair" else 1e-9)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", sorted(rules.READ_BY["f_divergence_type"]))
def test_divergence_is_trls(name, divergence):
    smoothing = 2**-10 if name == "exo_pair" else 0.0
    made = recipe(loss_type=name, f_divergence_type=divergence, label_smoothing=smoothing)
    for seed in range(100):
        # exponentials of ratios: with long answers TRL's discopop is 0 times infinity
        check_against_trl(made, seed, 1e-6 if name == "exo_pair" else 1e-9, scale=0.4)


@pytest.mark.parametrize(
    ("mine", "trls"),
    [
        ({"loss_type": "sigmoid,sft", "loss_weights": [0.7, 0.3]}, {}),
        ({"loss_type": "hinge,ipo,sigmoid_norm"}, {}),
        (
            {
                "loss_type": "robust,aot,aot_unpaired,sppo_hard,apo_zero,apo_down,nca_pair",
                "loss_weights": [0.5, 2.0, 0.25, 0.01, 1.0, 0.0, -1.0],
                "label_smoothing": 0.2,
                "beta": 0.3,
            },
            {},
        ),
        (
            {
                "loss_type": "robust,ipo,sft",
                "loss_weights": [1.5, 0.1, 0.3],
                "label_smoothing": 0.3,
                "f_divergence_type": "js_divergence",
            },
            {},
        ),
        ({"rpo_alpha": 0.4}, {"loss_type": "sigmoid,sft", "loss_weights": [1.0, 0.4]}),
    ],
)
def test_several_losses_are_trls(mine, trls):
    """RPO is sigmoid and NLL, over the tokens of the whole batch."""
    made, other = recipe(**mine), recipe(**{**mine, **trls, "rpo_alpha": None})
    for seed in range(CASES):
        out, logps_T = loss_of(made, prepared(made, case(seed)[0]), case(seed)[1])
        out.total.backward()
        check_against_trl(other, seed)
        again, again_T = loss_of(other, prepared(other, case(seed)[0]), case(seed)[1])
        again.total.backward()
        torch.testing.assert_close(out.total, again.total, rtol=1e-12, atol=0)
        torch.testing.assert_close(logps_T.grad, again_T.grad, rtol=1e-12, atol=0)


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def sums(units, logps):
    """Policy and reference sums and token counts, float64, chosen and rejected."""
    values, mask = padded(units, logps)
    policy = values.sum(1).numpy().reshape(2, -1)
    ref = np.array([[u["ref_logps"][side] for u in units] for side in (0, 1)])
    return policy, ref, mask.sum(1).numpy().reshape(2, -1)


def formula(name, options, units, logps, delta=0.0):
    """The formulas of the papers, in numpy."""
    policy, ref, tokens = sums(units, logps)
    b, e = options.beta, options.label_smoothing
    d_chosen, d_rejected = policy - ref
    mean_chosen, mean_rejected = policy / tokens
    nll = -policy[0].sum() / tokens[0].sum()

    def smooth(x):
        return -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x)

    match name:
        case "sigmoid":
            values = smooth(b * (d_chosen - d_rejected))
        case "sigmoid_norm":
            values = smooth(b * (d_chosen / tokens[0] - d_rejected / tokens[1]))
        case "bco_pair":
            values = -log_sigmoid(b * d_chosen - delta) - log_sigmoid(delta - b * d_rejected)
        case "cpo":
            values = smooth(b * (policy[0] - policy[1])) + options.cpo_alpha * nll
        case "simpo":
            values = smooth(b * (mean_chosen - mean_rejected) - options.simpo_gamma)
        case "orpo":
            odds = [m - np.log1p(-np.exp(m)) for m in (mean_chosen, mean_rejected)]
            values = nll - b * log_sigmoid(odds[0] - odds[1])
        case "exo_pair":
            x, e = b * (d_chosen - d_rejected), e or 1e-3
            right, wrong = log_sigmoid(x), log_sigmoid(-x)
            values = np.exp(right) * (right - math.log(1 - e)) + np.exp(wrong) * (
                wrong - math.log(e)
            )
    return values.mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "cpo", "simpo", "orpo", "exo_pair"])
def test_loss_is_its_formula(name, smoothing):
    """Those that TRL has in another form or not: values, and gradients by central differences."""
    for seed in range(CASES):
        made = recipe(loss_type=name, beta=0.3, label_smoothing=smoothing, cpo_alpha=0.7)
        units, logps = case(seed)
        out, logps_T = loss_of(made, prepared(made, units), logps)
        (out.total / out.count).backward()
        assert (out.total / out.count).item() == pytest.approx(
            formula(name, made.options, units, logps), rel=1e-10
        )
        rng = np.random.default_rng(seed)
        direction = [rng.normal(size=len(x)) for x in logps]
        step = 1e-5
        up, down = (
            formula(
                name,
                made.options,
                units,
                [x + s * d for x, d in zip(logps, direction, strict=True)],
            )
            for s in (step, -step)
        )
        slope = float(logps_T.grad @ torch.tensor(np.concatenate(direction)))
        assert slope == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    ("name", "smoothing"),
    [("orpo", 0.0), *((n, e) for n in ("cpo", "simpo", "sigmoid") for e in (0.0, 0.2))],
)
def test_reference_free_and_smoothed_losses_are_trls(name, smoothing):
    """Value and gradient against CPOTrainer, whose sigmoid is DPO's where it is given ratios."""
    made = recipe(loss_type=name, beta=0.4, cpo_alpha=0.0, label_smoothing=smoothing)
    kind = "simpo" if name == "simpo" else "sigmoid"
    for seed in range(CASES):
        units, logps = case(seed)
        values, mask = padded(units, logps)
        values.requires_grad_()
        sums_S, tokens_S = torch.where(mask, values, 0.0).sum(1), mask.sum(1)
        if name in ("simpo", "orpo"):
            sums_S = sums_S / tokens_S
        if name == "sigmoid":
            sums_S = sums_S - torch.tensor([u["ref_logps"][i] for i in (0, 1) for u in units])
        chosen_P, rejected_P = sums_S.chunk(2)
        out, logps_T = loss_of(made, prepared(made, units), logps)
        (out.total / out.count).backward()
        exact = 1e-9
        if name == "orpo":
            exact = 1e-4  # TRL takes the odds in float32
            found, rewards, _, *odds = trl_losses.orpo(chosen_P, rejected_P, made.options)
            for key, mean in zip(("log_odds_ratio", "log_odds_chosen"), odds, strict=True):
                total, count = out.metrics[key]
                assert float(total / count) == pytest.approx(mean.item(), rel=1e-4)
            chosen = slice(0, len(units))
            nll = -torch.where(mask, values, 0.0)[chosen].sum() / mask[chosen].sum()
            wanted = nll - found.mean()
        else:
            found, rewards, _ = trl_losses.cpo(chosen_P, rejected_P, made.options, kind)
            wanted = found.mean()
        wanted.backward()
        torch.testing.assert_close(
            out.total / out.count, wanted.double(), rtol=exact, atol=exact * 1e-3
        )
        got = in_trl_order(logps_T.grad, units)
        expected = torch.where(mask, values.grad, 0.0)
        torch.testing.assert_close(got, expected, rtol=exact, atol=exact * 1e-3)
        total, count = out.metrics["rewards/chosen"]
        assert float(total / count) == pytest.approx(float(rewards.mean()), rel=1e-5)


def test_bco_is_trls_with_a_running_mean():
    """TRL 1.16 leaves the mean out: with 0 they agree. TRL 0.24 had it, updated before use.

    A mean d is a reference whose sums are d / beta higher, which gives TRL's value and gradient.
    """
    made = recipe(loss_type="bco_pair")
    mean = 0.0
    for seed in range(CASES):
        units, logps = case(seed)
        with torch.no_grad():  # no training pass: the mean is used and stays
            before = float(made._mean.value)
            out, _ = loss_of(made, prepared(made, units), logps)
            assert float(made._mean.value) == before
        policy, ref, _ = sums(units, logps)
        mean += (made.options.beta * (policy - ref).mean() - mean) / (seed + 1)
        out, _ = loss_of(made, prepared(made, units), logps)
        value = formula("bco_pair", made.options, units, logps, mean)
        assert (out.total / out.count).item() == pytest.approx(value, rel=1e-10)
        assert before != float(made._mean.value) == pytest.approx(mean, rel=1e-12)
    fixed = recipe(loss_type="bco_pair", beta=0.2)
    fixed._mean.update = lambda mean: None
    for seed in range(CASES):
        fixed._mean.value = torch.tensor([0.0, -1.5, 0.7][seed % 3], dtype=torch.float64)
        check_against_trl(fixed, seed, ahead=float(fixed._mean.value) / 0.2)


def test_bco_resumes():
    made = recipe(loss_type="bco_pair")
    for seed in range(3):
        units, logps = case(seed)
        loss_of(made, prepared(made, units), logps)
    other = recipe(loss_type="bco_pair")
    other.load_state_dict(made.state_dict())
    units, logps = case(9)
    wanted, got = (loss_of(r, prepared(r, units), logps)[0].total for r in (made, other))
    assert wanted.item() == got.item()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_name_selects_its_own_loss(name):
    """No two losses agree on a random batch: a name that meant another one would be seen."""
    units, logps = case(5, pairs=4)
    values = {}
    for each in LOSSES:
        made = recipe(loss_type=each, beta=0.3, label_smoothing=0.1)
        out, _ = loss_of(made, prepared(made, units), logps)
        values[each] = out.total.item()
    same = [n for n, value in values.items() if math.isclose(value, values[name], rel_tol=1e-6)]
    assert same == [name]


def test_the_catalogue_lists_every_loss():
    assert plugin.SUMMARIES.keys() == LOSSES.keys()
    for name in plugin.SUMMARIES:
        assert name in DPOConfig.model_fields["loss_type"].description


def test_ipo_and_sigmoid_norm_take_means_over_tokens():
    """Doubling an answer's tokens at the same log-probabilities changes sums and not means."""
    rng = np.random.default_rng(0)
    unit = random_pair(rng)
    unit["ref_logps"] = (0.0, 0.0)
    logps = [np.full(unit["length"], -1.5)]
    longer = {
        **unit,
        "weights": np.concatenate(
            (np.repeat(np.float32([0, 1]), [1, 40]), unit["weights"][unit["chosen_length"] :])
        ),
        "input_ids": np.concatenate(
            (np.zeros(41, np.int32), unit["input_ids"][unit["chosen_length"] :])
        ),
        "chosen_length": 41,
        "length": 41 + unit["length"] - unit["chosen_length"],
    }
    for name, same in {
        "ipo": True,
        "sigmoid_norm": True,
        "simpo": True,
        "sigmoid": False,
        "hinge": False,
    }.items():
        made = recipe(loss_type=name)
        a = loss_of(made, prepared(made, [unit]), logps)[0].total.item()
        other = [np.full(longer["length"], -1.5)]
        b = loss_of(made, prepared(made, [longer]), other)[0].total.item()
        assert (a == pytest.approx(b)) is same, name


def test_reference_free_needs_no_reference():
    made = recipe(reference_free=True)
    assert made.frozen == {}
    units, logps = case(3)
    (found,) = made.prepare(
        [{k: v for k, v in u.items() if k != "ref_logps"} for u in units], View()
    )
    out, _ = loss_of(made, found, logps)
    policy, _, _ = sums(units, logps)
    wanted = -log_sigmoid(0.1 * (policy[0] - policy[1])).mean()
    assert (out.total / out.count).item() == pytest.approx(wanted)
    for name in rules.REFERENCE_FREE:
        assert recipe(loss_type=name).frozen == {}
    assert set(recipe(loss_type="sft,hinge").frozen) == {"ref"}


def test_losses_stay_finite_far_out():
    for name in LOSSES:
        made = recipe(loss_type=name, beta=0.5)
        units, _ = case(4)
        for value in (-1e-12, -300.0):
            logps = [np.full(u["length"], value) for u in units]
            out, logps_T = loss_of(made, prepared(made, units), logps)
            if name == "discopop" and value == -300.0:
                continue  # exp(-z) of the formula itself
            out.total.backward()
            assert torch.isfinite(out.total), name
            assert torch.isfinite(logps_T.grad).all(), name
