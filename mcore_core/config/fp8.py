"""Training in 8-bit floating point, with Transformer Engine."""

from typing import ClassVar, Literal

from pydantic import Field

from mcore_core.config.group import ConfigGroup


class FP8Config(ConfigGroup):
    """Training in 8-bit floating point, with Transformer Engine."""

    title: ClassVar[str] = "FP8"

    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Compute matrix products in 8 bits: e4m3 throughout, or e5m2 for gradients (hybrid).
    none: no FP8."""
    fp8_recipe: Literal["tensorwise", "delayed", "mxfp8", "blockwise"] = "delayed"
    """How scaling factors are found. mxfp8 needs a Blackwell GPU."""
    fp8_amax_history_len: int = Field(1024, ge=1)
    """Steps of maxima that the delayed recipe remembers."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "max"
    """Which of the remembered maxima the delayed recipe scales by."""
    fp8_param_gather: bool = False
    """Keep weights in 8 bits, so that gathering them moves half the bytes."""
