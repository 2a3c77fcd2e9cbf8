"""cwm: Code World Model, llama 3 with windows in three layers of four."""

from collections.abc import Mapping
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import FULL, WINDOWED, ConfigReader, llama_like
from mcore_core.model.tables import dense_decoder


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a CwmConfig."""
    llama3 = {"rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "high_freq_factor": 4.0}
    llama3 |= {"low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
    defaults = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "head_dim": 128}
    reader = ConfigReader(
        config, "cwm", {**defaults, "rope_parameters": llama3, "sliding_window": 8192}
    )
    layers = reader.size("num_hidden_layers")
    usual = [FULL if i % 4 == 0 else WINDOWED for i in range(layers)]
    kinds = reader.layer_kinds(layers, usual)
    window = reader.window_of(kinds, reader.optional_size("sliding_window"))
    return llama_like(reader, theta=1e6, mlp_bias=reader.flag("mlp_bias"), **window)


FAMILY = Family(
    name="cwm",
    architectures=("CwmForCausalLM",),
    architecture=architecture,
    rules=dense_decoder,
)
