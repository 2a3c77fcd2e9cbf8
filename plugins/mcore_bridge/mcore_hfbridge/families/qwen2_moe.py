"""qwen2_moe: experts beside one that every token takes, through a gate."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import FULL, WINDOWED, ConfigReader, llama_like
from mcore_core.model.hf_moe import qwen_sparse_layers, softmax_experts
from mcore_core.model.tables_moe import QWEN_MOE, moe_decoder, stacked


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a Qwen2MoeConfig."""
    reader = ConfigReader(
        config,
        "qwen2_moe",
        {"num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4},
    )
    layers, experts = reader.size("num_hidden_layers"), qwen_sparse_layers(reader)
    upper = reader.size("max_window_layers", 28)
    windowed = reader.flag("use_sliding_window")
    usual = [WINDOWED if windowed and i % 2 == 0 and i < upper else FULL for i in range(layers)]
    kinds = reader.layer_kinds(layers, usual)
    window = reader.size("sliding_window", 4096) if windowed else None
    return llama_like(
        reader,
        add_qkv_bias=reader.flag("qkv_bias", default=True),
        moe=softmax_experts(
            reader,
            experts,
            shared_ffn_hidden_size=reader.size("shared_expert_intermediate_size", 5632),
            shared_gate=True,
        ),
        **reader.window_of(kinds, window, off="use_sliding_window"),
    )


FAMILY = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    architecture=architecture,
    rules=moe_decoder,
    also_reads=(partial(moe_decoder, moe_names=stacked(QWEN_MOE)),),
)
