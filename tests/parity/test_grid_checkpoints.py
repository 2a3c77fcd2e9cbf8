"""Saved in one layout of the grid, resumed in another: the next steps are the same.

Every layout is resumed in, from a layout that the sources take turns at. `make parity` runs the
pairs in SOME, `make grid` all.
"""

import math

import pytest
import test_checkpoint_layouts as saved
from grid_cases import ARCHITECTURES, LAYOUTS, layout, reason
from layer_cases import STEEP
from mcore_sft.config import SFTConfig
from sft_case import ADAM, RECOMPUTE, data, recipe

from mcore_core.testing.cases import Case, assert_same

pytestmark = pytest.mark.parity

SHARDED = {"use_distributed_optimizer": True}
WHOLE = {"use_distributed_optimizer": False}
SOURCES = {
    "dense": [("tp2-sp", WHOLE), ("pp2-vpp2-dp2", SHARDED), ("cp2-dp2", SHARDED), ("pp4", WHOLE)],
    "moe": [
        ("ep2", SHARDED),
        ("ep4", WHOLE),
        ("tp2-sp-etp2", SHARDED),
        ("ep2-pp2-vpp2-dp2", SHARDED),
        ("one", SHARDED),
        ("ep2-etp2-tp2-sp-dp2", WHOLE),
    ],
    "mla-moe-mtp": [
        ("ep2", WHOLE),
        ("tp2-sp-ep2", SHARDED),
        ("pp2-vpp2", SHARDED),
        ("ep4-cp2-dp2", SHARDED),
        ("one", WHOLE),
    ],
    "gdn": [("tp2-sp", SHARDED), ("pp2-vpp2", WHOLE), ("cp2-dp2", SHARDED), ("one", SHARDED)],
}
"""Where a checkpoint is made, by which optimizer."""
SOME = {
    "dense": {"tp2", "pp2-vpp2", "cp2", "dp2", "one"},
    "moe": {"one", "ep2", "ep4", "tp2-sp-etp2", "pp2", "dp2", "ep2-tp2-sp-cp2"},
    "mla-moe-mtp": {"one", "ep2", "pp2", "cp2", "tp2-sp"},
    "gdn": {"one", "pp2", "cp2", "dp2", "tp2-sp-pp2"},
}
LR = {"gdn": 0.003}


def case_of(architecture, optimizer):
    options = {**ADAM, **RECOMPUTE["none"], "mtp_loss_scaling_factor": 0.5, **optimizer}
    if architecture in STEEP:
        options["lr"] = LR[architecture]
    return Case(
        architecture=ARCHITECTURES[architecture],
        recipe=recipe,
        steps=data(saved.STEPS),
        options=options,
        groups=(SFTConfig,),
    )


def targets(architecture):
    """Which layouts each source's checkpoint is resumed in."""
    names = ["one", *(n for n in LAYOUTS if reason(architecture, n) is None)]
    sources = SOURCES[architecture]
    found = {source: [] for source, _ in sources}
    for i, name in enumerate(names):
        # a source's own layout, and its turn among the others
        where = (i + sum(map(ord, name))) % len(sources)
        if sources[where][0] == name:
            where = (where + 1) % len(sources)
        found[sources[where][0]].append(name)
    return found


def pairs():
    for architecture, sources in SOURCES.items():
        for source, optimizer in sources:
            for name in targets(architecture)[source]:
                marks = () if name in SOME[architecture] else pytest.mark.grid
                label = f"{architecture}-{source}-to-{name}"
                yield pytest.param(architecture, source, optimizer, name, marks=marks, id=label)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Train in a source's layout, once."""
    made = {}

    def make(architecture, source, optimizer):
        key = architecture, source
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{architecture}-{source}")
            case = case_of(architecture, optimizer)
            made[key] = folder, saved._uninterrupted(case, layout(source), folder)
        return made[key]

    return make


@pytest.mark.parametrize(("architecture", "source", "optimizer", "name"), pairs())
def test_resumed(checkpoints, architecture, source, optimizer, name):
    folder, reference = checkpoints(architecture, source, optimizer)
    (optimizer_loaded, _), run = saved._resume(
        case_of(architecture, optimizer), layout(name), folder
    )
    assert optimizer_loaded
    for a, b in zip(run.results, reference.results, strict=True):
        assert math.isclose(a.loss, b.loss, rel_tol=1e-6), (a.loss, b.loss)
    assert_same(run, reference, relative=1e-5)


def resumed(tmp_path, architecture, source, name, optimizer, other):
    reference = saved._uninterrupted(case_of(architecture, optimizer), layout(source), tmp_path)
    _, run = saved._resume(case_of(architecture, other), layout(name), tmp_path)
    assert_same(run, reference, relative=1e-5)


@pytest.mark.parametrize("optimizer", [SHARDED, WHOLE], ids=["distributed", "whole"])
@pytest.mark.parametrize(("source", "name"), [("ep2", "one"), ("ep4", "dp2"), ("one", "ep2")])
def test_experts_come_together_and_part(tmp_path, source, name, optimizer):
    """EP to EP1: experts that ranks shared out, and their optimizer state, on each of them."""
    resumed(tmp_path, "moe", source, name, optimizer, optimizer)


@pytest.mark.parametrize("optimizer", [SHARDED, WHOLE], ids=["distributed", "whole"])
@pytest.mark.parametrize(("source", "name"), [("one", "pp4"), ("pp4", "ep2"), ("pp4-dp2", "pp2")])
def test_stages_without_experts(tmp_path, source, name, optimizer):
    """The first stage holds no experts: it has no state of their optimizer, nor its step."""
    resumed(tmp_path, "moe", source, name, optimizer, optimizer)


@pytest.mark.parametrize(("optimizer", "other"), [(SHARDED, WHOLE), (WHOLE, SHARDED)])
def test_the_other_kind_of_optimizer_is_refused(tmp_path, optimizer, other):
    with pytest.raises(AssertionError, match=r"MC709.*saved with --use_distributed_optimizer"):
        resumed(tmp_path, "dense", "dp2", "tp2", optimizer, other)


def test_every_layout_is_resumed_in():
    for architecture in ARCHITECTURES:
        resumed = {n for names in targets(architecture).values() for n in names}
        assert resumed >= {n for n in LAYOUTS if reason(architecture, n) is None}
        assert {s for s, _ in SOURCES[architecture]} - {"one"} <= set(LAYOUTS)
