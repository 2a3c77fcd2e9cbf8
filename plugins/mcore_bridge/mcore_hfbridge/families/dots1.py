"""dots1: dots.llm1, DeepSeek-V3's experts on qwen3's attention."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import FULL, WINDOWED, ConfigReader, llama_like
from mcore_core.model.hf_moe import after_dense, sigmoid_experts
from mcore_core.model.tables_moe import DEEPSEEK_MOE, moe_decoder, stacked


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a Dots1Config."""
    reader = ConfigReader(config, "dots1", {"sliding_window": 4096, "norm_topk_prob": False})
    layers, window = reader.size("num_hidden_layers"), reader.optional_size("sliding_window")
    first = reader.count("max_window_layers", 62)
    kinds = [WINDOWED if window and i >= first else FULL for i in range(layers)]
    bias, width = reader.flag("attention_bias"), reader.size("moe_intermediate_size", 1408)
    return llama_like(
        reader,
        qk_layernorm=True,
        add_qkv_bias=bias,
        attention_output_bias=bias,
        moe=sigmoid_experts(
            reader,
            after_dense(reader, 0),
            num_experts=reader.size("n_routed_experts"),
            ffn_hidden_size=width,
            shared_ffn_hidden_size=width * reader.size("n_shared_experts"),
        ),
        **reader.window_of(reader.layer_kinds(layers, kinds), window),
    )


FAMILY = Family(
    name="dots1",
    architectures=("Dots1ForCausalLM",),
    architecture=architecture,
    rules=partial(moe_decoder, moe_names=DEEPSEEK_MOE),
    also_reads=(partial(moe_decoder, moe_names=stacked(DEEPSEEK_MOE)),),
)
