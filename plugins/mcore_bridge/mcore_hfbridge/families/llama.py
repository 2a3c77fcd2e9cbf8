"""llama: Llama 2, 3 and 3.1, SmolLM2, and whatever else says LlamaForCausalLM."""

from collections.abc import Mapping
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.tables import dense_decoder


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a LlamaConfig."""
    reader = ConfigReader(config, "llama")
    bias = reader.flag("attention_bias")
    return llama_like(
        reader,
        add_qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=reader.flag("mlp_bias"),
    )


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    architecture=architecture,
    rules=dense_decoder,
)
