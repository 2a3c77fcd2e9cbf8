"""A small model and packed rows that no two micro-batches share the shape of."""

import dataclasses

from mcore_core import compat

compat.apply()  # before anything imports megatron

import numpy as np  # noqa: E402
from mcore_sft.config import SFTConfig  # noqa: E402
from mcore_sft.recipe import SFTRecipe  # noqa: E402

from mcore_core.model.architecture import Architecture  # noqa: E402
from mcore_core.parallel.topology import Layout  # noqa: E402
from mcore_core.testing.cases import Case  # noqa: E402

VOCAB = 61
"""Odd, so that tensor parallelism pads it."""

SHAPE = Architecture(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=12,
    vocab_size=VOCAB,
    max_position_embeddings=128,
)
SHAPES = {
    "qk-norm": dataclasses.replace(SHAPE, qk_layernorm=True),
    "tied": dataclasses.replace(SHAPE, tie_word_embeddings=True),
    "qkv-bias": dataclasses.replace(SHAPE, add_qkv_bias=True),
    "layernorm-window-sinks": dataclasses.replace(
        SHAPE,
        normalization="LayerNorm",
        activation="gelu",
        gated=False,
        mlp_bias=True,
        attention_output_bias=True,
        add_qkv_bias=True,
        window_size=5,
        window_layers=(0, 2),
        softmax_type="learnable",
    ),
    "dropout": dataclasses.replace(SHAPE, hidden_dropout=0.1, attention_dropout=0.1),
}

LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(world=2, tp=2),
    "tp2-sp": Layout(world=2, tp=2, sp=True),
    "pp2": Layout(world=2, pp=2),
    "pp2-vpp2": Layout(world=2, pp=2, vpp=2),
    "cp2": Layout(world=2, cp=2),
    "dp2": Layout(world=2),
    "cp2-tp2": Layout(world=4, cp=2, tp=2),
    "cp2-tp2-sp": Layout(world=4, cp=2, tp=2, sp=True),
    "tp2-pp2": Layout(world=4, tp=2, pp=2),
    "tp2-pp2-sp": Layout(world=4, tp=2, pp=2, sp=True),
    "tp4": Layout(world=4, tp=4),
    "tp4-sp": Layout(world=4, tp=4, sp=True),
    "pp4": Layout(world=4, pp=4),
    "cp4": Layout(world=4, cp=4),
    "dp4": Layout(world=4),
    "pp2-dp2": Layout(world=4, pp=2),
    "tp2-dp2": Layout(world=4, tp=2),
    "cp2-dp2": Layout(world=4, cp=2),
    "tp2-pp2-cp2": Layout(world=8, tp=2, pp=2, cp=2, sp=True),
    "pp2-vpp2-tp2": Layout(world=4, pp=2, vpp=2, tp=2, sp=True),
}

SGD = {
    "optimizer": "sgd",
    "lr": 0.1,
    "lr_decay_style": "constant",
    "use_distributed_optimizer": False,
}
ADAM = {
    "optimizer": "adam",
    "lr": 0.01,
    "lr_decay_style": "linear",
    # with the usual epsilon Adam turns noise in a gradient near zero into a step of size lr
    "adam_eps": 1e-3,
    "use_distributed_optimizer": False,
}
RECOMPUTE = {
    "none": {"recompute_granularity": "none"},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "selective-wide": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "mlp", "layernorm"],
    },
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "block": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 1,
    },
}
MASKED = 2
"""The micro-batch of each step in which nothing trains."""


def units(rng, *, masked):
    found = []
    for _ in range(rng.integers(1, 4)):
        n = int(rng.integers(3, 24))
        weights = (rng.random(n) < 0.6).astype(np.float32) * np.float32(rng.choice([0.5, 1, 2]))
        found.append(
            {
                "input_ids": rng.integers(0, VOCAB, n).astype(np.int32),
                "weights": weights * (not masked),
                "length": n,
            }
        )
    return found


def data(steps=3, micros=4, seed=0):
    """Lengths, masks and counts differ everywhere; one micro-batch of each step is all masked."""
    rng = np.random.default_rng(seed)
    return [[units(rng, masked=i == MASKED) for i in range(micros)] for _ in range(steps)]


def recipe(config):
    return SFTRecipe(config, None)  # the template only encodes


def sft_case(shape="qk-norm", steps=3, **options):
    return Case(
        architecture=SHAPES[shape],
        recipe=recipe,
        steps=data(steps),
        options=options,
        groups=(SFTConfig,),
    )
