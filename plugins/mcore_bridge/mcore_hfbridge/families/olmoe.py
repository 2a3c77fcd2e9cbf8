"""olmoe: experts in every layer, norms on q and k over all heads together."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.hf_moe import softmax_experts
from mcore_core.model.tables_moe import QWEN_MOE, moe_decoder, stacked


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a OlmoeConfig."""
    reader = ConfigReader(
        config,
        "olmoe",
        {"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8},
    )
    reader.only("clip_qkv", None, "q, k and v are not clipped here")
    bias = reader.flag("attention_bias")
    return llama_like(
        reader,
        qk_layernorm=True,
        qk_norm_width="full",
        add_qkv_bias=bias,
        attention_output_bias=bias,
        moe=softmax_experts(
            reader,
            range(reader.size("num_hidden_layers")),
            ffn_hidden_size=reader.size("intermediate_size"),
        ),
    )


FAMILY = Family(
    name="olmoe",
    architectures=("OlmoeForCausalLM",),
    architecture=architecture,
    rules=moe_decoder,
    also_reads=(partial(moe_decoder, moe_names=stacked(QWEN_MOE)),),
)
