"""glm4: GLM-4-0414, glm with norms on what attention and MLP return."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.tables import Names, dense_decoder


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a Glm4Config."""
    reader = ConfigReader(
        config, "glm4", {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-7}
    )
    return llama_like(
        reader,
        partial=0.5,
        rotary_interleaved=True,
        add_qkv_bias=reader.flag("attention_bias", default=True),
        post_attention_norm=True,
        post_mlp_norm=True,
    )


FAMILY = Family(
    name="glm4",
    architectures=("Glm4ForCausalLM",),
    architecture=architecture,
    rules=partial(dense_decoder, names=Names(gate_up="gate_up_proj")),
)
