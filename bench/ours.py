"""One `mcore run` inside this process, so that several can be measured after one import."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_core import hookimpl

if TYPE_CHECKING:
    from mcore_core.protocols import StepResult
    from mcore_core.train.session import Session


@dataclass(slots=True)
class Watch:
    """Sees every step of a run: losses, tokens, and the whole time from one step to the next."""

    between: Callable[[], None] | None = None
    """Called after each step; its time is not counted."""
    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of every step but the first: data, forward, backward, update and reports."""
    resumed: float | None = None

    @hookimpl
    def mcore_step_end(self, step: int, result: "StepResult") -> None:
        """Record."""
        now = time.perf_counter()
        if self.resumed is not None:
            self.seconds.append(now - self.resumed)
        self.losses.append(result.loss)
        self.tokens.append(result.tokens)
        if self.between is not None:
            self.between()
        self.resumed = time.perf_counter()


class _NoSaver:
    """Stands in for the saver where checkpoints are not measured."""

    last_step: int | None = None

    def save(self, run: object, contents: Any) -> None:  # noqa: ANN401
        self.last_step = contents.step

    def finish(self, *, blocking: bool) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is open."""


def open_run(arguments: list[Any], watch: Watch | None = None, *, saves: bool) -> "Session":
    """Set up what `mcore run ARGUMENTS` would run."""
    from mcore_core.cli.execute import begin, source_of
    from mcore_core.cli.run import prepare

    prepared = prepare([str(a) for a in arguments])
    if watch is not None:
        prepared.manager.register(watch)
    source = source_of(prepared)
    platform = begin(prepared, source)
    from mcore_core.train.session import open_session

    session = open_session(prepared, source, platform)
    if not saves:
        session.saver = _NoSaver()  # type: ignore[assignment]
    return session


def finish_run() -> None:
    """Leave the process groups and free memory, for the next run in this process."""
    import gc

    import torch

    from mcore_core.parallel.state import shut_down

    shut_down()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(arguments: list[Any], *, saves: bool = False) -> tuple[Watch, Path]:
    """Train to the end; return what was seen and the run folder."""
    watch = Watch()
    session = open_run(arguments, watch, saves=saves)
    from mcore_core.train.loop import train  # megatron, which the platform must come before

    train(session)
    session.reports.end(None)
    folder = session.run.output_dir
    del session
    finish_run()
    return watch, folder
