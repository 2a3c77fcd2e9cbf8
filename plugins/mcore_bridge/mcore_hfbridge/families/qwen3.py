"""qwen3: a norm over each head of q and k, head_dim apart from hidden size over heads."""

from collections.abc import Mapping
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.tables import dense_decoder


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a Qwen3Config."""
    reader = ConfigReader(config, "qwen3", {"num_key_value_heads": 32, "head_dim": 128})
    bias = reader.flag("attention_bias")
    return llama_like(
        reader,
        qk_layernorm=True,
        add_qkv_bias=bias,
        attention_output_bias=bias,
        **reader.windows(reader.size("num_hidden_layers"), max_window_layers=28),
    )


FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    architecture=architecture,
    rules=dense_decoder,
)
