"""gemma3_text: Gemma 3's text model: norms around everything, two ropes, windows."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Family
from mcore_core.model.hf_config import FULL, WINDOWED, ConfigReader, llama_like
from mcore_core.model.hf_rope import read_rope
from mcore_core.model.tables import Names, dense_decoder


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a Gemma3TextConfig."""
    reader = ConfigReader(
        config,
        "gemma3_text",
        {
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        },
    )
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        reader.only(key, None, "soft caps are not built in")
    reader.only("use_bidirectional_attention", False, "attention is causal here")
    layers = reader.size("num_hidden_layers")
    every = reader.size("sliding_window_pattern", reader.size("_sliding_window_pattern", 6))
    usual = [WINDOWED if (i + 1) % every else FULL for i in range(layers)]
    window = reader.window_of(
        reader.layer_kinds(layers, usual), reader.optional_size("sliding_window")
    )
    bias = reader.flag("attention_bias")
    return llama_like(
        reader,
        act="hidden_activation",
        zero_centered_gamma=True,
        post_attention_norm=True,
        post_mlp_norm=True,
        qk_layernorm=True,
        embedding_scale=reader.size("hidden_size") ** 0.5,
        softmax_scale=reader.number("query_pre_attn_scalar", 256) ** -0.5,
        add_qkv_bias=bias,
        attention_output_bias=bias,
        **window,
        **_ropes(reader),
    )


NAMES = Names(
    post_attention_norm="post_attention_layernorm",
    pre_mlp_norm="pre_feedforward_layernorm",
    post_mlp_norm="post_feedforward_layernorm",
)


def _ropes(reader: ConfigReader) -> dict[str, Any]:
    """Layers without window have a base of their own, and only they are rescaled."""
    positions = reader.size("max_position_embeddings", 131072)
    given = reader.get("rope_parameters") or {}
    legacy = reader.get("rope_scaling") or {}
    full = read_rope(
        reader, positions, theta=1e6, given={**given.get("full_attention", {}), **legacy}
    )
    local = dict(given.get("sliding_attention") or {})
    if local.get("rope_type", "default") != "default":
        reader.refuse("rope_parameters", "windowed layers have a plain rope here", "correct it")
    base = local.get("rope_theta") or reader.number("rope_local_base_freq", 10000.0)
    return {
        "rotary_base": full.base,
        "rope_scaling": full.scaling,
        "window_rotary_base": float(base),
    }


FAMILY = Family(
    name="gemma3_text",
    architectures=("Gemma3ForCausalLM",),
    architecture=architecture,
    rules=partial(dense_decoder, names=NAMES),
)
