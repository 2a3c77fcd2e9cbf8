"""KTO: losses and metrics against TRL's own code, and how prompts meet other answers."""

import numpy as np
import pytest
import torch
import trl_losses
from mcore_rlhf.config import ReferenceConfig, RLHFConfig
from mcore_rlhf.kto.config import KTOConfig
from mcore_rlhf.kto.mismatch import mismatched
from mcore_rlhf.kto.recipe import KTORecipe
from preference_tools import View, config, logps_of, loss_of, padded, random_answer, template

from mcore_core.errors import UsageError

CASES = 100


def recipe(**options):
    return KTORecipe(config(RLHFConfig, KTOConfig, ReferenceConfig, **options), template())


def case(seed, answers=None, good=None):
    rng = np.random.default_rng(seed)
    count = answers or int(rng.integers(2, 6))
    labels = rng.random(count) < 0.5 if good is None else np.full(count, good)
    units = [random_answer(rng, label) for label in labels]
    return units, logps_of(rng, units)


def known(unit):
    """Fixed reference scores of any tokens."""
    return -(np.asarray(unit["input_ids"], np.float64) % 7) * (np.asarray(unit["weights"]) > 0)


def drifted(unit):
    return known(unit) * 0.8 + 0.05 * (np.asarray(unit["weights"]) > 0)


def prepared(made, units, **view):
    bare = [{k: v for k, v in unit.items() if k != "ref_logps"} for unit in units]
    (found,) = made.prepare(bare, View(**{"ref": known, "policy": drifted, **view}))
    return found


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_loss_and_metrics_are_trls(name):
    made = recipe(loss_type=name, beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)
    for seed in range(CASES):
        units, logps = case(seed)
        ready = prepared(made, units)
        others = mismatched(units, View(), max_length=None)
        gaps = torch.tensor([drifted(u).sum() - known(u).sum() for u in others])
        values, mask = padded(units, logps, halves=("all",))
        values.requires_grad_()
        ref = torch.tensor([known(u).sum() for u in units])
        good = torch.tensor([bool(u["label"]) for u in units])
        wanted, metrics = trl_losses.kto(values, mask, ref, good, gaps, made.options)
        wanted.backward()
        out, logps_T = loss_of(made, ready, logps)
        (out.total / out.count).backward()
        torch.testing.assert_close(out.total / out.count, wanted, rtol=1e-9, atol=1e-12)
        parts = np.split(logps_T.grad.numpy(), np.cumsum([u["length"] for u in units])[:-1])
        got = padded(units, parts, halves=("all",))[0]
        torch.testing.assert_close(got, torch.where(mask, values.grad, 0.0), rtol=1e-9, atol=1e-12)
        counted = {k: (a / b).item() for k, (a, b) in out.metrics.items() if b}
        for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"):
            assert (key in counted) == (key in metrics), key
            if key in counted:
                assert counted[key] == pytest.approx(metrics[key], rel=1e-9, abs=1e-12), key
        if name == "kto":
            assert counted["kl"] == pytest.approx(metrics["kl"])


def test_the_divergence_is_at_least_zero_and_has_no_gradient():
    made = recipe()
    units, _ = case(0, answers=6)
    assert prepared(made, units)[0]["kl"] > 0
    assert prepared(made, units, policy=lambda u: known(u) - 1.0)[0]["kl"] == 0.0


def test_apo_has_no_divergence_pass():
    made = recipe(loss_type="apo_zero_unpaired")
    units, _ = case(0)
    view = View(ref=known)  # has no scores of the policy
    (found,) = made.prepare(units, view)
    assert {u["kl"] for u in found} == {0.0}


def lengthened(unit, values, rng):
    """The same answer with untrained tokens behind it: padding, as losses see it."""
    more = int(rng.integers(0, 4))
    ids = np.concatenate((unit["input_ids"], np.zeros(more, np.int32)))
    weights = np.concatenate((unit["weights"], np.zeros(more, np.float32)))
    longer = {**unit, "input_ids": ids, "weights": weights, "length": len(ids)}
    return longer, np.concatenate((values, -rng.random(more)))


def gradients(logps_T, units):
    """Return the gradient of each unit's trained tokens."""
    parts = np.split(logps_T.grad.numpy(), np.cumsum([u["length"] for u in units])[:-1])
    shifted = [np.roll(u["weights"], -1) > 0 for u in units]
    return [part[trains] for part, trains in zip(parts, shifted, strict=True)]


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_split_padding_and_order_change_nothing(name):
    """The estimate and the metrics' counts are the global batch's: so is every micro-batch."""
    made = recipe(loss_type=name, beta=0.3, desirable_weight=1.5)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        units, logps = case(seed, answers=9)
        order = rng.permutation(9)
        whole = prepared(made, units)
        shuffled = prepared(made, [units[i] for i in order])
        kls = [unit["kl"] for unit in shuffled]
        assert kls == pytest.approx([whole[0]["kl"]] * 9, rel=1e-12)
        reference, reference_T = loss_of(made, whole, logps)
        reference.total.backward()
        wanted = gradients(reference_T, units)
        cuts = sorted(rng.choice(range(1, 9), int(rng.integers(1, 9)), replace=False))
        total = count = 0.0
        sums = {}
        for part in np.split(np.arange(9), cuts):
            longer = [lengthened(shuffled[i], logps[order[i]], rng) for i in part]
            some = [unit for unit, _ in longer]
            out, logps_T = loss_of(made, some, [values for _, values in longer])
            out.total.backward()
            for i, found in zip(part, gradients(logps_T, some), strict=True):
                np.testing.assert_allclose(found, wanted[order[i]], rtol=1e-9, atol=1e-12)
            total, count = total + out.total.item(), count + out.count.item()
            for key, (a, b) in out.metrics.items():
                x, y = sums.get(key, (0.0, 0.0))
                sums[key] = (x + a.item(), y + b.item())
        assert (total, count) == (pytest.approx(reference.total.item(), rel=1e-12), 9)
        for key, (a, b) in reference.metrics.items():
            assert sums[key] == pytest.approx((a.item(), b.item()), rel=1e-9, abs=1e-12), key


@pytest.mark.parametrize("good", [True, False])
def test_a_micro_batch_of_one_class(good):
    """It trains like any other, and leaves the other class's metrics out."""
    made = recipe()
    units, logps = case(4, answers=4, good=good)
    out, logps_T = loss_of(made, prepared(made, units), logps)
    out.total.backward()
    assert logps_T.grad.abs().sum() > 0
    present = {k for k, (_, count) in out.metrics.items() if count}
    mine, other = ("chosen", "rejected") if good else ("rejected", "chosen")
    assert f"rewards/{mine}" in present
    assert f"rewards/{other}" not in present
    assert "rewards/margins" not in present


def text(unit, part):
    at = unit["prompt_length"]
    return tuple(unit["input_ids"][part(at)].tolist())


def test_prompts_meet_the_answers_of_others():
    """Every answer is used once, none with its own prompt, whatever the order or the ranks."""
    units, _ = case(6, answers=8)
    found = mismatched(units, View(), max_length=None)
    answers = sorted(text(u, lambda at: slice(at, None)) for u in units)
    used = []
    for unit, other in zip(units, found, strict=True):
        at = unit["prompt_length"]
        assert (other["input_ids"][:at] == unit["input_ids"][:at]).all()
        assert not other["weights"][:at].any()
        rest = tuple(other["input_ids"][at:].tolist())
        assert rest != text(unit, lambda at: slice(at, None))
        used.append(rest)
        assert other["length"] == len(other["input_ids"]) == len(other["weights"])
    assert sorted(used) == answers
    order = [5, 1, 7, 0, 2, 6, 3, 4]
    again = mismatched([units[i] for i in order], View(), max_length=None)
    for place, i in enumerate(order):
        assert (again[place]["input_ids"] == found[i]["input_ids"]).all()
    # two ranks of four
    everything = []
    for part in (units[:4], units[4:]):
        mismatched(part, View(gather=lambda v: everything.append(v) or [v]), max_length=None)
    for rank, part in enumerate((units[:4], units[4:])):
        got = mismatched(part, View(gather=lambda v: everything), max_length=None)
        for mine, whole in zip(got, found[4 * rank :], strict=False):
            assert (mine["input_ids"] == whole["input_ids"]).all()


def test_a_long_mismatch_loses_the_beginning_of_its_prompt():
    units, _ = case(8, answers=6)
    for limit in (3, 5, 8):
        for unit in mismatched(units, View(), max_length=limit):
            assert 2 <= unit["length"] <= limit
            assert unit["weights"].any()


def test_a_batch_of_one_is_an_error():
    units, _ = case(1, answers=1, good=True)
    with pytest.raises(UsageError, match="a global batch of one answer"):
        prepared(recipe(), units)


class Table:
    def __init__(self, *labels):
        self.labels = np.array(labels)

    def column(self, name):
        assert name == "label"
        return self.labels


def test_data_of_one_class_is_an_error():
    made = recipe()
    made.check_data([Table(1, 1), Table(0)])
    with pytest.raises(UsageError) as error:
        made.check_data([Table(1, 1), Table(1)])
    assert str(error.value) == (
        "error[MC333]: all 3 answers are desirable: there is nothing undesirable to compare with\n"
        "  their 'label' is true\n"
        "  fix: add undesirable answers, or use --plugin sft to learn good ones"
    )
    with pytest.raises(UsageError, match="all 2 answers are undesirable"):
        made.check_data([Table(0, 0)])
