"""`run.score`: the same log-probabilities in every layout, and those that the loss trains on."""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import pytest
import torch
from mcore_sft.batch import SFTBatch
from mcore_sft.recipe import SFTRecipe
from sft_case import LAYOUTS, SGD, SHAPES, data, sft_case

from mcore_core.protocols import FrozenModel, LossOutput
from mcore_core.testing.cases import Session, assert_same, run_case
from mcore_core.testing.ranks import fork_ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchoredBatch(SFTBatch):
    ref_T: torch.Tensor


class Anchored(SFTRecipe):
    """Cross-entropy times how far the policy is from a reference: needs both models' scores."""

    frozen: ClassVar = {"ref": FrozenModel()}

    def prepare(self, units, run):
        ref = run.score("ref", units)
        policy = run.score("policy", units)
        mine = float(np.concatenate(policy).sum() - np.concatenate(ref).sum())
        gap = float(np.sum(run.gather(mine)))
        yield [{**unit, "ref": r, "gap": gap} for unit, r in zip(units, ref, strict=True)]

    def collate(self, units):
        batch = super().collate(units)
        ref = [u.get("ref", np.zeros(u["length"], np.float32)) for u in units]
        scale = np.float32(units[0].get("gap", 0.0) / 100)
        fields = {n: getattr(batch, n) for n in batch.__dataclass_fields__}
        return AnchoredBatch(**fields, ref_T=torch.from_numpy(np.concatenate(ref)) * scale)

    def loss(self, out, batch, reduce, /):
        trains_T = batch.weights_T > 0
        away_T = torch.where(trains_T, (out.logps_T - batch.ref_T).square() * batch.weights_T, 0.0)
        return LossOutput(away_T.sum(), batch.count_T.sum())


def case(shape="qk-norm"):
    import dataclasses

    plain = sft_case(shape, **SGD)
    recipe = plain.recipe

    def build(config):
        made = recipe(config)
        made.__class__ = Anchored
        return made

    return dataclasses.replace(plain, recipe=build)


@cache
def one_rank(shape):
    return run_case(case(shape), LAYOUTS["one"])


PAIRS = [
    ("tp2-sp", "tied"),
    ("pp2", "qk-norm"),
    ("pp2-vpp2", "qkv-bias"),
    ("cp2", "tied"),
    ("dp2", "qk-norm"),
]
WIDE = [
    (layout, shape)
    for layout in LAYOUTS
    for shape in SHAPES
    if (layout, shape) not in PAIRS and layout != "one" and shape != "dropout"
]
"""Random states belong to a layout, so dropout differs."""


@pytest.mark.parametrize(
    ("layout", "shape"),
    [*PAIRS, *(pytest.param(*w, marks=pytest.mark.parity) for w in WIDE)],
)
def test_a_recipe_that_scores(layout, shape):
    """Its losses and gradients depend on both models' scores of all ranks."""
    assert_same(run_case(case(shape), LAYOUTS[layout]), one_rank(shape), relative=1e-5)


def test_scores_are_what_the_loss_sees():
    """The policy's scores, summed with the weights, are the loss of the first step."""
    micros = data()[0]
    units = [unit for micro in micros for unit in micro]

    def one(_):
        session = Session(case(), LAYOUTS["one"])
        scored = session.models.score("policy", units, entropy=True)
        with pytest.raises(KeyError, match="no model 'teacher': there are policy, ref"):
            session.models.score("teacher", units)
        return scored, session.chunks[0].training

    ((scored, training),) = fork_ranks(one, 1)
    assert training  # as it was before
    plain = run_case(sft_case("qk-norm", **SGD), LAYOUTS["one"], gradients=False)
    total = count = 0.0
    for unit, (logps, entropy) in zip(units, scored, strict=True):
        weights = np.append(unit["weights"][1:], 0.0)
        assert logps.shape == entropy.shape == weights.shape == (unit["length"],)
        assert not logps[weights == 0].any()
        assert (entropy[weights > 0] > 0).all()
        total -= float((logps.astype(np.float64) * weights).sum())
        count += weights.sum()
    assert total / count == pytest.approx(plain.results[0].loss, rel=1e-5)
