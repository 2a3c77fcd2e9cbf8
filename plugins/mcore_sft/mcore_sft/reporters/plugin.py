"""The `reporters` plugin: Weights & Biases and SwanLab, for any recipe."""

from collections.abc import Iterable
from typing import ClassVar, Literal

from mcore_core import Component, Plugin, hookimpl
from mcore_core.protocols import Reporter


class ReportersPlugin(Plugin):
    """Experiment trackers for --report_to."""

    role: ClassVar[Literal["recipe", "support"]] = "support"
    summary: ClassVar[str] = "metrics to Weights & Biases and SwanLab"

    @hookimpl
    def mcore_reporters(self) -> Iterable[Component[type[Reporter]]]:
        """Return the trackers; their packages are imported when --report_to names them."""
        here = "mcore_sft.reporters"
        yield Component("wandb", f"{here}.wandb_run:WandbReporter", "Weights & Biases")
        yield Component("swanlab", f"{here}.swanlab_run:SwanLabReporter", "SwanLab")
