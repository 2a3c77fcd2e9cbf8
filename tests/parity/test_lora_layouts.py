"""LoRA in every layout: losses, gradients and three steps equal one rank's."""

import dataclasses
from functools import cache, partial

import pytest
from layer_cases import LAYOUTS as LAYER_LAYOUTS
from layer_cases import layer_case
from mcore_hfbridge.families import gpt_oss
from sft_case import ADAM, LAYOUTS, RECOMPUTE, SGD, sft_case

from mcore_core.model.tables import decoder_layers, dense_mlp, embedding, ending
from mcore_core.model.tables_latent import mla_decoder
from mcore_core.model.tables_linear import mixed_attention
from mcore_core.model.tables_moe import DEEPSEEK_MOE, QWEN_MOE, mlp_or_moe, stacked
from mcore_core.testing.cases import assert_same, run_case

LORA = {"tuner_type": "lora", "lora_rank": 4, "lora_alpha": 4, "lora_dropout": 0.0}
ALL = ["all-linear", "all-router", "embed_tokens", "lm_head"]
OPTIMIZERS = {"sgd": SGD, "adam": ADAM}


def dense_case(shape="qk-norm", optimizer="sgd", **options):
    return sft_case(shape, **{**OPTIMIZERS[optimizer], **LORA, **RECOMPUTE["none"], **options})


@cache
def _one_rank(make, *args):
    return run_case(make(*args), LAYOUTS["one"])


def check(layout, *, reference=(), gradients=True, **options):
    run = run_case(dense_case(*reference, **options), LAYOUTS[layout], gradients=gradients)
    assert_same(run, _one_rank(dense_case, *reference), relative=1e-5)


def parity(*values):
    return pytest.param(*values, marks=pytest.mark.parity)


def test_only_adapters_train():
    run = _one_rank(dense_case)
    assert len(set(run.losses)) == 3
    assert run.gradients[0]
    for key, gradient in run.gradients[0].items():
        assert ".adapter." in key
        assert gradient.abs().max() > 1e-6, key


@pytest.mark.parametrize(
    "layout",
    ["tp2-sp", *map(parity, ("tp2", "pp2", "pp2-vpp2", "cp2", "dp2", "tp2-pp2-cp2", "tp4-sp"))],
)
def test_layout(layout):
    check(layout)


@pytest.mark.parity
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("layout", ["one", "tp2-sp", "pp2"])
def test_recompute(layout, recompute):
    check(layout, **RECOMPUTE[recompute])


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("dp2", {}),
        parity("dp2", {"overlap_grad_reduce": True, "overlap_param_gather": True}),
        parity("tp2-dp2", {}),
    ],
)
def test_distributed_optimizer(layout, options):
    given = {"use_distributed_optimizer": True, **options}
    check(layout, reference=("qk-norm", "adam"), gradients=False, **given)


EXTENTS = {
    "all": {"target_modules": ["all-linear", "embed_tokens", "lm_head"]},
    "head": {"target_modules": ["lm_head"]},
    "regex": {"target_regex": r".*layers\.[23]\..*(q|up)_proj"},
    "beside": {"modules_to_save": ["lm_head", "layernorm"], "lora_bias": "all"},
    "rslora": {"use_rslora": True, "target_modules": ["linear_fc1", "v_proj"]},
}
SHAPES = {"all": "tied", "beside": "layernorm-window-sinks"}


def extent_case(extent):
    return dense_case(SHAPES.get(extent, "qkv-bias"), **EXTENTS[extent])


@pytest.mark.parity
@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize("layout", ["tp2", "tp2-sp", "pp2", "cp2-tp2-sp", "dp2", "pp2-vpp2"])
def test_extent(layout, extent):
    """Every kind of module, parts of fused ones, and stages on which nothing trains."""
    run = run_case(extent_case(extent), LAYOUTS[layout])
    assert_same(run, _one_rank(extent_case, extent), relative=1e-5)


FREEZING = {
    "names": {"freeze_parameters": ["model.embed_tokens", "model.layers.0", "model.layers.1"]},
    "regex": {"freeze_parameters_regex": r"_proj\.weight"},
    "ratio": {"freeze_parameters_ratio": 0.6, "trainable_parameters": ["model.embed_tokens"]},
    "head": {"freeze_parameters": ["model"], "trainable_parameters_regex": "norm"},
}


def freezing_case(name):
    return sft_case("qkv-bias", **SGD, **RECOMPUTE["full"], **FREEZING[name])


@pytest.mark.parity
@pytest.mark.parametrize("name", FREEZING)
@pytest.mark.parametrize("layout", ["tp2-sp", "pp2", "pp2-vpp2", "dp2", "cp2"])
def test_freezing(layout, name):
    run = run_case(freezing_case(name), LAYOUTS[layout])
    assert_same(run, _one_rank(freezing_case, name), relative=1e-5)


def latent(a):
    return mla_decoder(dataclasses.replace(a, mtp_layers=0), stacked(DEEPSEEK_MOE))


def delta_net(a, *, fused=True):
    rest = mlp_or_moe(a, stacked(QWEN_MOE)) if a.moe else dense_mlp(a, decoder_layers(a))
    return [*embedding(a), *mixed_attention(a, fused=fused), *rest, *ending(a)]


RULES = {
    "mla": latent,
    "mla-direct": latent,
    "mla-moe": latent,
    "gdn": delta_net,
    "gdn-apart": partial(delta_net, fused=False),
    "gdn-moe": delta_net,
    "moe-gpt-oss": gpt_oss.FAMILY.rules,
}


def moe_case(name, **options):
    case = layer_case(name.removesuffix("-apart"), **{**LORA, "target_modules": ALL, **options})
    return dataclasses.replace(case, rules=RULES.get(name))


def without_router(name, **options):
    """Nets without experts have no routers to name."""
    return moe_case(name, target_modules=["all-linear", "lm_head"], **options)


PAIRS = [
    ("moe-groups", "tp2-sp-ep2"),
    *(
        parity(*pair)
        for pair in (
            ("moe-softmax", "ep2"),
            ("moe-softmax", "tp2-sp-etp2"),
            ("moe-softmax", "tp2"),
            ("moe-softmax", "pp2-ep2"),
            ("moe-groups", "ep2"),
            ("moe-groups", "cp2-ep2"),
            ("moe-groups", "tp2-sp-ep2-etp2"),
            ("moe-gpt-oss", "tp2-sp-etp2"),
            ("moe-gpt-oss", "ep2"),
            ("mla-moe", "tp2-sp-ep2"),
            ("mla-moe", "tp2"),
            ("gdn-moe", "ep2"),
            ("gdn-moe", "tp2-sp"),
            ("mla", "tp2"),
            ("mla", "tp2-sp"),
            ("mla", "cp2"),
            ("mla-direct", "tp2-sp"),
            ("gdn", "tp2"),
            ("gdn", "tp2-sp"),
            ("gdn", "cp2"),
            ("gdn-apart", "tp2-sp"),
        )
    ),
]


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_parts(name, layout):
    """Experts, routers, gates, latent attention, delta nets."""
    make = moe_case if "moe" in name else without_router
    run = run_case(make(name), LAYER_LAYOUTS[layout])
    assert_same(run, _one_rank(make, name), relative=1e-5)
