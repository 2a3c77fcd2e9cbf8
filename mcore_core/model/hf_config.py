"""Reads an HF config as an Architecture, and collects every key that cannot be honoured."""

from collections.abc import Mapping, Sequence
from typing import Any

from mcore_core.errors import Problem, UsageError, did_you_mean
from mcore_core.model.architecture import Architecture
from mcore_core.model.hf_rope import RopeShape, read_rope

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu")
"""What the builder knows of HF's `hidden_act`."""
FULL, WINDOWED = "full_attention", "sliding_attention"


class ConfigReader:
    """Reads keys with the defaults that transformers gives them; `check` raises every problem.

    `defaults` are those of the family's config class where they are not the usual ones; a key that
    is null in the config stays null.
    """

    def __init__(
        self, config: Mapping[str, Any], family: str, defaults: Mapping[str, Any] | None = None
    ) -> None:
        self.config = config
        self.family = family
        self.defaults = defaults or {}
        self.problems: list[Problem] = []

    def get(self, key: str) -> Any:  # noqa: ANN401
        """Return a value as it is, or the family's default where the key is absent."""
        return self.config[key] if key in self.config else self.defaults.get(key)

    def refuse(self, key: str, why: str, fix: str) -> None:
        """Add a problem about a key."""
        found = f"{key} = {self.config.get(key)!r}" if key in self.config else f"no {key!r}"
        self.problems.append(
            Problem("MC512", f"the model's config.json has {found}: {why}", [f"fix: {fix}"])
        )

    def size(self, key: str, default: int | None = None) -> int:
        """Return a positive integer."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        known = did_you_mean(key, self.config)
        self.refuse(key, f"{self.family} needs a positive integer", known or "correct config.json")
        return 1

    def count(self, key: str, default: int = 0) -> int:
        """Return an integer that may be zero."""
        value = self.get(key)
        if value is None or value == 0:
            return default if value is None else 0
        return self.size(key)

    def predictions(self, key: str = "num_nextn_predict_layers", *, most: int = 1) -> int:
        """Return how many layers of multi-token prediction there are; refuse more than `most`."""
        found = self.count(key)
        if found <= most:
            return found
        self.refuse(key, f"{self.family}'s checkpoints have names for {most}", f"set {key} to 0")
        return 0

    def number(self, key: str, default: float) -> float:
        """Return a number."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        self.refuse(key, "it must be a number", "correct config.json")
        return default

    def flag(self, key: str, *, default: bool = False) -> bool:
        """Return a truth value."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(key, "it must be true or false", "correct config.json")
        return bool(value)

    def choice(self, key: str, default: str, choices: Sequence[str]) -> str:
        """Return one of `choices`."""
        value = self.get(key) or default
        if value not in choices:
            self.refuse(key, f"{self.family} supports {', '.join(choices)}", "use another model")
            return default
        return str(value)

    def only(self, key: str, value: Any, why: str) -> None:  # noqa: ANN401
        """Refuse any value of a key but this one (and null)."""
        found = self.get(key)
        if found is not None and found != value:
            self.refuse(key, why, f"use a model with {key} {value!r}")

    def check(self) -> None:
        """Raise every problem found so far."""
        if self.problems:
            raise UsageError(self.problems)

    def rope(
        self, max_positions: int, *, partial: float | None = None, theta: float = 10000.0
    ) -> RopeShape:
        """Return the one rope of all layers; see `read_rope`."""
        return read_rope(self, max_positions, partial=partial, theta=theta)

    def layer_kinds(
        self, num_layers: int, default: Sequence[str], known: Sequence[str] = (FULL, WINDOWED)
    ) -> tuple[str, ...]:
        """Return what `layer_types` says of each layer; `default` where the key is absent."""
        kinds = self.get("layer_types")
        if kinds is None:
            return tuple(default)
        if len(kinds) != num_layers:
            self.refuse(
                "layer_types",
                f"it lists {len(kinds)} layers, num_hidden_layers is {num_layers}",
                "make the two agree",
            )
        if other := sorted({str(k) for k in kinds} - set(known)):
            self.refuse(
                "layer_types",
                f"{self.family} has {' and '.join(known)}, not {', '.join(other)}",
                "use another model",
            )
        return tuple(str(k) for k in kinds)

    def window_of(
        self, kinds: Sequence[str], window: int | None, *, off: str = "sliding_window"
    ) -> dict[str, Any]:
        """Return window_size and window_layers; `off` names what says that there is no window."""
        layers = tuple(i for i, kind in enumerate(kinds) if kind == WINDOWED)
        if layers and window is None:
            self.refuse(
                "layer_types",
                f"it names {WINDOWED}, and {off} says none",
                f"set {off.replace(' or ', ' and ')}, or make all layers {FULL}",
            )
        if not layers or window is None:
            return {}
        return {"window_size": window, "window_layers": layers}

    def window_everywhere(self, window: int | None) -> dict[str, Any]:
        """Return window_size and window_layers of a model with one window for all layers."""
        if window is None:
            return {}
        layers = self.size("num_hidden_layers")
        return {"window_size": window, "window_layers": tuple(range(layers))}

    def optional_size(self, key: str) -> int | None:
        """Return a positive integer, or None where it is null."""
        return None if self.get(key) is None else self.size(key)

    def windows(self, num_layers: int, max_window_layers: int) -> dict[str, Any]:
        """Return window_size and window_layers, as Qwen's dense configs say them."""
        window = self.config.get("sliding_window", 4096)
        if not self.flag("use_sliding_window"):
            window = None
        elif window is not None:
            window = self.size("sliding_window", 4096)
        first = self.config.get("max_window_layers")
        first = max_window_layers if first is None else first
        usual = [WINDOWED if window and i >= first else FULL for i in range(num_layers)]
        kinds = self.layer_kinds(num_layers, usual)
        return self.window_of(kinds, window, off="use_sliding_window or sliding_window")


def llama_like(
    reader: ConfigReader,
    *,
    partial: float | None = None,
    theta: float = 10000.0,
    eps: str = "rms_norm_eps",
    act: str = "hidden_act",
    **own: Any,  # noqa: ANN401
) -> Architecture:
    """Return the architecture of a config with llama's keys.

    Args:
        reader: The config.
        partial: Default of partial_rotary_factor; None: the family rotates whole heads.
        theta: Default of rope_theta.
        eps: Key of the norms' epsilon.
        act: Key of the activation's name.
        own: The family's own values of Architecture's fields.
    """
    config = reader.config
    _check_quantization(reader)
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    positions = reader.size("max_position_embeddings", 2048)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    values: dict[str, Any] = {
        "num_layers": reader.size("num_hidden_layers"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": reader.size("num_key_value_heads", heads),
        "kv_channels": reader.size("head_dim", hidden // heads or 1),
        "vocab_size": reader.size("vocab_size"),
        "max_position_embeddings": positions,
        "norm_epsilon": reader.number(eps, 1e-6),
        "activation": reader.choice(act, "silu", ACTIVATIONS),
        "tie_word_embeddings": reader.flag("tie_word_embeddings"),
        "attention_dropout": reader.number("attention_dropout", 0.0),
        "initializer_range": reader.number("initializer_range", 0.02),
        "dtype": dtype.removeprefix("torch."),
    }
    if "ffn_hidden_size" not in own:
        values["ffn_hidden_size"] = reader.size("intermediate_size")
    if "rotary_base" not in own:
        rope = reader.rope(positions, partial=partial, theta=theta)
        values |= {"rotary_base": rope.base, "rope_scaling": rope.scaling}
        values["rotary_percent"] = rope.percent
    reader.check()
    return Architecture(**(values | own))


def _check_quantization(reader: ConfigReader) -> None:
    given = reader.config.get("quantization_config")
    if not given:
        return
    block = given.get("weight_block_size") if isinstance(given, Mapping) else None
    method = given.get("quant_method") if isinstance(given, Mapping) else None
    if method == "mxfp4" or (block and method == "fp8"):
        return  # dequantized while loading
    reader.refuse(
        "quantization_config",
        "of quantized weights only fp8 with weight_block_size and mxfp4 can be read",
        "use the original weights",
    )
