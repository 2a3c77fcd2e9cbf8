"""metrics.jsonl: one JSON object for every optimizer step and every evaluation.

A step's line has step, epoch, loss, lr, grad_norm, tokens (of this step's global batch),
tokens_per_second, seconds, memory_gib and the recipe's own metrics. An evaluation's line has step,
epoch and names that begin with "eval/". Every step is written, whatever --log_interval says.

JSON has no NaN: such a value is null, and the line's "nonfinite" names it:
`{"step": 7, "loss": null, "nonfinite": {"loss": "nan"}}` ("nan", "inf" or "-inf").
"""

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FILE_NAME = "metrics.jsonl"
TABLES = "tables.jsonl"
"""Metrics that are tables: a line every --log_interval steps, `{"step": 20, "steps": 10, "tables":
{NAME: {ROW: [value, ...]}}}`, sums over those steps. Only runs that have some write it."""


class MetricsFile:
    """Appends to metrics.jsonl, each line complete on disk as soon as it is written."""

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        """Open the file; raises OSError.

        Args:
            path: The file.
            resumed_step: Optimizer steps already done. Lines of later steps are removed, so that no
                step appears twice. At 0 an older file is kept as `metrics.jsonl.old`.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            if resumed_step:
                _truncate(path, resumed_step)
            else:
                path.replace(path.with_name(path.name + ".old"))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open until close()
        self._size = path.stat().st_size

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line. After an OSError the file still holds whole lines only."""
        line = encode(record).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(self._size)
            raise
        self._size += len(line)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class LaterFile:
    """A MetricsFile that appears with its first line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.resumed_step = 0
        self._file: MetricsFile | None = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line. Raises OSError."""
        if self._file is None:
            self._file = MetricsFile(self.path, resumed_step=self.resumed_step)
        self._file.write(record)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def encode(record: Mapping[str, Any]) -> str:
    """Return one line of valid JSON."""
    bad = {k: str(v) for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
    clean = {k: None if k in bad else v for k, v in record.items()}
    return json.dumps(clean | ({"nonfinite": bad} if bad else {}), allow_nan=False)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a metrics file, non-finite values restored; a torn line is skipped."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            record = _decode(line)
            if record is not None:
                bad = record.pop("nonfinite", {})
                yield record | {name: float(text) for name, text in bad.items()}


def _decode(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _truncate(path: Path, step: int) -> None:
    """Keep the lines up to `step`, in a new file that replaces the old one when complete."""
    partial = path.with_name(f".{path.name}.partial")
    with (
        open(path, encoding="utf-8", errors="replace") as source,
        open(partial, "w", encoding="utf-8") as target,
    ):
        for line in source:
            record = _decode(line)
            if record is not None and record["step"] <= step:
                target.write(line.rstrip("\n") + "\n")
        target.flush()
        os.fsync(target.fileno())
    partial.replace(path)
