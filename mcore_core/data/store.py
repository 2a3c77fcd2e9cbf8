"""Encoded units in one Arrow file that every process memory-maps.

Arrays are list columns, numbers and strings plain ones. A file is written under a temporary name
and renamed when complete.
"""

import errno
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from mcore_core.errors import usage_error
from mcore_core.protocols import Unit

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(slots=True)
class Counts:
    """What encoding saw."""

    rows: int = 0
    kept: int = 0
    """Rows that train."""
    units: int = 0
    """What was made of them: more than rows where long ones were split."""
    tokens: int = 0
    trained: int = 0
    """Tokens with a weight above 0."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> rows."""
    examples: dict[str, str] = field(default_factory=dict)
    """Reason -> the first such row."""

    def drop(self, reason: str, example: str) -> None:
        """Count a row that is left out."""
        self.rows += 1
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.examples.setdefault(reason, example)

    def keep(self, units: Sequence[Unit]) -> None:
        """Count a row that trains, and what was made of it."""
        self.rows += 1
        self.kept += 1
        self.units += len(units)
        for unit in units:
            self.tokens += int(unit["length"])
            if "weights" in unit:
                self.trained += int(np.count_nonzero(unit["weights"]))

    def add(self, other: "Counts") -> None:
        """Add what another process counted, later in the data."""
        self.rows += other.rows
        self.kept += other.kept
        self.units += other.units
        self.tokens += other.tokens
        self.trained += other.trained
        for reason, rows in other.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + rows
        self.examples = other.examples | self.examples

    def to_json(self) -> str:
        """Return the counts as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Counts":
        """Read what to_json wrote."""
        return cls(**json.loads(text))


def to_batch(units: Sequence[Unit]) -> Any:  # noqa: ANN401 - a pyarrow.RecordBatch
    """Return units with equal keys as one Arrow record batch."""
    import pyarrow as pa  # noqa: PLC0415 - start-up stays light

    columns = {}
    for key, first in units[0].items():
        values = [unit[key] for unit in units]
        if not isinstance(first, np.ndarray):
            kinds = {type(value) for value in values}
            plain = kinds in ({int}, {float})
            columns[key] = _flat(np.array(values)) if plain else pa.array(values)
            continue
        if first.ndim != 1:
            raise TypeError(f"unit[{key!r}] must have one dimension, it has {first.ndim}")
        ends = np.cumsum([0, *(len(value) for value in values)]).astype(np.int32)
        columns[key] = pa.ListArray.from_arrays(_flat(ends), _flat(np.concatenate(values)))
    return pa.RecordBatch.from_pydict(columns)


def _flat(values: "NDArray[Any]") -> Any:  # noqa: ANN401
    """Return numbers as an Arrow array over the same memory; `pa.array` would import pandas."""
    import pyarrow as pa  # noqa: PLC0415 - start-up stays light

    kind = pa.from_numpy_dtype(values.dtype)
    buffer = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(kind, len(values), [None, buffer])


@contextmanager
def unit_writer(path: Path) -> Iterator["UnitWriter"]:
    """Open a writer; `path` appears, complete, when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = UnitWriter(temporary)
        yield writer
        writer.close()
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise usage_error(
            "MC417",
            f"cannot write the tokenized data to {path.parent}: {error.strerror}",
            "fix: free some space, or set MCORE_CACHE to a folder on another disk",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


class UnitWriter:
    """Writes record batches."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._stream: Any = None

    def write(self, batch: Any) -> None:  # noqa: ANN401
        """Append one batch."""
        import pyarrow as pa  # noqa: PLC0415 - start-up stays light

        if self._stream is None:
            self._stream = pa.ipc.new_file(self._file, batch.schema)
        self._stream.write_batch(batch)

    def close(self) -> None:
        """Finish the file."""
        if self._stream is not None:
            self._stream.close()
        self._file.close()


class UnitTable(Sequence[Unit]):
    """The units of a file, by number: dicts of read-only numpy arrays, numbers and strings."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._batches: list[Any] | None = None
        self._readers: dict[int, dict[str, Callable[[int], Any]]] = {}
        lengths = [_numbers(b.column("length")) for b in self._open()]
        self.lengths: NDArray[np.int64] = np.concatenate(lengths).astype(np.int64)
        self._ends = list(accumulate(len(x) for x in lengths))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_batches": None, "_readers": {}}

    def _open(self) -> list[Any]:
        if self._batches is None:
            import pyarrow as pa  # noqa: PLC0415 - start-up stays light

            reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        return self._batches

    def __len__(self) -> int:
        return len(self.lengths)

    def column(self, name: str) -> "NDArray[Any]":
        """Return one number of every unit."""
        return np.concatenate([_numbers(batch.column(name)) for batch in self._open()])

    def distinct(self, name: str) -> set[Any]:
        """Return the different values of one number or string."""
        return {v for batch in self._open() for v in batch.column(name).unique().to_pylist()}

    @overload
    def __getitem__(self, index: int) -> Unit: ...
    @overload
    def __getitem__(self, index: slice) -> list[Unit]: ...
    def __getitem__(self, index: int | slice) -> Unit | list[Unit]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        at = bisect_right(self._ends, index)
        row = index - (self._ends[at - 1] if at else 0)
        return {name: column(row) for name, column in self._columns(at).items()}

    def _columns(self, at: int) -> dict[str, Callable[[int], Any]]:
        """Return what reads one row of each column of a record batch."""
        if at not in self._readers:
            batch = self._open()[at]
            pairs = zip(batch.schema.names, batch.columns, strict=True)
            self._readers[at] = {name: _reader(column) for name, column in pairs}
        return self._readers[at]


def _numbers(column: Any) -> "NDArray[Any]":  # noqa: ANN401
    """Return a view of a column without nulls; `to_numpy` would import pandas."""
    return np.from_dlpack(column)


def _reader(column: Any) -> Callable[[int], Any]:  # noqa: ANN401
    """Return a function from a row to its value; lists are views of the file's memory."""
    if not hasattr(column, "offsets"):
        return lambda row: column[row].as_py()
    values, ends = _numbers(column.values), _numbers(column.offsets)
    return lambda row: values[ends[row] : ends[row + 1]]
