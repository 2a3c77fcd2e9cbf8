"""Reads an HF config as an Architecture, and collects every key that cannot be honoured."""

from collections.abc import Mapping, Sequence
from typing import Any

from mcore_core.errors import Problem, UsageError, did_you_mean
from mcore_core.model.architecture import Architecture

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu")
"""What the builder knows of HF's `hidden_act`."""
ROPE_FIELDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""Each rope type of transformers and the keys without which it has no meaning."""
_ORIGINAL = "original_max_position_embeddings"


class ConfigReader:
    """Reads keys with the defaults that transformers gives them; `check` raises every problem."""

    def __init__(self, config: Mapping[str, Any], family: str) -> None:
        self.config = config
        self.family = family
        self.problems: list[Problem] = []

    def refuse(self, key: str, why: str, fix: str) -> None:
        """Add a problem about a key."""
        found = f"{key} = {self.config.get(key)!r}" if key in self.config else f"no {key!r}"
        self.problems.append(
            Problem("MC512", f"the model's config.json has {found}: {why}", [f"fix: {fix}"])
        )

    def size(self, key: str, default: int | None = None) -> int:
        """Return a positive integer."""
        value = self.config.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        known = did_you_mean(key, self.config)
        self.refuse(key, f"{self.family} needs a positive integer", known or "correct config.json")
        return 1

    def number(self, key: str, default: float) -> float:
        """Return a number."""
        value = self.config.get(key)
        if value is None:
            return default
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        self.refuse(key, "it must be a number", "correct config.json")
        return default

    def flag(self, key: str, *, default: bool = False) -> bool:
        """Return a truth value."""
        value = self.config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(key, "it must be true or false", "correct config.json")
        return bool(value)

    def choice(self, key: str, default: str, choices: Sequence[str]) -> str:
        """Return one of `choices`."""
        value = self.config.get(key) or default
        if value not in choices:
            self.refuse(key, f"{self.family} supports {', '.join(choices)}", "use another model")
            return default
        return str(value)

    def check(self) -> None:
        """Raise every problem found so far."""
        if self.problems:
            raise UsageError(self.problems)

    def rope(self, max_positions: int) -> tuple[float, dict[str, Any] | None]:
        """Return the base and the scaling; None for plain rope.

        transformers 4 writes rope_theta and rope_scaling (type or rope_type), 5 writes
        rope_parameters. As there, rope_scaling wins over rope_parameters.
        """
        key = "rope_scaling" if self.config.get("rope_scaling") else "rope_parameters"
        given = self.config.get(key) or {}
        if not isinstance(given, Mapping) or any(isinstance(v, Mapping) for v in given.values()):
            self.refuse(key, f"{self.family} has one rope for all layers", "use another model")
            return 10000.0, None
        scaling = dict(given)
        base = scaling.pop("rope_theta", None) or self.number("rope_theta", 10000.0)
        partial = scaling.pop("partial_rotary_factor", None) or self.number(
            "partial_rotary_factor", 1.0
        )
        if partial != 1.0:
            self.refuse(
                "partial_rotary_factor" if "partial_rotary_factor" in self.config else key,
                f"{self.family} rotates the whole head, not a part of it ({partial})",
                "use another model",
            )
        legacy = scaling.pop("type", "default")
        kind = scaling.pop("rope_type", None) or legacy
        if kind not in ROPE_FIELDS:
            self.refuse(
                key, f"unknown rope_type {kind!r}; known: {', '.join(ROPE_FIELDS)}", "correct it"
            )
            return float(base), None
        if missing := [f for f in ROPE_FIELDS[kind] if scaling.get(f) is None]:
            self.refuse(
                key, f"rope_type {kind} needs {' and '.join(missing)}", "add what is missing"
            )
        if kind == "default":
            return float(base), None
        if kind in ("llama3", "yarn", "longrope"):
            original = self.config.get(_ORIGINAL) or scaling.get(_ORIGINAL) or max_positions
            scaling[_ORIGINAL] = original
        return float(base), {"rope_type": kind, **scaling}

    def windows(
        self, num_layers: int, max_window_layers: int
    ) -> tuple[int | None, tuple[int, ...]]:
        """Return the window and the layers that have it, as Qwen's configs say them."""
        window = self.config.get("sliding_window", 4096)
        if not self.flag("use_sliding_window"):
            window = None
        elif window is not None:
            window = self.size("sliding_window", 4096)
        kinds = self.config.get("layer_types")
        if kinds is None:
            first = self.config.get("max_window_layers")
            first = max_window_layers if first is None else first
            chosen = tuple(range(first, num_layers)) if window is not None else ()
            return (window, chosen) if chosen else (None, ())
        if len(kinds) != num_layers:
            self.refuse(
                "layer_types",
                f"it lists {len(kinds)} layers, num_hidden_layers is {num_layers}",
                "make the two agree",
            )
        if other := sorted({str(k) for k in kinds} - {"full_attention", "sliding_attention"}):
            self.refuse(
                "layer_types",
                f"{self.family} has full_attention and sliding_attention, not {', '.join(other)}",
                "use another model",
            )
        chosen = tuple(i for i, k in enumerate(kinds) if k == "sliding_attention")
        if chosen and window is None:
            self.refuse(
                "layer_types",
                "it names sliding_attention, and use_sliding_window or sliding_window says none",
                "set use_sliding_window and sliding_window, or make all layers full_attention",
            )
            return None, ()
        return (window, chosen) if chosen else (None, ())


def llama_like(reader: ConfigReader, **own: Any) -> Architecture:  # noqa: ANN401
    """Return the architecture of a config with llama's keys; `own` are the family's own values."""
    config = reader.config
    if config.get("quantization_config"):
        reader.refuse(
            "quantization_config", "quantized weights cannot be trained", "use the original weights"
        )
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    positions = reader.size("max_position_embeddings", 2048)
    base, scaling = reader.rope(positions)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    values: dict[str, Any] = {
        "num_layers": reader.size("num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": reader.size("intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": reader.size("num_key_value_heads", heads),
        "kv_channels": reader.size("head_dim", hidden // heads or 1),
        "vocab_size": reader.size("vocab_size"),
        "max_position_embeddings": positions,
        "norm_epsilon": reader.number("rms_norm_eps", 1e-6),
        "activation": reader.choice("hidden_act", "silu", ACTIVATIONS),
        "rotary_base": base,
        "rope_scaling": scaling,
        "tie_word_embeddings": reader.flag("tie_word_embeddings"),
        "attention_dropout": reader.number("attention_dropout", 0.0),
        "initializer_range": reader.number("initializer_range", 0.02),
        "dtype": dtype.removeprefix("torch."),
    }
    reader.check()
    return Architecture(**(values | own))
