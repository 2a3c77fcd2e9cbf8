"""The run on standard error: a bar and colours on a terminal, plain lines everywhere else.

Both show the same: a summary at the start, one line every `log_interval` steps and at the last
step, evaluations, checkpoints, warnings, and at the end where everything is. A logged line shows
means over the steps since the previous line; the learning rate is the last step's.

    step 5/200  loss 2.1034  lr 1.00e-05  grad_norm 1.23  tokens/s 1234  mem 1.2 GiB  eta 0:03:12
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from mcore_core.report import completions
from mcore_core.report.format import duration, gib, metric
from mcore_core.report.meters import Means
from mcore_core.report.series import PER_LAYER
from mcore_core.report.summary import Lines

REDRAW_SECONDS = 0.2
LABEL_WIDTH = 12


class ConsoleReport:
    """Writes for people. Never to stdout, which carries results."""

    def __init__(self, stream: TextIO | None = None, *, total: int, start: int = 0) -> None:
        """Look at the stream; print nothing yet.

        Args:
            stream: Where to write; standard error by default.
            total: Optimizer steps of the whole run.
            start: Steps already done.
        """
        self._stream = stream or sys.stderr
        self._console = Console(file=self._stream, highlight=False, soft_wrap=False)
        self._total = total
        self._step = start
        self._rich = self._console.is_terminal and not self._console.is_dumb_terminal
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._drawn = 0.0

    @property
    def is_rich(self) -> bool:
        """True where a bar is drawn."""
        return self._rich

    def summary(self, title: str, lines: Lines) -> None:
        """Print labelled lines under a title."""
        self._line(title, style="bold")
        if not self._rich:
            for label, text in lines:
                self._line(f"  {label:{LABEL_WIDTH}}{text}")
            return
        table = Table.grid(padding=(0, 1, 0, 2), pad_edge=True)
        table.add_column(style="cyan", min_width=LABEL_WIDTH - 3, no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in lines:
            table.add_row(label, Text(text))
        self._console.print(table)

    def advance(self, step: int, loss: float, eta: float) -> None:
        """Move the bar; cheap, and nothing at all where there is none."""
        self._step = step
        if not self._rich:
            return
        now = time.monotonic()
        if now - self._drawn < REDRAW_SECONDS and step < self._total:
            return
        self._drawn = now
        if self._bar is None:
            self._bar = self._open_bar()
        self._bar.update(
            self._task, completed=step, loss=metric("loss", loss), eta=_eta(eta), refresh=True
        )

    def log(self, step: int, means: Means, memory: int | None, eta: float) -> None:
        """Print one line of means."""
        fields = [
            ("step", f"{step}/{self._total}" if self._total else str(step)),
            ("loss", metric("loss", means.loss)),
            ("lr", metric("lr", means.lr)),
            ("grad_norm", metric("grad_norm", means.grad_norm)),
            ("tokens/s", metric("tokens_per_second", means.tokens_per_second)),
        ]
        if memory is not None:
            fields.append(("mem", gib(memory)))
        if not self._rich:
            fields.append(("eta", _eta(eta)))
        fields += [
            (name, metric(name, value))
            for name, value in means.metrics.items()
            if not name.startswith("timers/") and PER_LAYER not in name
        ]
        self._fields(fields)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print one line of an evaluation; names without "eval/"."""
        fields = [("eval at step", str(step))]
        for name, value in metrics.items():
            short = name.removeprefix("eval/")
            fields.append((short, metric(short, value)))
        self._fields(fields, style="green")

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print some completions with their rewards."""
        completions.show(self._stream, step, rows)

    def checkpoint(self, step: int, path: Path, seconds: float) -> None:
        """Print that a checkpoint is complete."""
        self._line(f"saved {path} at step {step} in {seconds:.1f} s", style="blue")

    def warning(self, text: str) -> None:
        """Print a warning."""
        self._line(f"warning: {text}", style="yellow")

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _open_bar(self) -> Progress:
        bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("[dim]eta[/dim] {task.fields[eta]}"),
            console=self._console,
            auto_refresh=False,  # no thread beside the training loop
            transient=True,
            redirect_stdout=False,
            expand=True,
        )
        self._task = bar.add_task("", total=self._total, completed=self._step, loss="-", eta="?")
        bar.start()
        return bar

    def _fields(self, fields: list[tuple[str, str]], style: str = "") -> None:
        if not self._rich:
            self._line("  ".join(f"{name} {value}" for name, value in fields))
            return
        line = Text()
        for index, (name, value) in enumerate(fields):
            line.append("  " if index else "")
            line.append(name + " ", style="dim")
            # A field is broken before its name, never between name and value.
            line.append(value.replace(" ", "\u00a0"), style=style)
        self._console.print(_wrap(line, fields, self._console.width))

    def _line(self, text: str, style: str = "") -> None:
        if self._rich:
            self._console.print(Text(text, style=style), soft_wrap=True)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()


def _wrap(line: Text, fields: list[tuple[str, str]], width: int) -> Text:
    """Put fields that do not fit on further, indented lines."""
    cuts, column, offset = [], 0, 0
    for index, (name, value) in enumerate(fields):
        length = len(name) + 1 + len(value) + (2 if index else 0)
        if index and column + length > width:
            cuts.append(offset)
            column = 0
        column += length
        offset += length
    return Text("\n").join(line.divide(cuts)) if cuts else line


def _eta(seconds: float) -> str:
    return duration(seconds) if math.isfinite(seconds) else "?"
