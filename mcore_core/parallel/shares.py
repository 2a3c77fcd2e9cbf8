"""What a loss reports of parts of a batch, put together: sums, largest and smallest numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Reported(Protocol):
    """A LossOutput or Shares."""

    @property
    def metrics(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Name -> (sum, count)."""

    @property
    def highest(self) -> Mapping[str, Tensor]:
        """Name -> a number of which the largest counts."""

    @property
    def lowest(self) -> Mapping[str, Tensor]:
        """Name -> a number of which the smallest counts."""


@dataclass(frozen=True, slots=True)
class Shares:
    """The metrics of some micro-batches, or of parts of one; scalars without gradient, float64."""

    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    highest: dict[str, Tensor] = field(default_factory=dict)
    lowest: dict[str, Tensor] = field(default_factory=dict)

    def add(self, other: Reported) -> None:
        """Take in what another part reports."""
        for name, (total, count) in other.metrics.items():
            a, b = self.metrics.get(name, (0.0, 0.0))
            self.metrics[name] = (a + total.detach().double(), b + count.detach().double())
        for mine, theirs, larger in (
            (self.highest, other.highest, torch.maximum),
            (self.lowest, other.lowest, torch.minimum),
        ):
            for name, value in theirs.items():
                new = value.detach().double()
                mine[name] = larger(mine[name], new) if name in mine else new
