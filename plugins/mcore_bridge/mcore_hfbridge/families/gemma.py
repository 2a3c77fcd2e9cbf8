"""gemma: Gemma 1, norms that multiply by 1 + weight, scaled embeddings."""

from collections.abc import Mapping
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.tables import dense_decoder


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a GemmaConfig."""
    reader = ConfigReader(
        config,
        "gemma",
        {"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
    )
    reader.only("use_bidirectional_attention", False, "attention is causal here")
    reader.choice("hidden_act", "gelu", ("gelu", "gelu_pytorch_tanh"))
    reader.choice("hidden_activation", "gelu_pytorch_tanh", ("gelu", "gelu_pytorch_tanh"))
    bias = reader.flag("attention_bias")
    return llama_like(
        reader,
        activation="gelu_pytorch_tanh",  # transformers reads "gelu" as this
        zero_centered_gamma=True,
        embedding_scale=reader.size("hidden_size") ** 0.5,
        add_qkv_bias=bias,
        attention_output_bias=bias,
    )


FAMILY = Family(
    name="gemma",
    architectures=("GemmaForCausalLM",),
    architecture=architecture,
    rules=dense_decoder,
)
