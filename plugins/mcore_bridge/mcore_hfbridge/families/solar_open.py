"""solar_open: Solar Open, DeepSeek-V3's experts in every layer on llama's attention."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.hf_moe import sigmoid_experts
from mcore_core.model.tables_moe import DEEPSEEK_MOE, moe_decoder, stacked


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a SolarOpenConfig."""
    reader = ConfigReader(
        config,
        "solar_open",
        {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "num_experts_per_tok": 8,
        },
    )
    width = reader.size("moe_intermediate_size", 1280)
    return llama_like(
        reader,
        theta=1e6,
        add_qkv_bias=reader.flag("attention_bias"),
        ffn_hidden_size=width,  # no layer is dense
        moe=sigmoid_experts(
            reader,
            range(reader.size("num_hidden_layers")),
            num_experts=reader.size("n_routed_experts", 128),
            ffn_hidden_size=width,
            shared_ffn_hidden_size=width * reader.count("n_shared_experts", 1) or None,
        ),
    )


FAMILY = Family(
    name="solar_open",
    architectures=("SolarOpenForCausalLM",),
    architecture=architecture,
    rules=partial(moe_decoder, moe_names=DEEPSEEK_MOE),
    also_reads=(partial(moe_decoder, moe_names=stacked(DEEPSEEK_MOE)),),
)
