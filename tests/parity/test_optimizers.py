"""Every optimizer: against references, in every layout, saved and loaded in others."""

import math

import pytest
from sft_case import ADAM, LAYOUTS, SGD, SHAPES, sft_case
from test_checkpoint_layouts import _resume, _uninterrupted

from mcore_core.testing.cases import assert_same, run_case
from mcore_core.testing.parity import largest_difference

MUON = {
    "optimizer": "muon",
    "lr": 0.01,
    "lr_decay_style": "constant",
    "weight_decay": 0.1,
    "adam_eps": 1e-3,
    "use_distributed_optimizer": False,
}
DIST_MUON = {**MUON, "optimizer": "dist_muon"}
QUINTIC = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]
"""Keller Jordan, modded-nanogpt, commit 0674386, train_gpt_medium.py."""
NOISE = 2e-4
"""The iteration multiplies small singular values, and their rounding, by up to 500."""


def orthogonalized(gradient):
    """Newton-Schulz in float64: U S V^T becomes about U V^T, scaled as Muon's authors do."""
    x = gradient.double()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm()
    for a, b, c in QUINTIC:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.T if tall else x
    return x * math.sqrt(max(x.shape))


def update(key, gradient):
    """What Muon subtracts: q, k and v are matrices of their own."""
    if "linear_qkv" not in key:
        return orthogonalized(gradient)
    shape = SHAPES["qk-norm"]
    heads, groups = shape.num_attention_heads, shape.num_query_groups
    rows = gradient.view(groups, heads // groups + 2, shape.kv_channels, -1)
    parts = rows.split([heads // groups, 1, 1], dim=1)
    done = [orthogonalized(p.reshape(-1, p.shape[-1])).view(p.shape) for p in parts]
    import torch

    return torch.cat(done, 1).reshape(gradient.shape)


def test_a_step_of_muon_in_float64():
    """Decoupled decay, momentum 0.95 from zero, orthogonalized matrices; Adam for the others."""
    before = run_case(
        sft_case(steps=1, **{**MUON, "lr": 1e-30, "weight_decay": 0.0}), LAYOUTS["one"]
    ).weights
    run = run_case(sft_case(steps=1, **MUON), LAYOUTS["one"])
    (gradients,) = run.gradients
    clip = min(1.0, 1.0 / (run.results[0].grad_norm + 1e-6))
    matrices = 0
    for key, weight in before.items():
        g = gradients[key].double() * clip
        if g.dim() == 2 and "embedding" not in key and "output_layer" not in key:
            expected = weight.double() * (1 - 0.01 * 0.1) - 0.01 * update(key, 0.05 * g)
            matrices += 1
        else:
            decay = 0.1 if weight.dim() > 1 else 0.0
            # the first step of Adam: g / (|g| + eps)
            expected = weight.double() * (1 - 0.01 * decay) - 0.01 * g / (g.abs() + 1e-3)
        worst, _ = largest_difference({key: run.weights[key]}, {key: expected.float()})
        assert worst < 1e-5, (key, worst)
    assert matrices == 4 * 4  # qkv, proj, fc1, fc2 of four layers


def reference(options):
    return run_case(sft_case(**options), LAYOUTS["one"])


@pytest.fixture(scope="module")
def muon():
    return reference(MUON)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        pytest.param("tp2-sp", MUON, id="tp2-sp"),
        pytest.param("pp2", MUON, id="pp2"),
        pytest.param("dp2", DIST_MUON, id="dp2-dist"),
        pytest.param("dp2", MUON, id="dp2", marks=pytest.mark.parity),
        pytest.param("cp2", MUON, id="cp2", marks=pytest.mark.parity),
        pytest.param("tp2-dp2", DIST_MUON, id="tp2-dp2-dist", marks=pytest.mark.parity),
        pytest.param("pp2-dp2", DIST_MUON, id="pp2-dp2-dist", marks=pytest.mark.parity),
        pytest.param("tp2-pp2-sp", MUON, id="tp2-pp2-sp", marks=pytest.mark.parity),
    ],
)
def test_muon_in_layouts(muon, layout, options):
    run = run_case(sft_case(**options), LAYOUTS[layout], gradients=options is MUON)
    assert_same(run, muon, relative=NOISE)


STEPS = 6
TOLERANCE = {"muon": NOISE, "dist_muon": NOISE, "adam": 1e-5, "sgd": 1e-5}


@pytest.mark.parametrize(
    ("options", "saved", "loaded"),
    [
        pytest.param(MUON, "tp2", "pp2", id="muon-tp2-pp2"),
        pytest.param(DIST_MUON, "dp2", "one", id="dist-muon-dp2-one"),
        pytest.param(DIST_MUON, "dp2", "dp2", id="dist-muon-dp2", marks=pytest.mark.parity),
        pytest.param(DIST_MUON, "one", "dp2", id="dist-muon-one-dp2", marks=pytest.mark.parity),
        pytest.param(DIST_MUON, "tp2", "dp2", id="dist-muon-tp2-dp2", marks=pytest.mark.parity),
        pytest.param(SGD, "tp2", "pp2", id="sgd-tp2-pp2", marks=pytest.mark.parity),
        pytest.param(ADAM, "tp2", "one", id="adam-tp2-one", marks=pytest.mark.parity),
    ],
)
def test_state_is_resharded(tmp_path, options, saved, loaded):
    case = sft_case(steps=STEPS, **options)
    expected = _uninterrupted(case, LAYOUTS[saved], tmp_path)
    flags, run = _resume(case, LAYOUTS[loaded], tmp_path)
    assert flags[0]
    assert_same(run, expected, relative=TOLERANCE[options["optimizer"]])


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        pytest.param({**ADAM, "use_distributed_optimizer": True}, "dp2", id="distributed"),
        pytest.param(MUON, "one", id="muon"),
        pytest.param(ADAM, "one", id="adam", marks=pytest.mark.parity),
        pytest.param(SGD, "tp2", id="sgd", marks=pytest.mark.parity),
        pytest.param(DIST_MUON, "dp2", id="dist-muon", marks=pytest.mark.parity),
    ],
)
def test_saved_before_the_first_step(tmp_path, options, layout):
    """No update has made any state yet: as with SIGTERM in step 1, or float16 that skipped it."""
    case = sft_case(steps=3, **options)
    expected = run_case(case, LAYOUTS[layout], gradients=False)
    flags, run = resumed_from_the_start(case, LAYOUTS[layout], tmp_path)
    assert all(flags)
    assert [r.loss for r in run.results] == expected.losses
    assert_same(run, expected, relative=1e-7)


def resumed_from_the_start(case, layout, folder):
    """Save before any step, load into another model, train."""
    import torch

    from mcore_core.checkpoint import folders
    from mcore_core.checkpoint.load import load
    from mcore_core.checkpoint.save import Contents, Saver
    from mcore_core.config.checkpoint import CheckpointConfig
    from mcore_core.testing.cases import RankRun, Session, combine
    from mcore_core.testing.ranks import fork_ranks

    def saves(_):
        session = Session(case, layout)
        training = {"layout": str(layout), "world": layout.world, "has_optimizer": True}
        saver = Saver(folder, CheckpointConfig(), lambda *a: None)
        saver.save(session.trainable, Contents(1, training, {}, None))
        saver.close()

    def resumes(_):
        session = Session(case, layout, seed=7)
        with torch.no_grad():
            for chunk in session.chunks:
                for parameter in chunk.parameters():
                    parameter.zero_()
        loaded = load(session.trainable, folders.require(folder), CheckpointConfig())
        results = session.train(3)
        return (loaded.optimizer, loaded.rng), RankRun(results, [], session.weights())

    fork_ranks(saves, layout.world)
    ranks = fork_ranks(resumes, layout.world)
    return ranks[0][0], combine([run for _, run in ranks])
