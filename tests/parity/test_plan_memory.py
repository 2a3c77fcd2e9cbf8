"""What the planner predicts against what ranks on the CPU really keep."""

import dataclasses

import numpy as np
import pytest
import torch
from layer_cases import LAYOUTS, MOE, SHAPES, layer_case
from sft_case import ADAM, SGD, SHAPE, VOCAB

from mcore_core.planning.activations import Layers, Recompute, Rows, stage_bytes
from mcore_core.planning.state import Training, state_bytes
from mcore_core.planning.weights import rank_weights
from mcore_core.testing.cases import Session
from mcore_core.testing.measure import measure, saved_activations
from mcore_core.testing.ranks import fork_ranks

WIDER = {
    "hidden_size": 128,
    "ffn_hidden_size": 320,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 16,
}
SHARDED = {**ADAM, "use_distributed_optimizer": True}


def wider(shape):
    groups = {"num_query_groups": 8} if shape.mla else {}
    return dataclasses.replace(shape, **(WIDER | groups))


STATES = [
    ("postnorm", "tp2", "float32", SGD),
    ("gate", "pp2", "float32", ADAM),
    ("moe-softmax", "ep2", "float32", SHARDED),
    ("moe-groups", "tp2-sp-ep2", "float32", ADAM),
    ("moe-gpt-oss", "tp2-sp-etp2", "float32", ADAM),
    ("mla", "tp2-sp", "float32", ADAM),
    ("mla-moe-mtp", "ep2-dp4", "float32", SHARDED),
    ("gdn", "tp2", "float32", ADAM),
    ("mtp-tied", "pp2", "float32", ADAM),
    ("gdn-moe", "ep2", "float32", SHARDED),
    ("mla-direct", "dp2", "bfloat16", SHARDED),
    ("moe-softmax", "pp2-ep2", "bfloat16", ADAM),
    ("gate", "dp2", "bfloat16", {**ADAM, "optimizer": "muon"}),
]
QUICK = {"moe-groups", "mla-direct"}


@pytest.mark.parametrize(
    ("name", "layout", "dtype", "options"),
    [
        pytest.param(
            *row, marks=() if row[0] in QUICK else pytest.mark.parity, id="-".join(row[:3])
        )
        for row in STATES
    ],
)
def test_weights_gradients_and_optimizer(name, layout, dtype, options):
    case = layer_case(name, steps=1, **options)
    case = dataclasses.replace(
        case,
        architecture=wider(SHAPES[name]),
        dtype=dtype,
        options={**case.options, "bf16": dtype == "bfloat16"},
    )

    def one_rank(_):
        from megatron.core import parallel_state

        session = Session(case, LAYOUTS[layout])
        session.train(1)
        rank = parallel_state.get_pipeline_model_parallel_rank()
        weights = rank_weights(case.architecture, session.layout, session.plan.stage_layers, rank)
        training = Training.of(session.config, case.architecture)
        predicted = state_bytes(weights, session.layout, training)
        return measure(session.chunks, session.optimizer), sum(w.count for w in weights), predicted

    for measured, count, predicted in fork_ranks(one_rank, LAYOUTS[layout].world):
        assert count == measured.parameters
        assert measured.optimizer > 0
        for part in ("weights", "gradients", "optimizer"):
            assert getattr(predicted, part) == pytest.approx(getattr(measured, part), rel=0.02), (
                part
            )


DENSE = dataclasses.replace(SHAPE, **WIDER)
EXPERTS = dataclasses.replace(MOE, num_experts=8, ffn_hidden_size=64)
MODELS = {
    "dense": DENSE,
    "norms": dataclasses.replace(DENSE, qk_layernorm=True),
    "experts": dataclasses.replace(DENSE, moe=EXPERTS),
    "shared": dataclasses.replace(
        DENSE, moe=dataclasses.replace(EXPERTS, layers=(1, 2, 3), shared_ffn_hidden_size=96)
    ),
}
NONE = {"recompute_granularity": "none"}


def selective(*modules):
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


def full(method, layers):
    return {
        "recompute_granularity": "full",
        "recompute_method": method,
        "recompute_num_layers": layers,
    }


ACTIVATIONS = [
    ("dense", "one", NONE),
    ("norms", "one", NONE),
    ("experts", "one", NONE),
    ("shared", "one", NONE),
    ("dense", "tp2", NONE),
    ("dense", "tp2-sp", NONE),
    ("norms", "cp2", NONE),
    ("experts", "ep2", NONE),
    ("shared", "tp2-sp-ep2", NONE),
    ("experts", "tp2-sp-etp2", NONE),
    ("dense", "one", selective("core_attn")),
    ("dense", "one", selective("core_attn", "mlp")),
    ("dense", "one", selective("layernorm")),
    ("shared", "one", selective("moe")),
    ("shared", "one", selective("shared_experts")),
    ("dense", "one", full("uniform", 2)),
    ("dense", "one", full("block", 2)),
]
TOKENS = 512


def unit(seed):
    rng = np.random.default_rng(seed)
    n = TOKENS // 2
    return {
        "input_ids": rng.integers(0, VOCAB, n).astype(np.int32),
        "weights": np.ones(n, np.float32),
        "length": n,
    }


def kept(model, layout, options):
    """Return the mean over ranks of what autograd keeps of one packed row, and the prediction."""
    sizes, shape = LAYOUTS[layout], MODELS[model]
    case = layer_case("gate", steps=1, **options)
    micros = [[unit(2 * i), unit(2 * i + 1)] for i in range(sizes.dp)]
    case = dataclasses.replace(case, architecture=shape, steps=[micros])

    def one_rank(_):
        session = Session(case, sizes)
        placed = session.stepper.place(session.micros(0))
        session.stepper.forward.scale = torch.tensor(1.0)
        with saved_activations(session.chunks) as saved:
            session.stepper.forward.hidden(placed[0], session.chunks[0])
        return saved.bytes

    found = fork_ranks(one_rank, sizes.world)
    recompute = Recompute(
        granularity=options["recompute_granularity"],
        method=options.get("recompute_method", "uniform"),
        layers=options.get("recompute_num_layers", 1),
        modules=frozenset(options.get("recompute_modules", ())),
    )
    rows = Rows(tokens=TOKENS // sizes.cp, size=4, fused=False, recompute=recompute)
    predicted, _ = stage_bytes(shape, sizes, rows, range(shape.num_layers), 1.0)
    parts = Layers(shape, sizes, rows)
    # the final norm's output is kept by the head, which does not run here
    predicted += round(parts._norm()) - parts.S * shape.hidden_size * 4
    return sum(found) / len(found), predicted


@pytest.mark.parity
@pytest.mark.parametrize(("model", "layout", "options"), ACTIVATIONS)
def test_activations(model, layout, options):
    measured, predicted = kept(model, layout, options)
    assert predicted == pytest.approx(measured, rel=0.1)


def test_recomputation_keeps_less():
    measured, predicted = kept("dense", "one", full("uniform", 2))
    assert predicted == pytest.approx(measured, rel=0.1)
    whole, _ = kept("dense", "one", NONE)
    assert whole > 10 * measured
