"""smollm3: llama where every few layers have no positions."""

from collections.abc import Mapping
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import FULL, WINDOWED, ConfigReader, llama_like
from mcore_core.model.tables import dense_decoder


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a SmolLM3Config."""
    reader = ConfigReader(
        config, "smollm3", {"num_key_value_heads": 4, "tie_word_embeddings": True}
    )
    layers, every = reader.size("num_hidden_layers"), reader.size("no_rope_layer_interval", 4)
    rope = reader.get("no_rope_layers")  # 1: the layer has rope
    rope = [(i + 1) % every != 0 for i in range(layers)] if rope is None else rope
    if len(rope) != layers:
        reader.refuse("no_rope_layers", f"it must list {layers} layers", "correct it")
    window = reader.optional_size("sliding_window")
    window = window if reader.flag("use_sliding_window") else None
    usual = [WINDOWED if window and not has else FULL for has in rope]
    kinds = reader.layer_kinds(layers, usual)
    off = "use_sliding_window or sliding_window"
    bias = reader.flag("attention_bias")
    return llama_like(
        reader,
        theta=2e6,
        add_qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=reader.flag("mlp_bias"),
        no_rope_layers=tuple(i for i, has in enumerate(rope) if not has),
        **reader.window_of(kinds, window, off=off),
    )


FAMILY = Family(
    name="smollm3",
    architectures=("SmolLM3ForCausalLM",),
    architecture=architecture,
    rules=dense_decoder,
)
