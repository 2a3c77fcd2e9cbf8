"""Hand out each step's micro-batches of units on one rank, in worker processes where asked for.

What is loaded for a step depends on the step alone, so that any number of workers gives the same
batches, and the cursor of a resume is the number of global batches consumed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from mcore_core.data.processes import start_method
from mcore_core.data.sampler import GlobalBatches, Share
from mcore_core.errors import UsageError, usage_error
from mcore_core.protocols import Unit

if TYPE_CHECKING:
    from numpy.typing import NDArray

type MicroBatches = list[list[Unit]]
"""num_microbatches lists of units: one rank's part of a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """The worker options of torch's DataLoader."""

    num: int = 0
    prefetch_factor: int = 2
    persistent: bool = True


class Items(Sequence[list[Unit]]):
    """What the sampler draws: single units, or packs of them."""

    def __init__(self, units: Sequence[Unit], packs: list[list[int]] | None = None) -> None:
        self.units = units
        self.packs = packs

    def __len__(self) -> int:
        return len(self.units) if self.packs is None else len(self.packs)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if self.packs is None:
            return [self.units[index]]
        return [self.units[i] for i in self.packs[index]]


class _Steps:
    """A map-style dataset whose index is the step."""

    def __init__(
        self,
        items: Items,
        batches: GlobalBatches,
        share: Share,
        lengths: "NDArray[np.int64] | None" = None,
    ) -> None:
        self._items = items
        self._batches = batches
        self._share = share
        self._lengths = lengths

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, step: int) -> MicroBatches:
        batch = self._batches.indices(step)
        lengths = None if self._lengths is None else self._lengths[batch]
        parts = self._share.take(batch, lengths)
        return [[unit for i in part for unit in self._items[int(i)]] for part in parts]


class _Guarded:
    """Hands a user's error over as a value: torch's workers would turn it into text."""

    def __init__(self, steps: _Steps) -> None:
        self._steps = steps

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, step: int) -> MicroBatches | UsageError:
        try:
            return self._steps[step]
        except UsageError as error:
            return error


class _Endless:
    """The steps from `start` on."""

    def __init__(self, start: int) -> None:
        self._start = start

    def __iter__(self) -> Iterator[int]:
        return count(self._start)

    def __len__(self) -> int:
        return 2**62


class TrainLoader:
    """The endless sequence of this rank's steps, with a cursor."""

    def __init__(
        self,
        items: Items,
        batches: GlobalBatches,
        *,
        share: Share,
        workers: Workers | None = None,
        fingerprint: str = "",
        lengths: "NDArray[np.int64] | None" = None,
    ) -> None:
        """Keep what is needed; nothing is started until it is iterated.

        `lengths` are the items' tokens where ranks are to have about the same to do.
        """
        self.batches = batches
        self.num_items = len(items)
        self.consumed = 0
        """Global batches handed out."""
        self._share = share
        self._workers = workers or Workers()
        self._fingerprint = fingerprint
        self._steps = _Steps(items, batches, share, lengths)

    @property
    def steps_per_epoch(self) -> float | None:
        """Optimizer steps in one pass over the data."""
        return self.batches.steps_per_epoch

    def epoch(self) -> float | None:
        """Return how many passes have been handed out."""
        return self.batches.epoch(self.consumed)

    def __iter__(self) -> Iterator[MicroBatches]:
        """Yield steps from the cursor on, without end."""
        if self._workers.num == 0:
            source: Iterator[MicroBatches | UsageError] = map(
                self._steps.__getitem__, count(self.consumed)
            )
        else:
            source = iter(self._torch_loader())
        for step in source:
            if isinstance(step, UsageError):
                raise step
            self.consumed += 1
            yield step

    def _torch_loader(self) -> Any:  # noqa: ANN401
        from torch.utils.data import DataLoader  # noqa: PLC0415 - start-up stays light

        return DataLoader(
            _Guarded(self._steps),  # type: ignore[arg-type]
            sampler=_Endless(self.consumed),
            batch_size=None,
            num_workers=self._workers.num,
            prefetch_factor=self._workers.prefetch_factor,
            persistent_workers=self._workers.persistent,
            multiprocessing_context=start_method(),
            collate_fn=as_is,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor and what it counts."""
        return {
            "consumed": self.consumed,
            "global_batch_size": self._share.global_batch_size,
            "seed": self.batches.seed,
            "items": self.num_items,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was taken.

        Raises:
            UsageError: The data or the global batch size are others than they were.
        """
        check_cursor(state, self.state_dict())
        self.consumed = int(state["consumed"])


class EvalLoader:
    """The validation data, in order: whole global batches, the same in every evaluation."""

    def __init__(self, items: Items, *, share: Share, iters: int = -1) -> None:
        """Take `iters` global batches, or as many as there are with -1."""
        self.num_items = len(items)
        whole = self.num_items // share.global_batch_size
        self.iters = whole if iters < 0 else min(iters, whole)
        batches = GlobalBatches(
            n_items=max(1, self.num_items),
            global_batch_size=share.global_batch_size,
            shuffle=False,
        )
        self._steps = _Steps(items, batches, share)

    def __len__(self) -> int:
        return self.iters

    def __iter__(self) -> Iterator[MicroBatches]:
        """Yield one evaluation."""
        return map(self._steps.__getitem__, range(self.iters))


def check_cursor(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise a UsageError where a saved cursor counts other batches than this run's."""
    names = {
        "global_batch_size": "--global_batch_size",
        "seed": "--data_seed",
        "items": "the number of samples",
        "fingerprint": "the content of the data, the tokenizer or an option that encodes",
    }
    differ = [key for key in names if saved.get(key) != now.get(key)]
    if differ:
        raise usage_error(
            "MC420",
            "the checkpoint's position in the data does not fit this run's data",
            *(f"{names[k]}: it was {saved.get(k)}, it is {now.get(k)}" for k in differ),
            "fix: restore what changed, or --finetune true to begin the data anew",
        )


def as_is[T](value: T) -> T:
    """Return the value: units are collated by the recipe, in the training process."""
    return value


def item_lengths(items: Items, lengths: "NDArray[np.int64]") -> "NDArray[np.int64]":
    """Return the tokens of each item, given those of each unit."""
    if items.packs is None:
        return lengths
    return np.array([int(lengths[pack].sum()) for pack in items.packs])
