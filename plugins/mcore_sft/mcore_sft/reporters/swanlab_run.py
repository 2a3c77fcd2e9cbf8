"""Metrics to SwanLab; without a key or a network they are kept for `swanlab sync`."""

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

import swanlab

from mcore_sft.reporters.place import TrackedRun, first_line

if TYPE_CHECKING:
    from mcore_core.context import RunContext


class SwanLabReporter:
    """One run at SwanLab. SWANLAB_MODE, SWANLAB_API_KEY and the like mean what they mean."""

    def __init__(self, run: "RunContext") -> None:
        self.notes: list[str] = []
        self._tracked = TrackedRun.of(run)
        try:
            self._run = self._open(None)
        except Exception as error:  # of half a dozen types, by what is missing
            self._run = self._open("offline")
            self.notes.append(f"{first_line(error)}; this run is recorded offline")

    def _open(self, mode: Any) -> Any:  # noqa: ANN401
        tracked = self._tracked
        if swanlab.has_run():
            swanlab.finish()
        # stdout carries results: what SwanLab prints goes to stderr, and it records neither
        settings = swanlab.Settings(
            interactive=False, terminal=swanlab.Settings.Terminal(proxy_type="none")
        )
        with redirect_stdout(sys.stderr):
            return swanlab.init(
                project=tracked.project,
                name=tracked.name,
                log_dir=str(tracked.folder / "swanlab"),
                config=tracked.config,
                mode=mode,
                settings=settings,
            )

    @property
    def where(self) -> str:
        """Where the run is to be seen."""
        return str(self._run.url if self._run.mode == "online" else f"swanlab sync {self._run.dir}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Send what is left."""
        with redirect_stdout(sys.stderr):
            self._run.finish()
