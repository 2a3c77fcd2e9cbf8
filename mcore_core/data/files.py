"""Rows of one file, read on access: jsonl, json, csv, parquet, and a saved `datasets` folder.

Every class is a picklable sequence of rows, whose files are opened in each process for itself.
`rows[i]` raises RowError with file:line where that row is malformed.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from mcore_core.data.rows import RowError
from mcore_core.errors import usage_error
from mcore_core.protocols import Row


class Rows(Sequence[Row]):
    """What every source is: rows by number."""

    def get(self, index: int) -> Row:
        """Return one row, 0 <= index < len. Raises RowError."""
        raise NotImplementedError

    def read(self, start: int, stop: int) -> Iterator[Row | RowError]:
        """Yield rows one after the other; a malformed one as the RowError that says so."""
        for index in range(start, stop):
            try:
                yield self.get(index)
            except RowError as error:
                yield error

    def where(self, index: int) -> str:
        """Return file:line of a row, or an empty string where rows have no lines."""
        return ""

    def columns(self) -> tuple[str, ...]:
        """Return the column names of the first row that can be read."""
        for index in range(min(len(self), 1000)):
            try:
                return tuple(self.get(index))
            except RowError:
                continue
        return ()

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self.get(i) for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.get(index)


class ListRows(Rows):
    """Rows that are in memory already."""

    def __init__(self, rows: Sequence[Any], name: str) -> None:
        self._rows = rows
        self._name = name

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, index: int) -> Row:
        """Return one row."""
        row = self._rows[index]
        if not isinstance(row, Mapping):
            raise RowError(
                f"a row must be an object, found {type(row).__name__}", f"{self._name}[{index}]"
            )
        return dict(row)


class JsonlRows(Rows):
    """One JSON object a line. Blank lines are skipped; lines are counted from 1."""

    def __init__(self, path: Path) -> None:
        self._path = path
        starts, lines, at = [], [], 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    starts.append(at)
                    lines.append(number)
                at += len(line)
        self._starts = np.array(starts, np.int64)
        self._lines = np.array(lines, np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def get(self, index: int) -> Row:
        """Parse one line."""
        with self._path.open("rb") as file:
            file.seek(int(self._starts[index]))
            line = file.readline()
        return parse_line(line, self.where(index))

    def read(self, start: int, stop: int) -> Iterator[Row | RowError]:
        """Parse lines one after the other, from a file that is opened once."""
        with self._path.open("rb") as file:
            for index in range(start, stop):
                file.seek(int(self._starts[index]))
                try:
                    yield parse_line(file.readline(), self.where(index))
                except RowError as error:
                    yield error

    def where(self, index: int) -> str:
        """Return file:line."""
        return f"{self._path}:{self._lines[index]}"


def parse_line(line: bytes, where: str) -> Row:
    """Parse one line of a jsonl file. Raises RowError."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise RowError(f"not valid JSON ({error.msg}, column {error.colno})", where) from error
    except UnicodeDecodeError as error:
        raise RowError("not valid UTF-8", where) from error
    if not isinstance(row, dict):
        raise RowError(f"a row must be a JSON object, found {type(row).__name__}", where)
    return row


class ParquetRows(Rows):
    """A parquet file, read one row group at a time."""

    def __init__(self, path: Path) -> None:
        from pyarrow import ArrowException  # noqa: PLC0415 - start-up stays light
        from pyarrow.parquet import ParquetFile  # noqa: PLC0415 - start-up stays light

        self._path = path
        try:
            with ParquetFile(path) as file:
                meta = file.metadata
                sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
                self._names = tuple(file.schema_arrow.names)
        except (ArrowException, OSError) as error:
            raise usage_error(
                "MC404", f"{path}: not a parquet file ({error})", "fix: check the file is complete"
            ) from error
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._group: tuple[int, list[Row]] = (-1, [])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_group": (-1, [])}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def columns(self) -> tuple[str, ...]:
        """Return the columns of the schema."""
        return self._names

    def get(self, index: int) -> Row:
        """Return one row; its row group is kept for the next call."""
        from pyarrow.parquet import ParquetFile  # noqa: PLC0415 - start-up stays light

        group = int(np.searchsorted(self._ends, index, side="right"))
        if self._group[0] != group:
            with ParquetFile(self._path) as file:
                self._group = (group, file.read_row_group(group).to_pylist())
        start = int(self._ends[group - 1]) if group else 0
        return dict(self._group[1][index - start])


class SavedRows(Rows):
    """A `datasets.Dataset`, memory-mapped."""

    def __init__(self, dataset: Any) -> None:  # noqa: ANN401
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def columns(self) -> tuple[str, ...]:
        """Return the columns of the schema."""
        return tuple(self._dataset.column_names)

    def get(self, index: int) -> Row:
        """Return one row."""
        return dict(self._dataset[index])


def read_json(path: Path) -> Rows:
    """Read a JSON file: a list of rows, {"data": [rows]}, or one JSON object a line."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{"):
            return JsonlRows(path)
        raise usage_error(
            "MC404",
            f"{path}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno})",
            "fix: correct that line; a .json file is read whole, so no row can be left out",
        ) from error
    if isinstance(value, dict):
        value = value["data"] if isinstance(value.get("data"), list) else [value]
    if not isinstance(value, list):
        raise usage_error(
            "MC404",
            f"{path}: expected a list of rows, found {type(value).__name__}",
            'fix: write [{"messages": [...]}, ...], or one JSON object a line',
        )
    return ListRows(value, str(path))


class CsvRows(Rows):
    """A csv or tsv file with a header; every value is a string."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[tuple[int, Row]] = []
        delimiter = "\t" if path.suffix == ".tsv" else ","
        csv.field_size_limit(2**31 - 1)
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            line = 2
            for row in reader:
                self._rows.append((line, row))
                line = reader.line_num + 1
            self._names = tuple(reader.fieldnames or ())

    def __len__(self) -> int:
        return len(self._rows)

    def columns(self) -> tuple[str, ...]:
        """Return the header."""
        return self._names

    def get(self, index: int) -> Row:
        """Return one row."""
        _, row = self._rows[index]
        extra: Any = row.get(None)  # type: ignore[call-overload]
        missing = sum(value is None for value in row.values())
        if extra or missing:
            found = len(self._names) + len(extra or ()) - missing
            raise RowError(f"{found} values under {len(self._names)} columns", self.where(index))
        return dict(row)

    def where(self, index: int) -> str:
        """Return file:line."""
        return f"{self._path}:{self._rows[index][0]}"


READERS: Mapping[str, Callable[[Path], Rows]] = {
    ".jsonl": JsonlRows,
    ".json": read_json,
    ".csv": CsvRows,
    ".tsv": CsvRows,
    ".parquet": ParquetRows,
}
"""By the end of the file's name."""


def content_hash(paths: Sequence[Path]) -> str:
    """Return a hash of the files' contents."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def stream_file(path: Path) -> Iterator[Row | RowError]:
    """Yield the rows of a file without reading it whole, where its format allows that."""
    if path.suffix == ".jsonl":
        yield from _stream_jsonl(path)
        return
    rows = READERS[path.suffix](path)
    yield from rows.read(0, len(rows))


def _stream_jsonl(path: Path) -> Iterator[Row | RowError]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield parse_line(line, f"{path}:{number}")
                except RowError as error:
                    yield error
