"""youtu: Youtu-LLM, DeepSeek-V3's latent attention with dense MLPs."""

from collections.abc import Mapping
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.hf_moe import latent_attention
from mcore_core.model.tables_latent import mla_decoder


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a YoutuConfig."""
    spread = 2.0 / (5.0 * (config.get("hidden_size") or 2048)) ** 0.5
    defaults = {"tie_word_embeddings": True, "initializer_range": spread}
    reader = ConfigReader(config, "youtu", defaults)
    rope = reader.rope(reader.size("max_position_embeddings", 131072))
    return llama_like(reader, **latent_attention(reader, rope, q_lora_rank=1536))


FAMILY = Family(
    name="youtu",
    architectures=("YoutuForCausalLM",),
    architecture=architecture,
    rules=mla_decoder,
)
