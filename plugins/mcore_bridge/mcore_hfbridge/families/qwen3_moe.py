"""qwen3_moe: qwen3 with experts."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.hf_moe import qwen_sparse_layers, softmax_experts
from mcore_core.model.tables_moe import QWEN_MOE, moe_decoder, stacked


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a Qwen3MoeConfig."""
    reader = ConfigReader(
        config,
        "qwen3_moe",
        {"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8},
    )
    bias = reader.flag("attention_bias")
    window = reader.optional_size("sliding_window")
    window = window if reader.flag("use_sliding_window") else None
    return llama_like(
        reader,
        qk_layernorm=True,
        add_qkv_bias=bias,
        attention_output_bias=bias,
        moe=softmax_experts(reader, qwen_sparse_layers(reader)),
        **reader.window_everywhere(window),
    )


FAMILY = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    architecture=architecture,
    rules=moe_decoder,
    also_reads=(partial(moe_decoder, moe_names=stacked(QWEN_MOE)),),
)
