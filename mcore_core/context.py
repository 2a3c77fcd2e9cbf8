"""What a hook or a reporter may know about the run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcore_core.config.compose import RunConfig
    from mcore_core.parallel.topology import Layout


@dataclass(slots=True)
class RunContext:
    """One run, on one rank."""

    config: "RunConfig"
    output_dir: Path
    layout: "Layout"
    rank: int = 0
    world_size: int = 1
    train_iters: int = 0
    """Optimizer steps of the whole run."""
    steps_per_epoch: float | None = None
    """None where the data has no known length (streaming)."""
    plugins: dict[str, dict[str, str]] = field(default_factory=dict)
    """Active plugins: name -> {"package": ..., "version": ...}."""
    data: dict[str, Any] = field(default_factory=dict)
    """Content hashes and counts of the data."""
    environment: dict[str, str] = field(default_factory=dict)
    """Versions, platform and device."""
    step: int = 0
    """Optimizer steps done."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that reports."""
        return self.rank == 0
