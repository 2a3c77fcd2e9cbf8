"""The model's shape as the user changes it: Model options that were given win over config.json."""

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mcore_core.config.model import ModelConfig
from mcore_core.errors import usage_error
from mcore_core.model.override_parts import override_parts

if TYPE_CHECKING:
    from mcore_core.config.compose import RunConfig
    from mcore_core.model.architecture import Architecture

_SAME = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "softmax_type",
    "max_position_embeddings",
    "rotary_base",
    "rotary_percent",
    "rope_scaling",
    "normalization",
    "norm_epsilon",
    "qk_layernorm",
    "add_qkv_bias",
    "attention_dropout",
    "hidden_dropout",
    "position_embedding_type",
    "num_query_groups",
)
"""Options whose name and meaning are those of an Architecture field."""


def override(architecture: "Architecture", config: "RunConfig") -> "Architecture":
    """Return the architecture with every Model option that the user gave."""
    options = config[ModelConfig]
    given = {n for n in type(options).model_fields if config.is_set(n)}
    changes: dict[str, Any] = {n: getattr(options, n) for n in _SAME if n in given}
    changes = {n: v for n, v in changes.items() if v is not None or n == "rope_scaling"}
    if options.group_query_attention is False and "num_query_groups" not in changes:
        changes["num_query_groups"] = changes.get(
            "num_attention_heads", architecture.num_attention_heads
        )
    if "swiglu" in given:
        changes |= {"gated": options.swiglu, "activation": "silu" if options.swiglu else "gelu"}
    if "untie_embeddings_and_output_weights" in given:
        changes["tie_word_embeddings"] = not options.untie_embeddings_and_output_weights
    if "disable_bias_linear" in given:
        biases = not options.disable_bias_linear
        changes |= {"mlp_bias": biases, "attention_output_bias": biases}
    if options.window_size is not None or options.window_attn_skip_freq is not None:
        changes |= _windows(architecture, options, changes.get("num_layers"))
    if options.quick_geglu:
        changes |= {"gated": True, "activation": "quick_gelu"}
    if "no_rope_freq" in given:
        layers = range(changes.get("num_layers", architecture.num_layers))
        every = options.no_rope_freq
        changes["no_rope_layers"] = tuple(i for i in layers if every and not (i + 1) % every)
    if "activation_func_clamp_value" in given:
        changes["activation_clamp"] = options.activation_func_clamp_value
    architecture = replace(architecture, **changes) if changes else architecture
    changes = override_parts(architecture, config)
    return replace(architecture, **changes) if changes else architecture


def _windows(
    architecture: "Architecture", options: ModelConfig, num_layers: int | None
) -> dict[str, Any]:
    layers = num_layers or architecture.num_layers
    size = architecture.window_size
    if options.window_size is not None:
        size = _left(options.window_size) + 1  # megatron counts tokens to the left of the query
    if size is None:
        raise usage_error(
            "MC503",
            "--window_attn_skip_freq without a window: the model has none",
            "fix: give --window_size too",
        )
    if options.window_attn_skip_freq is None:
        windowed = architecture.window_layers or tuple(range(layers))
        return {"window_size": size, "window_layers": windowed}
    return {
        "window_size": size,
        "window_layers": _windowed(options.window_attn_skip_freq, layers),
    }


def _left(text: str) -> int:
    parts = text.strip("()[] ").split(",")
    try:
        left, right = int(parts[0]), int(parts[1]) if len(parts) > 1 else 0
    except ValueError:
        left, right = -1, 0
    if left < 0 or right != 0 or len(parts) > 2:
        raise usage_error(
            "MC504",
            f"--window_size {text}: expected N or N,0 with N >= 0 tokens to the left",
            "causal attention sees nothing to the right",
        )
    return left


def _windowed(text: str, layers: int) -> tuple[int, ...]:
    """Return the windowed layers: "4" leaves every 4th layer full, "[1,1,1,0]" lists them."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if isinstance(value, int) and value > 0:
        return tuple(i for i in range(layers) if (i + 1) % value)
    if isinstance(value, list) and len(value) == layers and set(value) <= {0, 1}:
        return tuple(i for i, windowed in enumerate(value) if windowed)
    raise usage_error(
        "MC505",
        f"--window_attn_skip_freq {text}: expected a number, or a list of {layers} times 0 or 1",
    )
