"""What both trackers are told of a run: its project, name, folder and options."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_core.config.logging import LoggingConfig

if TYPE_CHECKING:
    from mcore_core.context import RunContext


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """One run, as a tracker names it."""

    project: str
    name: str
    folder: Path
    """Where the tracker keeps its local files; it exists."""
    config: dict[str, Any]
    """Every resolved option, without secrets, and the layout."""

    @classmethod
    def of(cls, run: "RunContext") -> "TrackedRun":
        """Read the wandb_* options. Raises OSError where the folder cannot be made."""
        options = run.config[LoggingConfig]
        saved = options.wandb_save_dir
        folder = Path(saved).expanduser() if saved else run.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"layout": str(run.layout), "world_size": run.world_size}
        return cls(
            options.wandb_project,
            options.wandb_exp_name or run.output_dir.resolve().name,
            folder,
            {**run.config.dump(), **facts},
        )


def first_line(error: BaseException) -> str:
    """Return an exception in one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
