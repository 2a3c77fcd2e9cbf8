"""Encode every row once, in several processes, into a cache that is named by its content.

The name is a hash of the sources' contents, the rows chosen, the tokenizer and template, the
options that change encoding and this package's version. Two runs that encode the same at once
each write a temporary file, and the last to finish replaces an equal one; whoever has it open
keeps it.
"""

import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mcore_core.data.files import Rows
from mcore_core.data.processes import start_method
from mcore_core.data.rows import RowDropped, RowError, rename
from mcore_core.data.sources import nothing_parses
from mcore_core.data.store import Counts, UnitTable, to_batch, unit_writer
from mcore_core.data.template import NOTHING_TRAINS, TOO_LONG
from mcore_core.errors import UsageError, usage_error
from mcore_core.protocols import Recipe, Row, Unit

CHUNK = 512
"""Rows that a process encodes at a time."""
BY_RECIPE = "left out by the recipe"
MALFORMED = "malformed"
FIXES = {
    TOO_LONG: "raise --max_length, or --truncation_strategy right cuts them",
    NOTHING_TRAINS: "the rows have no assistant message that trains; see --loss_scale",
    MALFORMED: "--strict true stops at the first and shows it",
    BY_RECIPE: "see the recipe's documentation for what it needs",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RowEncoder:
    """How one row becomes units. Picklable."""

    recipe: Recipe[Any]
    columns: Mapping[str, str] | None = None
    fields: frozenset[str] | None = None
    """Columns to keep; None keeps all."""
    strict: bool = False

    def __call__(self, row: Row) -> list[Unit]:
        """Encode one row: one unit, or several. Raises RowDropped and RowError."""
        row = rename(row, self.columns)
        if self.fields is not None:
            row = {key: value for key, value in row.items() if key in self.fields}
        found = self.recipe.encode(row)
        if not found:
            raise RowDropped(BY_RECIPE)
        return found if isinstance(found, list) else [found]

    def counted(self, rows: Rows, index: int, counts: Counts, name: str) -> list[Unit]:
        """Encode row `index`, or count why not. Raises UsageError for a malformed row if strict."""
        (row,) = rows.read(index, index + 1)
        return self.count_row(row, counts, partial(where_of, rows, index, name))

    def count_row(
        self, row: Row | RowError, counts: Counts, where: Callable[[], str]
    ) -> list[Unit]:
        """Encode a row that was read, or count why not: then there are no units."""
        try:
            if isinstance(row, RowError):
                raise row
            units = self(row)
        except RowDropped as dropped:
            counts.drop(dropped.reason, where())
            return []
        except RowError as error:
            self.reject(error, counts, where())
            return []
        counts.keep(units)
        return units

    def reject(self, error: RowError, counts: Counts, where: str) -> None:
        """Count a malformed row, or stop."""
        located = RowError(error.reason, error.where or where)
        if self.strict:
            raise usage_error(
                "MC404", str(located), "fix: correct the row, or --strict false to leave it out"
            ) from error
        counts.drop(MALFORMED, str(located))


def where_of(rows: Rows, index: int, name: str) -> str:
    """Return where a row stands: file:line, or its number in `name`."""
    return rows.where(index) or f"{name} row {index + 1}"


def cache_dir() -> Path:
    """Return where tokenized data is kept."""
    root = os.environ.get("MCORE_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "mcore") / "tokens"


def cache_key(parts: Sequence[Any]) -> str:
    """Return a name for everything that decides what encoding gives."""
    text = json.dumps([version("mcore-core"), *parts], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def encode_rows(
    rows: Rows,
    encoder: RowEncoder,
    *,
    path: Path,
    name: str,
    num_proc: int = 1,
    reuse: bool = False,
    progress: bool = True,
) -> Counts:
    """Write the encoded rows to `path`, a UnitTable; with `reuse`, take what is there already.

    Raises:
        UsageError: A strict error, a template that cannot be masked, or nothing is left.
    """
    counts_path = path.with_suffix(".json")
    if reuse and path.exists():
        with suppress(OSError, ValueError):
            UnitTable(path)
            return Counts.from_json(counts_path.read_text(encoding="utf-8"))
    counts = Counts()
    work = partial(_encode_chunk, rows, encoder, name)
    starts = range(0, len(rows), CHUNK)
    with (
        _bar(f"tokenizing {name}", len(rows), progress) as advance,
        unit_writer(path) as writer,
        _pool(work, num_proc, len(starts)) as results,
    ):
        for batch, seen in results(starts):
            counts.add(seen)
            advance(seen.rows)
            if batch is not None:
                writer.write(batch)
        if not counts.kept:
            raise nothing_left(name, counts)
    temporary = counts_path.with_name(f".{counts_path.name}.{os.getpid()}.tmp")
    temporary.write_text(counts.to_json(), encoding="utf-8")
    os.replace(temporary, counts_path)
    return counts


def nothing_left(name: str, counts: Counts) -> UsageError:
    """Return the error for data of which every row was dropped."""
    reasons = list(counts.dropped)
    if reasons == [MALFORMED]:
        return nothing_parses(name, counts.rows, counts.examples[MALFORMED])
    return usage_error(
        "MC410",
        f"{name}: nothing is left to train on, all {counts.rows:,} rows were dropped",
        *(describe_drop(reason, counts) for reason in reasons),
        "fix: " + "; ".join(dict.fromkeys(map(_fix, reasons))),
    )


def _fix(reason: str) -> str:
    if "--max_length" in reason:
        return FIXES.get(reason, "raise --max_length")
    return FIXES.get(reason, FIXES[BY_RECIPE])


def describe_drop(reason: str, counts: Counts) -> str:
    """Return one line: how many rows, why, and the first."""
    return f"{counts.dropped[reason]:,} x {reason} (first: {counts.examples[reason]})"


def _encode_chunk(rows: Rows, encoder: RowEncoder, name: str, start: int) -> tuple[Any, Counts]:
    counts = Counts()
    units: list[Unit] = []
    stop = min(start + CHUNK, len(rows))
    for index, row in enumerate(rows.read(start, stop), start):
        units += encoder.count_row(row, counts, partial(where_of, rows, index, name))
    return (to_batch(units) if units else None), counts


_work: Any = None


def _set_work(work: Any) -> None:  # noqa: ANN401
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _do_work(start: int) -> tuple[Any, Counts]:
    result: tuple[Any, Counts] = _work(start)
    return result


@contextmanager
def _pool(work: Any, num_proc: int, chunks: int) -> Iterator[Any]:  # noqa: ANN401
    num_proc = min(num_proc, chunks)
    if num_proc <= 1:
        yield partial(map, work)
        return
    context = multiprocessing.get_context(start_method())
    with ProcessPoolExecutor(num_proc, context, _set_work, (work,)) as pool:
        try:
            yield partial(pool.map, _do_work)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _bar(label: str, total: int, shown: bool) -> Iterator[Any]:
    if not shown or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich import progress as rich  # noqa: PLC0415 - start-up stays light
    from rich.console import Console  # noqa: PLC0415 - start-up stays light

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.advance(task, done)


class LazyUnits(Sequence[Unit]):
    """Units that are encoded when they are asked for.

    A row that cannot train is replaced by the next that can.
    Which one that is, is the same on every rank; nothing is counted, since nobody sees all rows.
    """

    def __init__(self, rows: Rows, encoder: RowEncoder, name: str) -> None:
        self._rows = rows
        self._encoder = encoder
        self._name = name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        counts = Counts()
        for offset in range(len(self)):
            at = (index + offset) % len(self)
            units = self._encoder.counted(self._rows, at, counts, self._name)
            if units:
                (unit,) = units  # rows of which several are made are not encoded lazily
                return unit
        raise nothing_left(self._name, counts)
