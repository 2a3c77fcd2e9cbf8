"""Options of `mcore export`: which way to convert, and how to test the result."""

from typing import ClassVar, Literal

from pydantic import Field

from mcore_core.config.group import ConfigGroup


class ExportConfig(ConfigGroup):
    """Which way to convert, and how to test the result."""

    title: ClassVar[str] = "Export"

    to_mcore: bool = False
    """Convert the HF weights of model into a megatron-core checkpoint in save."""
    to_hf: bool = False
    """Convert the checkpoint in load into HF safetensors in save. Without load it is a round trip
    of model's weights."""
    upcycle: int | None = Field(None, ge=2)
    """Write the dense model as one of experts that computes the same, with this many copies of each
    MLP; with to_hf. moe_router_topk is the number of copies that a token goes to (else 2)."""
    moe_upcycling_granularity: int = Field(1, ge=1)
    """Experts of a fraction of the width that each copy is cut into, with upcycle."""
    exist_ok: bool = False
    """Write into save even if it exists."""
    test_convert_precision: bool = False
    """Compare the converted model with transformers': each layer's states, logits, top-1."""
    test_convert_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number type of that comparison."""
    device_map: dict[str, str | int] | None = None
    """Where transformers puts its model for that comparison, as JSON. none: one device."""
