"""Metrics to Weights & Biases; without a key or a network they are kept for `wandb sync`."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import wandb
from wandb.errors import Error

from mcore_sft.reporters.place import TrackedRun, first_line

if TYPE_CHECKING:
    from mcore_core.context import RunContext

PATIENCE = {"init_timeout": 30.0, "finish_timeout": 60.0}
"""Seconds until a silent server is given up: at the start the run goes on offline, at the end what
was not sent stays in the folder. The variables WANDB_INIT_TIMEOUT and so on win."""


class WandbReporter:
    """One run at Weights & Biases. WANDB_MODE, WANDB_API_KEY and the like mean what they mean."""

    def __init__(self, run: "RunContext") -> None:
        self.notes: list[str] = []
        self._tracked = TrackedRun.of(run)
        try:
            self._run = self._open(None)
        except Error as error:
            self._run = self._open("offline")
            self.notes.append(f"{first_line(error)}; this run is recorded offline")

    def _open(self, mode: Any) -> Any:  # noqa: ANN401
        tracked = self._tracked
        patience = {k: s for k, s in PATIENCE.items() if f"WANDB_{k.upper()}" not in os.environ}
        settings = wandb.Settings(
            console="off", silent=True, finish_timeout_raises=True, **patience
        )
        return wandb.init(
            project=tracked.project,
            name=tracked.name,
            dir=str(tracked.folder),
            config=tracked.config,
            mode=mode,
            settings=settings,
        )

    @property
    def where(self) -> str:
        """Where the run is to be seen."""
        if self._run.offline:
            return f"wandb sync {self._run.settings.sync_dir}"
        return str(self._run.url or self._run.settings.sync_dir)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Send what is left. Raises TimeoutError where the server does not take it."""
        try:
            self._run.finish()
        except TimeoutError as error:
            folder = self._run.settings.sync_dir
            message = f"not everything could be sent; `wandb sync {folder}` sends the rest"
            raise TimeoutError(message) from error
