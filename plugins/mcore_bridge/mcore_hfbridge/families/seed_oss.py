"""seed_oss: llama with biases on q, k and v, and dropout."""

from collections.abc import Mapping
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.tables import dense_decoder


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a SeedOssConfig."""
    reader = ConfigReader(
        config,
        "seed_oss",
        {"num_key_value_heads": 8, "head_dim": 128, "attention_dropout": 0.1},
    )
    return llama_like(
        reader,
        add_qkv_bias=reader.flag("attention_bias", default=True),
        attention_output_bias=reader.flag("attention_out_bias"),
        mlp_bias=reader.flag("mlp_bias"),
        hidden_dropout=reader.number("residual_dropout", 0.1),
    )


FAMILY = Family(
    name="seed_oss",
    architectures=("SeedOssForCausalLM",),
    architecture=architecture,
    rules=dense_decoder,
    notes=("residual_dropout is applied to the embeddings too",),
)
