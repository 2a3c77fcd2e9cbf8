"""Options of the native engine."""

from typing import ClassVar

from pydantic import Field

from mcore_core.config.group import ConfigGroup


class NativeConfig(ConfigGroup):
    """Generation with the training weights (rollout_engine native)."""

    title: ClassVar[str] = "Native rollout"

    native_slots: int | None = Field(None, ge=1)
    """Completions that are generated beside each other on each data-parallel rank. none: as many as
    are asked for, and as keys and values fit in native_kv_gib."""
    native_cuda_graphs: bool = True
    """On a GPU, record steps as CUDA graphs where the layout allows it; off: launch every kernel of
    every step, which is slow for small models."""
    native_kv_gib: float | None = Field(None, gt=0)
    """Memory of each rank for keys and values, in GiB. none: half of what is free on a GPU, 4 on
    the CPU."""
