"""hy_v3: Hunyuan 3, sigmoid experts on qwen3's attention."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family, Rule
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.hf_moe import sigmoid_experts, sparse_layers
from mcore_core.model.tables import attention
from mcore_core.model.tables_latent import mtp
from mcore_core.model.tables_moe import DEEPSEEK_MOE, MoENames, moe_decoder, stacked


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a HYV3Config."""
    reader = ConfigReader(
        config,
        "hy_v3",
        {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "num_experts": 192,
            "num_experts_per_tok": 8,
            "initializer_range": 0.006,
        },
    )
    reader.only("mlp_bias", False, "experts have no biases here")
    reader.flag("enable_moe_fp32_combine", default=True)  # how half precision is rounded
    bias, width = reader.flag("attention_bias"), reader.size("moe_intermediate_size", 1536)
    return llama_like(
        reader,
        theta=11_158_840.0,
        qk_layernorm=True,
        add_qkv_bias=bias,
        mtp_layers=reader.count("num_nextn_predict_layers"),
        attention_output_bias=bias,
        moe=sigmoid_experts(
            reader,
            sparse_layers(reader, first_dense=1),
            ffn_hidden_size=width,
            scaling_factor=reader.number("router_scaling_factor", 2.826),
            shared_ffn_hidden_size=width * reader.count("num_shared_experts", 1) or None,
        ),
    )


NAMES = MoENames(router="router.gate", expert_bias="expert_bias", shared="shared_mlp")
IN_MEMORY = replace(stacked(DEEPSEEK_MOE), expert_bias="e_score_correction_bias")


def rules(a: Architecture, moe_names: MoENames = NAMES) -> list[Rule]:
    """Return the table."""
    ahead = mtp(a, attention, moe_names, final_norm="final_layernorm")
    return [*moe_decoder(a, moe_names), *ahead]


FAMILY = Family(
    name="hy_v3",
    architectures=("HYV3ForCausalLM",),
    architecture=architecture,
    rules=rules,
    also_reads=(partial(rules, moe_names=IN_MEMORY),),
    notes=("routed and shared experts are added in the model's own type, not in float32",),
)
