"""qwen3: a norm over each head of q and k, head_dim apart from hidden size over heads."""

from collections.abc import Mapping
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.tables import dense_decoder


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a Qwen3Config."""
    reader = ConfigReader(config, "qwen3")
    if reader.flag("attention_bias"):
        reader.refuse(
            "attention_bias",
            "megatron-core has biases on attention and MLP or on none, and qwen3's MLP has none",
            "use a model without attention_bias",
        )
    window, windowed = reader.windows(reader.size("num_hidden_layers"), max_window_layers=28)
    return llama_like(
        reader,
        qk_layernorm=True,
        kv_channels=reader.size("head_dim", 128),
        window_size=window,
        window_layers=windowed,
    )


FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    architecture=architecture,
    rules=dense_decoder,
)
