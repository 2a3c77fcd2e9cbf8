"""glm: GLM-4-9B, where pairs of neighbouring channels of half of each head rotate."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.tables import Names, dense_decoder


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a GlmConfig."""
    reader = ConfigReader(
        config, "glm", {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-7}
    )
    return llama_like(
        reader,
        partial=0.5,
        rotary_interleaved=True,
        add_qkv_bias=reader.flag("attention_bias", default=True),
    )


FAMILY = Family(
    name="glm",
    architectures=("GlmForCausalLM",),
    architecture=architecture,
    rules=partial(dense_decoder, names=Names(gate_up="gate_up_proj")),
)
