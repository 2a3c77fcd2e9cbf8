"""What a model wrote while it trained: completions.jsonl, a few lines in the console, the report.

Each line of the file has `step` and what the recipe gave for one completion, with TRL's names:
`prompt`, `completion`, `reward`, a number for each reward function under `rewards`, `advantage`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mcore_core.report import jsonl

FILE_NAME = "completions.jsonl"
IN_CONSOLE = 3
IN_REPORT = 8
"""Steps of which the report shows completions, spread over the run."""
EACH_STEP = 4
WIDTH = 160
"""Characters of a text that the console shows."""


def write(file: jsonl.LaterFile, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append the completions of one step. Raises OSError."""
    for row in rows:
        file.write({"step": step, **row})


def show(stream: TextIO, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the best, the worst and one in between of a step's completions."""
    chosen = picked(rows, IN_CONSOLE)
    table = Table(title=f"completions for step {step}", title_justify="left", show_lines=True)
    table.add_column("reward", justify="right", no_wrap=True)
    table.add_column("prompt", overflow="fold", ratio=1)
    table.add_column("completion", overflow="fold", ratio=2)
    for row in chosen:
        reward = "\n".join([_number(row.get("reward")), *_parts(row)])
        table.add_row(reward, Text(short(row["prompt"], WIDTH, tail=True)), _text(row))
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        console = Console(file=stream, highlight=False, width=120)
    console.print(table)


def picked(rows: Sequence[Mapping[str, Any]], number: int) -> list[Mapping[str, Any]]:
    """Return completions spread over the rewards, the highest first."""
    ordered = sorted(rows, key=lambda r: -_value(r.get("reward")))
    if len(ordered) <= number:
        return ordered
    last = len(ordered) - 1
    return [ordered[round(i * last / (number - 1))] for i in range(number)]


def short(text: str, width: int, *, tail: bool = False) -> str:
    """Return a text of at most `width` characters; with `tail` its end is kept."""
    if len(text) <= width:
        return text
    return "... " + text[-width:] if tail else text[:width] + " ..."


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion in the report."""

    step: int
    prompt: str
    completion: str
    reward: str
    parts: tuple[str, ...]
    """Each reward function, as `name value`."""
    cut: bool


def samples(path: Path) -> list[Sample]:
    """Return completions of some steps of the file, for report.html."""
    if not path.exists():
        return []
    by_step: dict[int, list[dict[str, Any]]] = {}
    for row in jsonl.read(path):
        by_step.setdefault(row["step"], []).append(row)
    steps = sorted(by_step)
    if len(steps) > IN_REPORT:
        last = len(steps) - 1
        steps = [steps[round(i * last / (IN_REPORT - 1))] for i in range(IN_REPORT)]
    return [
        Sample(
            step=step,
            prompt=short(str(row.get("prompt", "")), 600, tail=True),
            completion=short(str(row.get("completion", "")), 2000),
            reward=_number(row.get("reward")),
            parts=tuple(_parts(row)),
            cut=row.get("finished") is False,
        )
        for step in steps
        for row in picked(by_step[step], EACH_STEP)
    ]


def _parts(row: Mapping[str, Any]) -> list[str]:
    rewards: Mapping[str, Any] = row.get("rewards") or {}
    return [f"{name} {_number(value)}" for name, value in rewards.items()]


def _text(row: Mapping[str, Any]) -> Text:
    text = Text(short(str(row["completion"]), WIDTH) or "(blank)")
    if row.get("finished") is False:
        text.append(" [cut]", style="yellow")
    return text


def _value(reward: Any) -> float:  # noqa: ANN401
    """Return what sorts it: completions that nothing could score come last."""
    known = isinstance(reward, int | float) and not math.isnan(reward)
    return float(reward) if known else float("-inf")


def _number(value: Any) -> str:  # noqa: ANN401
    return "-" if value is None or math.isnan(value) else f"{float(value):.3f}"
