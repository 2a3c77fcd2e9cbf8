"""Balancing losses, sinkhorn and capacities against loops in float64, in every layout of the rows.

The router is run by itself on given logits: what each rank adds to the gradient of its tokens'
logits is put together by token and compared with autograd over the whole batch.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from mcore_moe.config import MoEConfig
from sft_case import SHAPE

from mcore_core.config.kernel import kernel_config
from mcore_core.model.build import ModelPlan, decoder_config
from mcore_core.model.moe.router import Router
from mcore_core.model.moe.stats import LOSSES, ExpertReport
from mcore_core.model.moe.tokens import row_tokens
from mcore_core.model.shapes import MoEShape
from mcore_core.parallel import state
from mcore_core.parallel.topology import Layout
from mcore_core.platform import install
from mcore_core.protocols import Batch
from mcore_core.testing.ranks import fork_ranks
from mcore_core.train.place import place

E, K, C = 5, 2, 0.7
MICROS = [(4, 7), (3,), (9, 2, 6), (5, 8)]
"""Lengths of the sequences of each micro-batch."""
LAYOUTS = {
    "one": Layout(),
    "dp2": Layout(world=2),
    "cp2": Layout(world=2, cp=2),
    "tp2": Layout(world=2, tp=2),
    "tp2-sp": Layout(world=2, tp=2, sp=True),
    "ep2": Layout(world=2, ep=2),
    "cp2-tp2": Layout(world=4, cp=2, tp=2, sp=True),
    "cp2-tp2-dp2": Layout(world=8, cp=2, tp=2, sp=True),
}


def moe(score):
    return MoEShape(
        num_experts=E, topk=K, ffn_hidden_size=8, layers=(0, 1, 2, 3), score_function=score
    )


def logits_of(micro):
    generator = torch.Generator().manual_seed(micro)
    return 2 * torch.randn(sum(MICROS[micro]), E, generator=generator, dtype=torch.float64)


def scores(row, score):
    """Return one token's scores, by the textbook."""
    if score == "sigmoid":
        single = [1 / (1 + (-x).exp()) for x in row]
        return [s / sum(single) for s in single]
    return [x.exp() / sum(y.exp() for y in row) for x in row]


def switch(tokens, score):
    """E sum f_e P_e over a list of tokens' logits (Fedus et al. 2021, eq. 4)."""
    p = [scores(row, score) for row in tokens]
    top = [sorted(range(E), key=lambda e, s=s: -float(s[e].detach()))[:K] for s in p]
    f = [sum(e in chosen for chosen in top) / (len(tokens) * K) for e in range(E)]
    mean = [sum(s[e] for s in p) / len(tokens) for e in range(E)]
    return E * sum(a * b for a, b in zip(f, mean, strict=True))


def reference(kind, score):
    """Return the loss of the batch and its gradient by each micro-batch's logits."""
    rows = [logits_of(m).requires_grad_() for m in range(len(MICROS))]
    if kind == "global_aux_loss":
        loss = switch([t for row in rows for t in row], score)
    else:
        each = []
        for row, lengths in zip(rows, MICROS, strict=True):
            if kind == "aux_loss":
                each.append(switch(list(row), score))
            elif kind == "seq_aux_loss":
                parts = row.split(list(lengths))
                each.append(sum(switch(list(p), score) for p in parts) / len(parts))
            else:
                squares = [sum(x.exp() for x in t).log() ** 2 for t in row]
                each.append(sum(squares) / len(squares))
        loss = sum(each) / len(each)
    (C * loss).backward()
    return float(loss.detach()), [row.grad for row in rows]


def router_of(layout, score, **options):
    from megatron.core.process_groups_config import ProcessGroupCollection

    config = kernel_config(MoEConfig, sequence_parallel=layout.sp, **options)
    plan = ModelPlan(
        architecture=dataclasses.replace(SHAPE, moe=moe(score)),
        layout=layout,
        stage_layers=[SHAPE.num_layers],
        dtype=torch.float32,
        transformer_engine=False,
    )
    decoder = decoder_config(plan, config, on_cpu=True)
    router = Router(decoder, pg_collection=ProcessGroupCollection.use_mpu_process_groups())
    router.set_layer_number(2)
    return decoder, router


def passes(layout):
    """Yield this rank's micro-batches: number, its tokens, where they stand, and their logits."""
    from megatron.core import parallel_state as groups

    first = groups.get_data_parallel_rank()
    tp = groups.get_tensor_model_parallel_rank()
    for micro in range(first, len(MICROS), layout.dp):
        lengths = MICROS[micro]
        zeros = torch.zeros(sum(lengths), dtype=torch.long)
        batch = Batch(tokens_T=zeros, targets_T=zeros, weights_T=zeros.float(), lengths=lengths)
        placed = place(
            batch,
            layout,
            torch.device("cpu"),
            cp_rank=groups.get_context_parallel_rank(),
            cp_group=groups.get_context_parallel_group(),
        )
        tokens = row_tokens(placed.row, torch.device("cpu"), layer=None, part=tp, parts=layout.tp)
        more = -len(placed.source) % layout.tp
        source = torch.nn.functional.pad(placed.source, (0, more), value=-1)
        source = source.chunk(layout.tp)[tp]
        noise = torch.randn(len(source), E, dtype=torch.float64)
        logits = torch.where((source < 0)[:, None], noise, logits_of(micro)[source.clamp(min=0)])
        yield micro, tokens, source, logits.requires_grad_()


def together(found):
    """Put the values of all ranks' tokens together, a tensor for each micro-batch."""
    whole = [torch.zeros(sum(n), E, dtype=torch.float64) for n in MICROS]
    for micro, source, values in itertools.chain(*found):
        real = source >= 0
        whole[micro][source[real]] = values[real].double()
    return whole


KINDS = [(kind, score) for kind in LOSSES for score in ("softmax", "sigmoid")]


def loss_of(layout, kind, score):
    """Return each token's gradient of one loss as this rank has it, and the metric."""
    options = {"moe_z_loss_coeff": C, "moe_aux_loss_coeff": 0.0}
    if kind != "z_loss":
        options = {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": C}
    decoder, router = router_of(layout, score, moe_router_dtype="fp64", **options)
    chunk = torch.nn.Module()
    chunk.config, chunk.router = decoder, router
    report = ExpertReport([chunk], torch.device("cpu"))
    micros = list(passes(layout))
    decoder.aux_loss_scale = 1 / (len(micros) * layout.dp)
    if report.counts_batch:
        report.start_counting()
        with torch.no_grad():
            for _, tokens, _, logits in micros:
                router.route(logits, tokens)
        report.stop_counting()
    found = []
    for micro, tokens, source, logits in micros:
        probs, _ = router.route(logits, tokens)
        (probs * 0).sum().backward()
        found.append((micro, source, logits.grad))
    return found, report.finish()[0][f"moe/layer_0/{kind}"]


@pytest.mark.parametrize(
    "name",
    [n if n in ("one", "cp2-tp2") else pytest.param(n, marks=pytest.mark.parity) for n in LAYOUTS],
)
def test_loss_and_gradient(name):
    layout = LAYOUTS[name]

    def one_rank(_):
        state.initialize(install(), layout, seed=1)
        return [loss_of(layout, kind, score) for kind, score in KINDS]

    ranks = fork_ranks(one_rank, layout.world)
    for case, (kind, score) in enumerate(KINDS):
        value, expected = reference(kind, score)
        for rank in ranks:
            assert rank[case][1] == pytest.approx(value, rel=1e-12), (kind, score)
        found = together([rank[case][0] for rank in ranks])
        for mine, grad in zip(found, expected, strict=True):
            assert grad.abs().max() > 1e-4
            assert (mine - grad).abs().max() <= 1e-12, (kind, score)


def balanced(logits):
    """Sinkhorn's iteration as megatron-core has it, in float64."""
    cost = logits.exp()
    d0 = torch.ones(len(cost), dtype=torch.float64)
    d1 = torch.ones(E, dtype=torch.float64)
    error = 1.0
    while error > 1e-4:
        d0 = 1 / len(cost) / ((d1 * cost).sum(1) + 1e-8)
        new = 1 / E / ((d0[:, None] * cost).sum(0) + 1e-8)
        error = float((new - d1).abs().mean())
        d1 = new
    return d1 * cost * d0[:, None]


def routed_on(layout, **options):
    """Return each micro-batch's weights, which are kept, and the metrics, as a run has them."""

    def one_rank(_):
        state.initialize(install(), layout, seed=1)
        decoder, router = router_of(layout, "softmax", moe_router_dtype="fp64", **options)
        chunk = torch.nn.Module()
        chunk.config, chunk.router = decoder, router
        found = []
        for micro, tokens, source, logits in passes(layout):
            probs, kept = router.route(logits, tokens)
            assert not bool((probs != 0)[~kept].any())
            found.append(((micro, source, probs.detach()), (micro, source, kept.double())))
        return found, ExpertReport([chunk], torch.device("cpu")).finish()

    ranks, reports = zip(*fork_ranks(one_rank, layout.world), strict=True)
    assert all(report == reports[0] for report in reports)
    weights = together([[a for a, _ in rank] for rank in ranks])
    return weights, together([[b for _, b in rank] for rank in ranks]), reports[0]


SOME = [
    pytest.param("one", marks=pytest.mark.parity),
    "cp2-tp2",
    pytest.param("cp2-tp2-dp2", marks=pytest.mark.parity),
]


@pytest.mark.parametrize("layout", SOME)
def test_sinkhorn(layout):
    weights, kept, _ = routed_on(LAYOUTS[layout], moe_router_load_balancing_type="sinkhorn")
    plain = 0
    for micro, (weight, mine) in enumerate(zip(weights, kept, strict=True)):
        logits = logits_of(micro)
        chosen = balanced(logits).topk(K, -1).indices
        assert torch.equal(mine, torch.zeros_like(mine).scatter(-1, chosen, 1.0))
        p = logits.softmax(-1).gather(-1, chosen)
        expected = torch.zeros_like(mine).scatter(-1, chosen, p / p.sum(-1, keepdim=True))
        assert (weight - expected).abs().max() <= 1e-12
        plain += int((chosen.sort().values != logits.topk(K, -1).indices.sort().values).sum())
    assert plain > 0  # otherwise balancing chose what the scores would


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("layout", SOME)
def test_capacity(layout, policy):
    factor = 0.9
    weights, kept, (metrics, tables) = routed_on(
        LAYOUTS[layout],
        moe_expert_capacity_factor=factor,
        moe_token_drop_policy=policy,
        moe_aux_loss_coeff=0.0,
    )
    dropped, load, entropy = 0, [0] * E, 0.0
    for micro, (weight, mine) in enumerate(zip(weights, kept, strict=True)):
        p = logits_of(micro).softmax(-1)
        top = p.topk(K, -1)
        w = torch.zeros_like(p).scatter(-1, top.indices, top.values / top.values.sum(-1, True))
        limit = math.ceil(len(p) * K / E * factor)
        expected = torch.zeros_like(p)
        for e in range(E):
            wants = [t for t in range(len(p)) if w[t, e] > 0]
            if policy == "probs":
                wants.sort(key=lambda t: (-float(w[t, e]), t))
            for t in wants[:limit]:
                expected[t, e] = 1
            load[e] += len(wants)
            dropped += max(0, len(wants) - limit)
        entropy += float(-(p * p.log()).sum())
        assert np.array_equal(mine, expected)
        assert (weight - w * expected).abs().max() <= 1e-12
    assert dropped > 3
    choices, tokens = sum(load), sum(map(sum, MICROS))
    share = [n / choices for n in load]
    even = -sum(x * math.log(x) for x in share if x) / math.log(E)
    found = {n.rpartition("/")[2]: v for n, v in metrics.items() if "/layer_0/" in n}
    assert found == pytest.approx(
        {
            "load_max": max(load) * E / choices,
            "load_entropy": even,
            "router_entropy": entropy / tokens,
            "dead_experts": load.count(0),
            "dropped": dropped / choices,
        }
    )
    assert tables["moe/load"]["layer 0"] == load
