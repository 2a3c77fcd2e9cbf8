"""Reporters: one object that the training loop tells what happens, and that tells everyone else.

Only rank 0 has a `Reporters`; the others have a `NullReporters` with the same methods. Nothing that
goes wrong in here stops a run: a sink that raises is warned about, at most once a minute.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from mcore_core.component import Catalogue
from mcore_core.config.logging import LoggingConfig
from mcore_core.config.train import TrainConfig
from mcore_core.context import RunContext
from mcore_core.errors import Problem, UsageError
from mcore_core.protocols import Reporter, StepResult
from mcore_core.report import completions, jsonl
from mcore_core.report.console import ConsoleReport
from mcore_core.report.external import load_reporters
from mcore_core.report.format import GIB
from mcore_core.report.meters import Interval, Means, TimeLeft
from mcore_core.report.record import Failure, ModelFacts, RunRecord, RunWarning, SavedCheckpoint
from mcore_core.report.summary import end_lines, outcome, start_lines

if TYPE_CHECKING:
    from mcore_core.report.tensorboard import TensorBoardReport

WARN_AGAIN_SECONDS = 60.0


class RunReports(Protocol):
    """What the training loop calls."""

    def begin(self, run: RunContext, model: ModelFacts | None = None) -> None:
        """Print the summary. Call it when the data, the model and `run.step` are known.

        An external reporter may raise UsageError here.
        """

    def step(
        self, run: RunContext, result: StepResult, extra: Mapping[str, float] | None = None
    ) -> Mapping[str, float] | None:
        """Report the optimizer step `run.step`; `extra` adds to `result.metrics`.

        Returns the means that were logged when this is one of every `log_interval` steps (or the
        last): what `mcore_log` hooks are given. None at other steps.
        """

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Report what the model wrote for a step: see mcore_core.report.completions."""

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report an evaluation; names get "eval/" in front where they lack it."""

    def checkpoint(self, step: int, path: Path, seconds: float) -> None:
        """Report a complete checkpoint."""

    def warn_once(self, key: str, text: str) -> None:
        """Print a warning unless one with this key was printed before."""

    def end(self, error: BaseException | None = None) -> None:
        """Close everything, write report.html and print the final summary. Once only.

        Nothing happens where `begin` was not reached. The error's own text goes into the report;
        printing it is left to whoever handles the exception.
        """


class NullReporters:
    """Reports nothing: what all ranks but the main one have."""

    def begin(self, run: RunContext, model: ModelFacts | None = None) -> None:
        """Do nothing."""

    def step(
        self, run: RunContext, result: StepResult, extra: Mapping[str, float] | None = None
    ) -> Mapping[str, float] | None:
        """Do nothing."""
        return None

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Do nothing."""

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def checkpoint(self, step: int, path: Path, seconds: float) -> None:
        """Do nothing."""

    def warn_once(self, key: str, text: str) -> None:
        """Do nothing."""

    def end(self, error: BaseException | None = None) -> None:
        """Do nothing."""


def build_reporters(
    run: RunContext,
    names: Sequence[str],
    catalogue: Catalogue[type[Reporter]],
    *,
    memory: Callable[[], int] | None = None,
) -> RunReports:
    """Return what this rank reports with: a `Reporters` on the main rank, else a null object."""
    return Reporters(run, names, catalogue, memory=memory) if run.is_main else NullReporters()


class Reporters:
    """Console, metrics.jsonl, TensorBoard, report.html and whatever --report_to names."""

    def __init__(
        self,
        run: RunContext,
        names: Sequence[str],
        catalogue: Catalogue[type[Reporter]],
        *,
        memory: Callable[[], int] | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Import the external reporters; nothing is opened before `begin`.

        Args:
            run: The run; its config and output folder must be final.
            names: The values of --report_to.
            catalogue: Components of the hook `mcore_reporters`.
            memory: Returns the peak device memory in bytes; None leaves memory out.
            stream: The console's stream; standard error by default.
            clock: Monotonic seconds.

        Raises:
            UsageError: A name is unknown, or its package is not installed.
        """
        self._run = run
        self._classes = load_reporters(names, catalogue)
        self._log_interval = run.config[TrainConfig].log_interval
        self._memory = memory
        self._clock = clock
        self._console = ConsoleReport(stream, total=run.train_iters)
        self._stream = stream
        self._record = RunRecord(started=time.time())
        self._began = clock()
        self._interval, self._left = Interval(), TimeLeft()
        self._file: jsonl.MetricsFile | None = None
        self._tables = jsonl.LaterFile(run.output_dir / jsonl.TABLES)
        self._completions = jsonl.LaterFile(run.output_dir / completions.FILE_NAME)
        self._board: TensorBoardReport | None = None
        self._external: dict[str, Reporter] = {}
        self._places: dict[str, str] = {}
        self._mistakes: list[Problem] = []
        self._warned: set[str] = set()
        self._last_warning: dict[str, float] = {}
        self._running = False

    @property
    def record(self) -> RunRecord:
        """What happened so far."""
        return self._record

    def begin(self, run: RunContext, model: ModelFacts | None = None) -> None:
        """Open every sink and print the summary.

        Raises:
            UsageError: An external reporter says that the user has to do something first.
        """
        self._running = True
        self._record.first_step = self._record.step = run.step
        self._tables.resumed_step = self._completions.resumed_step = run.step
        self._record.model = model
        self._console = ConsoleReport(self._stream, total=run.train_iters, start=run.step)
        self._guard("console", self._console.summary, "mcore run", start_lines(run, model))
        self._guard("metrics.jsonl", self._open_file)
        self._guard("tensorboard", self._open_board)
        for name in self._classes:
            self._guard(name, self._open_external, name)
        if self._mistakes:
            raise UsageError(self._mistakes)

    def step(
        self, run: RunContext, result: StepResult, extra: Mapping[str, float] | None = None
    ) -> Mapping[str, float] | None:
        """Report one optimizer step to everyone who wants it now."""
        step, record = run.step, self._record
        metrics = {k: float(v) for k, v in {**result.metrics, **(extra or {})}.items()}
        record.step = step
        record.tokens += result.tokens
        self._interval.add(result, metrics)
        self._left.add(result.seconds)
        eta = self._left.estimate(run.train_iters - step)
        memory = self._peak_memory()
        line = self._step_line(run, result, memory) | metrics
        if self._file is not None:
            self._guard("metrics.jsonl", self._file.write, line)
        if self._board is not None:
            self._guard("tensorboard", self._board.step, line)
        self._guard("console", self._console.advance, step, result.loss, eta)
        if step % self._log_interval and step != run.train_iters:
            return None
        means = self._interval.take()
        if means.tables:
            self._guard(jsonl.TABLES, self._write_tables, step, means)
        self._guard("console", self._console.log, step, means, memory, eta)
        logged = {
            "loss": means.loss,
            "lr": means.lr,
            "grad_norm": means.grad_norm,
            "tokens_per_second": means.tokens_per_second,
        }
        logged |= {k: line[k] for k in ("epoch", "memory_gib") if k in line} | dict(means.metrics)
        self._log_external(step, logged)
        return logged

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Report what the model wrote for a step."""
        self._guard(completions.FILE_NAME, completions.write, self._completions, step, rows)
        if rows:
            self._guard("console", self._console.completions, step, rows)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report an evaluation."""
        named = {k if k.startswith("eval/") else f"eval/{k}": float(v) for k, v in metrics.items()}
        self._guard("console", self._console.evaluation, step, named)
        line = {"step": step} | self._epoch(step) | named
        if self._file is not None:
            self._guard("metrics.jsonl", self._file.write, line)
        if self._board is not None:
            self._guard("tensorboard", self._board.evaluation, line)
        self._log_external(step, named)

    def checkpoint(self, step: int, path: Path, seconds: float) -> None:
        """Report a complete checkpoint."""
        self._record.checkpoints.append(SavedCheckpoint(step, path, seconds))
        self._guard("console", self._console.checkpoint, step, path, seconds)

    def warn_once(self, key: str, text: str) -> None:
        """Print a warning unless one with this key was printed before."""
        if key not in self._warned:
            self._warned.add(key)
            self._warn(text)

    def end(self, error: BaseException | None = None) -> None:
        """Close everything, write report.html and print the final summary."""
        if not self._running:
            return
        self._running = False
        record = self._record
        record.seconds = self._clock() - self._began
        record.failure = Failure.of(error) if error else None
        self._guard("console", self._console.close)
        for name, reporter in self._external.items():
            self._guard(name, self._close_external, name, reporter)
        if self._board is not None:
            self._guard("tensorboard", self._board.close)
        for name, file in (
            (jsonl.FILE_NAME, self._file),
            (jsonl.TABLES, self._tables),
            (completions.FILE_NAME, self._completions),
        ):
            if file is not None:
                self._guard(name, file.close)
        self._guard("report.html", self._write_html)
        self._guard("console", self._print_end)

    def _peak_memory(self) -> int | None:
        try:
            return self._memory() if self._memory else None
        except Exception as error:
            self.warn_once("memory", f"memory cannot be read and is left out: {error}")
            return None

    def _print_end(self) -> None:
        run, record = self._run, self._record
        found = {
            "report": run.output_dir / "report.html",
            "metrics": run.output_dir / jsonl.FILE_NAME,
        }
        files = {k: str(p) for k, p in found.items() if p.exists()} | self._places
        self._console.summary(outcome(run, record), end_lines(run, record, files))

    def _write_html(self) -> None:
        from mcore_core.report.html import write_report  # noqa: PLC0415 - jinja2, at the end only

        write_report(self._run, self._record)

    def _open_file(self) -> None:
        path = self._run.output_dir / jsonl.FILE_NAME
        self._file = jsonl.MetricsFile(path, resumed_step=self._run.step)

    def _write_tables(self, step: int, means: Means) -> None:
        tables = {
            name: {label: [round(v, 6) for v in values] for label, values in rows.items()}
            for name, rows in means.tables.items()
        }
        self._tables.write({"step": step, "steps": means.steps, "tables": tables})

    def _open_board(self) -> None:
        from mcore_core.report.tensorboard import (  # noqa: PLC0415 - a slow import, main rank only
            TensorBoardReport,
        )

        folder = self._run.config[TrainConfig].tensorboard_dir
        self._board = TensorBoardReport(
            Path(folder) if folder else self._run.output_dir / "runs",
            self._run.config[LoggingConfig],
            resumed_step=self._run.step,
        )

    def _open_external(self, name: str) -> None:
        try:
            opened = self._classes[name](self._run)
        except UsageError as error:
            self._mistakes.extend(error.problems)
            return
        self._external[name] = opened
        for note in getattr(opened, "notes", ()):
            self._warn(f"{name}: {note}")

    def _close_external(self, name: str, reporter: Reporter) -> None:
        if where := getattr(reporter, "where", None):
            self._places[name] = str(where)
        reporter.close()

    def _step_line(
        self, run: RunContext, result: StepResult, memory: int | None
    ) -> dict[str, float]:
        speed = result.tokens / result.seconds if result.seconds > 0 else 0.0
        line: dict[str, float] = {"step": run.step} | self._epoch(run.step)
        line |= {
            "loss": float(result.loss),
            "lr": float(result.lr),
            "grad_norm": float(result.grad_norm),
            "tokens": result.tokens,
            "tokens_per_second": round(speed, 1),
            "seconds": round(result.seconds, 4),
        }
        return line if memory is None else line | {"memory_gib": round(memory / GIB, 3)}

    def _epoch(self, step: int) -> dict[str, float]:
        per_epoch = self._run.steps_per_epoch
        return {"epoch": round(step / per_epoch, 4)} if per_epoch else {}

    def _log_external(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, reporter in self._external.items():
            self._guard(name, reporter.log, step, metrics)

    def _guard[**P](
        self, sink: str, action: Callable[P, object], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Call a sink; what it raises becomes a warning, at most one a minute for each sink."""
        try:
            action(*args, **kwargs)
        except Exception as error:  # a broken sink must not cost a run
            now = self._clock()
            if now - self._last_warning.get(sink, -math.inf) < WARN_AGAIN_SECONDS:
                return
            self._last_warning[sink] = now
            text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            if sink != "console":
                self._warn(f"{sink}: {text}; training goes on")

    def _warn(self, text: str) -> None:
        self._record.warnings.append(RunWarning(self._record.step, text))
        try:
            self._console.warning(text)
        except (OSError, ValueError):
            return  # the terminal is gone; the report still has the warning
