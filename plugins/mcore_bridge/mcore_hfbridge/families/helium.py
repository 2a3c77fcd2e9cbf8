"""helium: llama whose neighbouring channels rotate together."""

from collections.abc import Mapping
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.tables import dense_decoder


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a HeliumConfig."""
    reader = ConfigReader(
        config, "helium", {"num_key_value_heads": 20, "head_dim": 128, "rms_norm_eps": 1e-8}
    )
    return llama_like(
        reader,
        theta=1e5,
        rotary_interleaved=True,
        add_qkv_bias=reader.flag("attention_bias"),
        mlp_bias=reader.flag("mlp_bias"),
    )


FAMILY = Family(
    name="helium",
    architectures=("HeliumForCausalLM",),
    architecture=architecture,
    rules=dense_decoder,
)
