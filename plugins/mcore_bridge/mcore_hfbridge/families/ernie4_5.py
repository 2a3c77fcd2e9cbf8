"""ernie4_5: llama whose neighbouring channels rotate together, biases everywhere or nowhere."""

from collections.abc import Mapping
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.tables import dense_decoder


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a Ernie4_5Config."""
    reader = ConfigReader(
        config,
        "ernie4_5",
        {
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
    )
    bias = reader.flag("use_bias")
    return llama_like(
        reader,
        theta=5e5,
        rotary_interleaved=True,
        add_qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
    )


FAMILY = Family(
    name="ernie4_5",
    architectures=("Ernie4_5ForCausalLM",),
    architecture=architecture,
    rules=dense_decoder,
)
