"""The rope of an HF config, in the spellings of transformers 4 and 5."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcore_core.model.hf_config import ConfigReader

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


@dataclass(frozen=True, slots=True)
class RopeShape:
    """One rope."""

    base: float
    percent: float = 1.0
    """Part of each head that rotates."""
    scaling: Mapping[str, Any] | None = None
    """As Architecture.rope_scaling; None for plain rope."""

    def softmax_scale(self, head_size: int) -> float | None:
        """Return what DeepSeek's models multiply scores by under yarn; None for the usual."""
        whole = (self.scaling or {}).get("mscale_all_dim")
        if not whole or not self.scaling or self.scaling["factor"] <= 1:
            return None
        mscale = 0.1 * float(whole) * math.log(self.scaling["factor"]) + 1.0
        return float(head_size**-0.5 * mscale * mscale)


def read_rope(
    reader: "ConfigReader",
    max_positions: int,
    *,
    partial: float | None = None,
    theta: float = 10000.0,
    given: Mapping[str, Any] | None = None,
) -> RopeShape:
    """Return the rope.

    transformers 4 writes rope_theta and rope_scaling (type or rope_type), 5 writes
    rope_parameters. As there, rope_scaling wins over rope_parameters.

    Args:
        reader: Collects what cannot be honoured.
        max_positions: The model's longest sequence.
        partial: Default of partial_rotary_factor; None: only whole heads can be rotated.
        theta: Default of rope_theta.
        given: The rope's own keys, where the config has several ropes.
    """
    original = reader.get(_ORIGINAL)
    key = "rope_scaling" if reader.config.get("rope_scaling") else "rope_parameters"
    given = reader.get(key) or {} if given is None else given
    if not isinstance(given, Mapping) or any(isinstance(v, Mapping) for v in given.values()):
        reader.refuse(key, f"{reader.family} has one rope for all layers", "use another model")
        return RopeShape(theta)
    scaling = dict(given)
    base = float(scaling.pop("rope_theta", None) or reader.number("rope_theta", theta))
    percent = _percent(reader, scaling, partial, key)
    legacy = scaling.pop("type", "default")
    kind = scaling.pop("rope_type", None) or legacy
    if kind not in ROPE_FIELDS:
        reader.refuse(
            key, f"unknown rope_type {kind!r}; known: {', '.join(ROPE_FIELDS)}", "correct it"
        )
        return RopeShape(base, percent)
    if missing := [f for f in ROPE_FIELDS[kind] if scaling.get(f) is None]:
        reader.refuse(key, f"rope_type {kind} needs {' and '.join(missing)}", "add what is missing")
    if kind == "default":
        return RopeShape(base, percent)
    if kind in ("llama3", "yarn", "longrope"):
        scaling[_ORIGINAL] = original or scaling.get(_ORIGINAL) or max_positions
    return RopeShape(base, percent, {"rope_type": kind, **scaling})


def _percent(
    reader: "ConfigReader", scaling: dict[str, Any], partial: float | None, key: str
) -> float:
    found = scaling.pop("partial_rotary_factor", None)
    percent = float(found or reader.number("partial_rotary_factor", partial or 1.0))
    if partial is None and percent != 1.0:
        reader.refuse(
            "partial_rotary_factor" if "partial_rotary_factor" in reader.config else key,
            f"{reader.family} rotates the whole head, not a part of it ({percent})",
            "use another model",
        )
    return percent
