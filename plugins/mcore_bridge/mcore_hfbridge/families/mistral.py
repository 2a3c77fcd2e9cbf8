"""mistral: llama with one window for all layers, or none."""

from collections.abc import Mapping
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import ConfigReader, llama_like
from mcore_core.model.tables import dense_decoder


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a MistralConfig."""
    reader = ConfigReader(config, "mistral", {"num_key_value_heads": 8, "sliding_window": 4096})
    reader.only("layer_types", None, "mistral has one window for all layers; ministral has kinds")
    return llama_like(reader, **reader.window_everywhere(reader.optional_size("sliding_window")))


FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    architecture=architecture,
    rules=dense_decoder,
)
