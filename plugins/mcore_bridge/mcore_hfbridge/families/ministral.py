"""ministral: mistral whose layers are windowed or not, one by one."""

from collections.abc import Mapping
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import FULL, WINDOWED, ConfigReader, llama_like
from mcore_core.model.tables import dense_decoder


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a MinistralConfig."""
    reader = ConfigReader(config, "ministral", {"num_key_value_heads": 8, "sliding_window": 4096})
    window, layers = reader.optional_size("sliding_window"), reader.size("num_hidden_layers")
    kinds = reader.layer_kinds(layers, [FULL if window is None else WINDOWED] * layers)
    return llama_like(reader, **reader.window_of(kinds, window))


FAMILY = Family(
    name="ministral",
    architectures=("MinistralForCausalLM",),
    architecture=architecture,
    rules=dense_decoder,
)
