"""Which items make up each global batch: a pure function of the step, whatever the layout.

Items are single units, or packs. Epochs follow each other without a gap, so that a global batch
may span two of them and no item is ever left out. Ranks take their shares of the same global
batch: micro-batch j of data-parallel rank r is the items [(j * dp + r) * mbs, +mbs) of it, or,
where it makes no difference to the loss, items of such lengths that ranks wait little for each
other.
Changing the layout, or resuming at another one, therefore never changes what the model sees.

That is also why items are shuffled over the whole set before ranks take their shares, with
`no_data_sharding` true and false alike: fixed parts for each rank would tie the batches to the
layout.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcore_core.data.balance import balanced

type Index = NDArray[np.int64]

MEGABATCH = 50
"""Global batches within which group_by_length sorts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Which part of a global batch one data-parallel rank takes."""

    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    size: int = 1

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of one rank in one step."""
        return self.global_batch_size // (self.micro_batch_size * self.size)

    def take(self, batch: Index, lengths: Index | None = None) -> list[Index]:
        """Return this rank's micro-batches of a global batch.

        With the `lengths` of its items they are divided so that ranks have about the same to do.
        """
        micro, size = self.micro_batch_size, self.size
        if lengths is None:
            return list(batch.reshape(self.num_microbatches, size, micro)[:, self.rank])
        return list(batch[balanced(lengths, micro, rank=self.rank, ranks=size)])


class GlobalBatches:
    """The endless sequence of global batches over `n_items` items. Picklable."""

    def __init__(
        self,
        n_items: int,
        global_batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        lengths: "NDArray[Any] | None" = None,
    ) -> None:
        """Keep the facts.

        Args:
            n_items: Units or packs, at least 1.
            global_batch_size: Items in one global batch.
            seed: Of the permutations.
            shuffle: Permute anew in each epoch; false keeps the order, in every epoch.
            lengths: Tokens of each item, for group_by_length; None does not group.
        """
        if n_items < 1:
            raise ValueError("there are no items")
        self.n_items = n_items
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.lengths = lengths
        self._orders: dict[int, Index] = {}

    @property
    def steps_per_epoch(self) -> float:
        """Global batches in one pass over the items."""
        return self.n_items / self.global_batch_size

    def epoch(self, step: int) -> float:
        """Return how many passes are done after `step` global batches."""
        return step * self.global_batch_size / self.n_items

    def indices(self, step: int) -> Index:
        """Return the items of global batch `step`, from 0."""
        at = step * self.global_batch_size
        stop = at + self.global_batch_size
        parts = []
        while at < stop:
            epoch, start = divmod(at, self.n_items)
            parts.append(self._epoch_order(epoch)[start : start + stop - at])
            at += len(parts[-1])
        return np.concatenate(parts)

    def _epoch_order(self, epoch: int) -> Index:
        if epoch not in self._orders:
            newest = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders = newest | {epoch: self._permutation(epoch)}
        return self._orders[epoch]

    def _permutation(self, epoch: int) -> Index:
        rng = np.random.default_rng([self.seed, 3, epoch])
        order = rng.permutation(self.n_items) if self.shuffle else np.arange(self.n_items)
        if self.lengths is None:
            return order
        batch, mega = self.global_batch_size, self.global_batch_size * MEGABATCH
        grouped = []
        for start in range(0, self.n_items, mega):
            part = order[start : start + mega]
            part = part[np.argsort(-self.lengths[part], kind="stable")]
            batches = [part[i : i + batch] for i in range(0, len(part), batch)]
            if self.shuffle:
                batches = [batches[i] for i in rng.permutation(len(batches))]
            grouped.extend(batches)
        return np.concatenate(grouped)
