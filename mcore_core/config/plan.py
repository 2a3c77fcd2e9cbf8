"""Options of `mcore plan`: the cluster to plan for."""

from typing import ClassVar

from pydantic import Field

from mcore_core.config.group import ConfigGroup


class PlanConfig(ConfigGroup):
    """The cluster to plan for."""

    title: ClassVar[str] = "Plan"

    gpus: int | None = Field(None, ge=1)
    """GPUs of the run, over all machines."""
    gpu_memory: float = Field(80.0, gt=0)
    """Memory of one GPU, in GiB."""
    gpus_per_node: int = Field(8, ge=1)
    """GPUs of one machine: between them data travels fast."""
    top: int = Field(10, ge=1)
    """How many layouts to show."""
