"""Channels: the part of the data that a row belongs to, whose loss is a curve of its own.

Ranks see different rows, and streamed data shows its channels one by one: before each step the
data-parallel ranks tell each other the names they have met, so that all report the same curves.
"""

from collections.abc import Sequence

import numpy as np
import torch

from mcore_core.data.rows import RowError
from mcore_core.data.store import UnitTable
from mcore_core.errors import UsageError, usage_error
from mcore_core.protocols import Row, StepRun, Unit

COLUMN = "channel"
MOST = 256
"""More names than that are no channels: the column holds something else."""


class Channels:
    """The names met so far, the same on every rank."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()

    def read(self, row: Row) -> str:
        """Return the row's channel, empty where it has none. Raises RowError if it is no name."""
        value = row.get(COLUMN)
        if value is None:
            return ""
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise RowError(f"{COLUMN!r} must be a name, found {type(value).__name__}")
        return str(value).strip()

    def check(self, tables: Sequence[UnitTable]) -> None:
        """Raise UsageError where the tokenized data has no channels, or too many."""
        found = {name for table in tables for name in table.distinct(COLUMN)} - {""}
        if not found:
            raise usage_error(
                "MC431",
                "--enable_channel_loss: no row says which channel it belongs to",
                f"it is read from the column {COLUMN!r}",
                f'fix: add the column, or map yours: --columns \'{{"source": "{COLUMN}"}}\'',
            )
        if len(found) > MOST:
            raise _too_many(len(found), sorted(found))

    def meet(self, units: Sequence[Unit], run: StepRun) -> None:
        """Learn the names of a step's units on all data-parallel ranks; collective."""
        mine = sorted({unit[COLUMN] for unit in units} - {"", *self.names})
        new = {name for names in run.gather(mine) for name in names}
        if len(self.names) + len(new) > MOST:
            raise _too_many(len(self.names) + len(new), sorted(new))
        self.names = tuple(sorted({*self.names, *new}))

    def per_token(self, units: Sequence[Unit]) -> torch.Tensor:
        """Return each token's channel, int64 [T], as SFTBatch has it."""
        number = {name: i for i, name in enumerate(self.names, start=1)}
        ids = [number.get(unit[COLUMN], 0) for unit in units]
        lengths = [len(unit["input_ids"]) for unit in units]
        return torch.from_numpy(np.repeat(np.array(ids, np.int64), lengths))


def _too_many(count: int, names: Sequence[str]) -> UsageError:
    return usage_error(
        "MC431",
        f"--enable_channel_loss: the column {COLUMN!r} has {count:,} values or more, and at most "
        f"{MOST} get a curve",
        "among them: " + ", ".join(map(repr, names[:4])),
        f'fix: name a column with few values: --columns \'{{"source": "{COLUMN}"}}\'',
    )
