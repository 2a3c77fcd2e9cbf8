"""qwen2: Qwen2 and Qwen2.5, with biases on q, k and v and windows in the upper layers."""

from collections.abc import Mapping
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.tables import dense_decoder


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a Qwen2Config."""
    reader = ConfigReader(config, "qwen2", {"num_key_value_heads": 32})
    windows = reader.windows(reader.size("num_hidden_layers"), max_window_layers=28)
    return llama_like(reader, add_qkv_bias=True, **windows)


FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    architecture=architecture,
    rules=dense_decoder,
)
