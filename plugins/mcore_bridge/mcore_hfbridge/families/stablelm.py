"""stablelm: LayerNorm, a quarter of each head rotates."""

from collections.abc import Mapping
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.tables import dense_decoder


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a StableLmConfig."""
    reader = ConfigReader(config, "stablelm", {"num_key_value_heads": 32, "layer_norm_eps": 1e-5})
    reader.only("qk_layernorm", False, "a norm of its own for each head is not built in")
    reader.only("use_parallel_residual", False, "attention and MLP follow each other here")
    reader.only("hidden_dropout", 0.0, "dropout on the MLP alone is not built in")
    return llama_like(
        reader,
        partial=0.25,
        eps="layer_norm_eps",
        normalization="LayerNorm",
        add_qkv_bias=reader.flag("use_qkv_bias"),
    )


FAMILY = Family(
    name="stablelm",
    architectures=("StableLmForCausalLM",),
    architecture=architecture,
    rules=dense_decoder,
)
