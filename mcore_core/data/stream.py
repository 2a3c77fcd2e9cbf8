"""Train from rows that are read while training: shuffle and pack in a buffer, skip to resume.

Every rank reads the whole stream and takes its share of each global batch, so that the batches
are the same for any layout. To resume, the stream is read from its beginning and the consumed
batches are skipped, which costs reading and tokenizing them again and gives the batches of the
uninterrupted run. One worker process reads, however many are asked for: the order of a stream has
one reader.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np

from mcore_core.data.encode import RowEncoder, nothing_left
from mcore_core.data.loader import MicroBatches, Workers, as_is, check_cursor
from mcore_core.data.pack import pack
from mcore_core.data.processes import start_method
from mcore_core.data.rows import RowError
from mcore_core.data.sampler import Share
from mcore_core.data.store import Counts
from mcore_core.errors import UsageError
from mcore_core.protocols import Row, Unit

_END: Any = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """What decides the order of a stream."""

    seed: int = 0
    shuffle: bool = True
    buffer_size: int = 1000
    packing_length: int | None = None
    """None does not pack."""
    balance: bool = False
    """Divide each global batch so that ranks have about the same to do."""


class Stream:
    """Endless items: lists of units that form one sample, or one packed row. Picklable."""

    def __init__(
        self,
        open_epoch: Callable[[int], Iterable[Row | RowError]],
        encoder: RowEncoder,
        options: StreamOptions,
        *,
        name: str,
    ) -> None:
        """Keep how to open the rows of an epoch."""
        self._open = open_epoch
        self._encoder = encoder
        self._options = options
        self._name = name

    @property
    def seed(self) -> int:
        """The seed of the order."""
        return self._options.seed

    @property
    def balances(self) -> bool:
        """Whether ranks are to have about the same to do."""
        return self._options.balance

    def __iter__(self) -> Iterator[list[Unit]]:
        """Yield items, epoch after epoch."""
        epoch = 0
        while True:
            rng = np.random.default_rng([self._options.seed, 4, epoch])
            units = self._units(epoch)
            if self._options.shuffle:
                units = shuffled(units, self._options.buffer_size, rng)
            yield from self._items(units, rng)
            epoch += 1

    def _units(self, epoch: int) -> Iterator[Unit]:
        counts = Counts()
        for number, row in enumerate(self._open(epoch), start=1):
            yield from self._encoder.count_row(row, counts, partial(self._where, number))
        if not counts.kept:
            raise nothing_left(self._name, counts)

    def _where(self, number: int) -> str:
        return f"{self._name} row {number}"

    def _items(self, units: Iterator[Unit], rng: np.random.Generator) -> Iterator[list[Unit]]:
        capacity = self._options.packing_length
        if capacity is None:
            yield from ([unit] for unit in units)
            return
        kept: list[Unit] = []
        while block := list(islice(units, self._options.buffer_size)):
            block = kept + block
            lengths = np.array([unit["length"] for unit in block])
            packs = pack(lengths, capacity)
            kept = []
            if len(packs) > 1:
                sizes = [int(lengths[p].sum()) for p in packs]
                kept = [block[i] for i in packs.pop(int(np.argmin(sizes)))]
            order = rng.permutation(len(packs)) if self._options.shuffle else range(len(packs))
            yield from ([block[i] for i in packs[p]] for p in order)
        if kept:
            yield kept


def shuffled[T](values: Iterator[T], size: int, rng: np.random.Generator) -> Iterator[T]:
    """Yield values in an order that is random within a buffer of `size`."""
    buffer = list(islice(values, size))
    for value in values:
        at = int(rng.integers(len(buffer)))
        yield buffer[at]
        buffer[at] = value
    yield from (buffer[i] for i in rng.permutation(len(buffer)))


def interleaved[T](
    opens: Sequence[Callable[[], Iterable[T]]],
    shares: Sequence[float],
    rng: np.random.Generator,
    *,
    all_exhausted: bool = False,
) -> Iterator[T]:
    """Yield from parts drawn at random, the values of each in order.

    It ends with the last value of the first part that is used up; with `all_exhausted` such parts
    begin again, until each has been gone through once. As `mix.interleave` for data of known size.
    """
    parts = [iter(part()) for part in opens]
    ahead = [next(part, _END) for part in parts]
    done = {i for i, value in enumerate(ahead) if value is _END}
    chances = np.asarray(shares, float) / sum(shares)
    while not done or (all_exhausted and len(done) < len(parts)):
        at = int(rng.choice(len(parts), p=chances))
        value = ahead[at]
        if value is _END:
            continue  # a part without any value
        yield value
        ahead[at] = next(parts[at], _END)
        if ahead[at] is _END:
            done.add(at)
            if all_exhausted and len(done) < len(parts):
                parts[at] = iter(opens[at]())
                ahead[at] = next(parts[at], _END)


def in_order[T](parts: list[Iterator[T]]) -> Iterator[T]:
    """Yield the parts one after another."""
    return chain.from_iterable(parts)


def _iterable(stream: Stream, share: Share, skip: int) -> Any:  # noqa: ANN401
    from torch.utils.data import IterableDataset  # noqa: PLC0415 - start-up stays light

    class Steps(IterableDataset[MicroBatches | UsageError]):
        def __iter__(self) -> Iterator[MicroBatches | UsageError]:
            try:
                yield from _steps(stream, share, skip)
            except UsageError as error:  # as a value: torch's workers would turn it into text
                yield error

    return Steps()


def _steps(stream: Stream, share: Share, skip: int) -> Iterator[MicroBatches]:
    items = iter(stream)
    for _ in islice(items, skip * share.global_batch_size):
        pass
    while True:
        batch = list(islice(items, share.global_batch_size))
        lengths = np.array([sum(unit["length"] for unit in item) for item in batch])
        parts = share.take(np.arange(len(batch)), lengths if stream.balances else None)
        yield [[unit for i in part for unit in batch[i]] for part in parts]


class StreamLoader:
    """As TrainLoader, for a stream: the length of an epoch is not known."""

    steps_per_epoch: float | None = None

    def __init__(
        self,
        stream: Stream,
        *,
        share: Share,
        workers: Workers | None = None,
        fingerprint: str = "",
    ) -> None:
        """Keep what is needed; nothing is read until it is iterated."""
        self.consumed = 0
        self._stream = stream
        self._share = share
        self._workers = workers or Workers()
        self._fingerprint = fingerprint

    def epoch(self) -> float | None:
        """Return None: unknown."""
        return None

    def __iter__(self) -> Iterator[MicroBatches]:
        """Yield steps from the cursor on, without end."""
        for step in self._source():
            if isinstance(step, UsageError):
                raise step
            self.consumed += 1
            yield step

    def _source(self) -> Iterator[MicroBatches | UsageError]:
        if self._workers.num == 0 or start_method() != "fork":
            return _steps(self._stream, self._share, self.consumed)
        from torch.utils.data import DataLoader  # noqa: PLC0415 - start-up stays light

        return iter(
            DataLoader(
                _iterable(self._stream, self._share, self.consumed),
                batch_size=None,
                num_workers=1,
                prefetch_factor=self._workers.prefetch_factor,
                multiprocessing_context="fork",
                collate_fn=as_is,
            )
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor and what it counts."""
        return {
            "consumed": self.consumed,
            "global_batch_size": self._share.global_batch_size,
            "seed": self._stream.seed,
            "items": None,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was taken. Raises UsageError where it does not fit."""
        check_cursor(state, self.state_dict())
        self.consumed = int(state["consumed"])
