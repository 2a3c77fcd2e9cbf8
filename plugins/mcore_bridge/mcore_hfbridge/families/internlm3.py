"""internlm3: llama whose q, k, v and whose other layers have biases or not."""

from collections.abc import Mapping
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.tables import dense_decoder


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a InternLM3Config."""
    reader = ConfigReader(
        config, "internlm3", {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5}
    )
    bias = reader.flag("mlp_bias", default=reader.flag("bias"))
    return llama_like(
        reader,
        add_qkv_bias=reader.flag("attention_bias", default=reader.flag("qkv_bias")),
        attention_output_bias=bias,
        mlp_bias=bias,
    )


FAMILY = Family(
    name="internlm3",
    architectures=("InternLM3ForCausalLM", "LlamaForCausalLM"),
    architecture=architecture,
    rules=dense_decoder,
)
