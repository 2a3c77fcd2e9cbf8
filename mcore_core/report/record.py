"""What happened in a run beyond its metrics: model, checkpoints, warnings, how it ended."""

import traceback
from dataclasses import dataclass, field
from pathlib import Path

from mcore_core.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """The model, as the summary and the report show it."""

    name: str
    """What the user gave: a folder or a hub id."""
    family: str = ""
    parameters: int = 0
    """Of the whole model, not of one rank; 0 where unknown."""
    trainable: int | None = None
    """None where all are."""
    precision: str = ""
    """For example "bf16, float32 gradients"."""


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """One complete checkpoint."""

    step: int
    path: Path
    seconds: float


@dataclass(frozen=True, slots=True)
class RunWarning:
    """One warning, and the step after which it came."""

    step: int
    text: str


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run ended early."""

    summary: str
    detail: str = ""
    """The traceback; empty for a user's mistake."""

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Describe an exception."""
        if isinstance(error, UsageError):
            return cls(str(error))
        if isinstance(error, KeyboardInterrupt):
            return cls("interrupted from the keyboard")
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return cls(text, "".join(traceback.format_exception(error)))


@dataclass(slots=True)
class RunRecord:
    """Filled while the run goes on; the console's summary and the report read it."""

    started: float
    """Seconds since the epoch."""
    first_step: int = 0
    """Steps that were done when this process began: above 0 for a resumed run."""
    step: int = 0
    tokens: int = 0
    """Trained by this process."""
    seconds: float = 0.0
    """From begin to end, on the wall."""
    model: ModelFacts | None = None
    checkpoints: list[SavedCheckpoint] = field(default_factory=list)
    warnings: list[RunWarning] = field(default_factory=list)
    failure: Failure | None = None
