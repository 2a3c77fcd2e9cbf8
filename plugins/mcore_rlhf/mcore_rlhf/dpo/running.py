"""The running mean of rewards that BCO compares with: recipe state, saved and resumed."""

from typing import Any

import torch
from torch import Tensor


class RunningMean:
    """The mean over micro-batches of their mean, the present one included (BCO, TRL 0.24)."""

    def __init__(self) -> None:
        self.value = torch.zeros((), dtype=torch.float64)
        self._updates = 0

    def update(self, mean: Tensor) -> None:
        """Take in the mean of a micro-batch."""
        self._updates += 1
        before = self.value.to(mean.device)
        self.value = before + (mean.double() - before) / self._updates

    def state_dict(self) -> dict[str, Any]:
        """Return the mean and what it is over."""
        return {"value": float(self.value), "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both."""
        self.value = torch.tensor(state["value"], dtype=torch.float64)
        self._updates = int(state["updates"])
