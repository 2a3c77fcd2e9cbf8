"""Routing of the old pass (R2) or the rollout (R3) is what training repeats, in every layout."""

from functools import cache

import numpy as np
import pytest
import torch
from grid_cases import layout
from replay_case import EXPERTS, LAYERS, case, generated

from mcore_core.parallel.topology import Layout
from mcore_core.testing.cases import Session, assert_same, run_case
from mcore_core.testing.ranks import fork_ranks

FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
MOE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
SAME = {"relative": 1e-5, "absolute": 1e-6}


@cache
def one_rank(mode):
    return run_case(case(mode), Layout())


def check(name, mode, **options):
    run = run_case(case(mode, **options), layout(name))
    assert_same(run, one_rank(mode), **SAME)


def moved(session):
    """Let the routers prefer other experts."""
    generator = torch.Generator().manual_seed(3)
    for chunk in session.chunks:
        for name, weight in chunk.named_parameters():
            if name.endswith("router.weight"):
                with torch.no_grad():
                    weight.copy_(torch.randn(weight.shape, generator=generator))


def watched(session):
    """Return a list that gets what each training pass of each router sends where."""
    seen = []
    for chunk in session.chunks:
        for module in chunk.modules():
            if hasattr(module, "keep_choice"):

                def choose(*args, module=module, original=module._choose):
                    chosen_TK = original(*args)
                    if module.training:
                        seen.append((module.layer_number, args[2], chosen_TK))
                    return chosen_TK

                module._choose = choose
    return seen


def test_what_was_recorded_is_routed_though_the_routers_changed():
    def one(_):
        session = Session(case("R2"), Layout())
        recipe, models = session.stepper.recipe, session.models
        session.services.micro_batches = 1
        rng = np.random.default_rng(0)
        units = []
        for _ in range(3):
            n = int(rng.integers(5, 12))
            ids = rng.integers(2, 60, n).astype(np.int32)
            trains = np.arange(n) > 2
            units.append(
                {
                    "input_ids": ids,
                    "trains": trains,
                    "advantage": 1.0,
                    "kept": True,
                    "length": n,
                    "rollout": np.zeros(n, np.float32),
                }
            )
        recorded = [r for _, _, r in models.score_with_routing("policy", units)]
        again = [r for _, _, r in models.score_with_routing("policy", units)]
        moved(session)
        other = [r for _, _, r in models.score_with_routing("policy", units)]
        seen = watched(session)
        for unit, routing in zip(units, recorded, strict=True):
            unit["routing"] = routing
        batch = recipe.collate(units)
        result = session.stepper.train([units], 1)
        return recorded, again, other, batch.routing_TLK, seen, result.metrics

    ((recorded, again, other, packed, seen, metrics),) = fork_ranks(one, 1)
    assert all(np.array_equal(a, b) for a, b in zip(recorded, again, strict=True))
    assert recorded[0].shape[1:] == (LAYERS, 3)
    assert all((r >= 0).all() for r in recorded)
    whole, changed = np.concatenate(recorded), np.concatenate(other)
    assert np.array_equal(packed.numpy(), whole)
    assert (np.sort(whole, -1) != np.sort(changed, -1)).mean() > 0.2
    assert len(seen) == LAYERS
    for place, (_, tokens, chosen_TK) in enumerate(seen):
        real = tokens.sequence_T > 0
        assert np.array_equal(chosen_TK[real].numpy(), whole[:, place])
    missing = [
        len(set(a.tolist()) - set(b.tolist())) / 3
        for a, b in zip(whole.reshape(-1, 3), changed.reshape(-1, 3), strict=True)
    ]
    # later layers see inputs that the replay has changed: only the first is comparable exactly
    first = np.array(missing).reshape(-1, LAYERS)[:, 0].mean()
    assert metrics["moe/layer_1/replay_mismatch"] == pytest.approx(first, abs=1e-6)
    assert metrics["moe/replay_mismatch"] > 0.2


def test_gradients_against_float64():
    """The weights and the gradient of a router whose choice is given."""
    from mcore_core.model.moe.router import Router
    from mcore_core.model.moe.tokens import RowTokens

    moe, tokens = EXPERTS.moe, 20

    def one(_):
        session = Session(case("R2"), Layout())
        router = next(m for m in session.chunks[0].modules() if isinstance(m, Router))
        router.train()
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(tokens, moe.num_experts, generator=generator)
        given = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(tokens)])
        given[4] = -1
        upstream = torch.randn(tokens, moe.num_experts, generator=generator)
        found = []
        for dtype in (torch.float32, torch.float64):
            x = logits.clone().to(dtype).requires_grad_()
            ones = torch.ones(tokens, dtype=torch.long)
            probs, _ = router.route(x, RowTokens(ones, torch.arange(tokens), given))
            (probs * upstream).sum().backward()
            found.append((probs.detach(), x.grad))
        return logits, given, upstream, found

    ((logits, given, upstream, found),) = fork_ranks(one, 1)
    x = logits.double().requires_grad_()
    kept = torch.zeros(tokens, moe.num_experts, dtype=torch.bool)
    for token in range(tokens):
        if token != 4:
            kept[token, given[token]] = True
    scores = 1 / (1 + torch.exp(-x))
    weights = torch.where(kept, scores, 0.0)
    expected = moe.scaling_factor * weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
    chosen = torch.arange(tokens) != 4
    (expected * upstream)[chosen].sum().backward()
    for tolerance, (probs, gradient) in zip((1e-5, 1e-12), found, strict=True):
        assert (probs[chosen] - expected[chosen]).abs().max() < tolerance
        assert (gradient[chosen] - x.grad[chosen]).abs().max() < tolerance
        assert (probs[4] > 0).sum() == moe.topk  # left to the router


def test_modes_differ_and_report():
    plain, old, rollout = (one_rank(mode) for mode in ("disabled", "R2", "R3"))
    assert "moe/replay_mismatch" not in plain.results[0].metrics
    assert old.results[0].metrics["moe/replay_mismatch"] == 0
    assert old.results[0].loss == plain.results[0].loss
    assert old.results[1].metrics["moe/replay_mismatch"] > 0
    assert old.results[1].loss != plain.results[1].loss
    loads = [r.tables["moe/load"] for r in old.results]
    assert loads[0] == loads[1] != loads[2] == loads[3]
    assert rollout.results[0].metrics["moe/replay_mismatch"] > 0.4
    # old log-probabilities are of the same routing: the ratio is 1 before the first update
    assert rollout.results[0].metrics["clip_ratio/region_mean"] == 0


@pytest.mark.parametrize(("name", "mode"), [("ep2", "R2"), ("pp2", "R3")])
def test_layout(name, mode):
    check(name, mode)


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["R2", "R3"])
@pytest.mark.parametrize(
    "name",
    ["tp2-sp", "pp2", "pp2-vpp2", "cp2", "dp2", "ep2", "ep2-tp2-sp-cp2", "ep2-pp2", "tp2-sp-etp2"],
)
def test_grid(name, mode):
    check(name, mode)


@pytest.mark.parity
@pytest.mark.parametrize("recompute", [FULL, MOE], ids=["full", "moe"])
@pytest.mark.parametrize("name", ["one", "pp2", "cp2"])
def test_recompute(name, recompute):
    check(name, "R3", **recompute)


def test_the_native_engine_records_what_it_did():
    recorded(Layout())


@pytest.mark.parity
@pytest.mark.parametrize("name", ["tp2-sp", "pp2-vpp2", "cp2", "ep2", "ep2-pp2"])
def test_the_native_engine_records_in_layouts(name):
    recorded(layout(name))


def recorded(sizes):
    """With weights as they were, the training code's own routers choose what was recorded."""

    def one(_):
        session = Session(generated(), sizes)
        seen = []
        recipe = session.stepper.recipe
        assembler = recipe.parts[2]

        def assemble(sampled, run, steps):
            found = type(assembler).__call__(assembler, sampled, run, steps)
            given = [u["routing"] for u in found.units]
            plain = [{k: v for k, v in u.items() if k != "routing"} for u in found.units]
            own = [r for _, _, r in session.models.score_with_routing("policy", plain)]
            seen.append((given, own))
            return found

        recipe._parts = (*recipe.parts[:2], assemble)
        results = session.train(1)
        return seen, [r.metrics["moe/replay_mismatch"] for r in results]

    for seen, mismatch in fork_ranks(one, sizes.world):
        ((given, own),) = seen
        for a, b in zip(given, own, strict=True):
            assert (a[-1] == -1).all()
            assert np.array_equal(np.sort(a[:-1], -1), np.sort(b[:-1], -1))
        assert mismatch[0] == 0
