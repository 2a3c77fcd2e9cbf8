"""gpt_oss: sinks, windows in every other layer, experts with biases and a clamped gate."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import FULL, WINDOWED, ConfigReader, llama_like
from mcore_core.model.hf_moe import softmax_experts
from mcore_core.model.tables_moe import MoENames, moe_decoder


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a GptOssConfig."""
    yarn = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0}
    yarn |= {"truncate": False, "original_max_position_embeddings": 4096}
    defaults = {"num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5}
    defaults |= {"sliding_window": 128, "num_experts_per_tok": 4, "num_local_experts": 128}
    reader = ConfigReader(config, "gpt_oss", {**defaults, "rope_parameters": yarn})
    reader.only("swiglu_alpha", 1.702, "the gate's slope is 1.702 here")
    layers, bias = reader.size("num_hidden_layers"), reader.flag("attention_bias", default=True)
    usual = [FULL if i % 2 else WINDOWED for i in range(layers)]
    window = reader.optional_size("sliding_window")
    return llama_like(
        reader,
        theta=150000.0,
        activation="gpt_oss",
        activation_clamp=reader.number("swiglu_limit", 7.0),
        softmax_type="learnable",
        add_qkv_bias=bias,
        attention_output_bias=bias,
        moe=softmax_experts(
            reader,
            range(layers),
            normalized=True,
            num_experts=reader.size("num_local_experts"),
            ffn_hidden_size=reader.size("intermediate_size"),
            router_bias=True,
            linear_bias=True,
        ),
        **reader.window_of(reader.layer_kinds(layers, usual), window),
    )


NAMES = MoENames(router="router", layout="interleaved")


FAMILY = Family(
    name="gpt_oss",
    architectures=("GptOssForCausalLM",),
    architecture=architecture,
    rules=partial(moe_decoder, moe_names=NAMES),
    notes=("mxfp4 weights are dequantized while loading and saved in the run's type",),
)
