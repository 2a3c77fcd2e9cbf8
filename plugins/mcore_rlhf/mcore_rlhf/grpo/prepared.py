"""A round that is ready to train: completions with all that the loss needs, step by step.

N completions, in the order of the round.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from mcore_core.protocols import Split, StepRun, Unit
from mcore_rlhf.grpo.balance import balanced, of_rank


@dataclass(slots=True)
class Prepared:
    """The same on every rank, so that a checkpoint can be resumed in another layout."""

    units: list[Unit]
    steps: list[list[int]]
    """The numbers of the completions of each optimizer step, iterations one after another."""
    logs: dict[str, float]
    at: int = 0
    """Steps done."""

    def next(self, run: StepRun) -> Split:
        """Return this rank's micro-batches of the next step."""
        on_policy = self.at == 0
        numbers = self.steps[self.at]
        self.at += 1
        micros = [[self.units[i] for i in cell] for cell in cells_of(self.units, numbers, run)]
        if on_policy:  # the ratio is then exactly 1
            micros = [[without_old(unit) for unit in micro] for micro in micros]
        return Split(micros)

    @property
    def done(self) -> bool:
        """Whether every step was handed out."""
        return self.at >= len(self.steps)


def cells_of(units: Sequence[Unit], numbers: Sequence[int], run: StepRun) -> list[list[int]]:
    """Return the completions of each of this rank's micro-batches of a step."""
    cells = balanced([units[i]["length"] for i in numbers], run.micro_batches * run.dp[1])
    return [[numbers[i] for i in cell] for cell in of_rank(cells, run.dp)]


def without_old(unit: Unit) -> Unit:
    """Return the completion without the log-probabilities that its ratio is measured from."""
    return {key: value for key, value in unit.items() if key != "old"}


def divide(size: int, steps: int, iterations: int, rng: np.random.Generator) -> list[list[int]]:
    """Return the completions of each optimizer step of a round of `size`.

    With one step it is the whole round. With more, the completions are shuffled first: a step then
    has some of many groups. Each iteration has the same steps again.
    """
    order = np.arange(size) if steps == 1 else rng.permutation(size)
    bounds = [i * size // steps for i in range(steps + 1)]
    once = [sorted(order[a:b].tolist()) for a, b in pairwise(bounds)]
    return once * iterations


def to_state(value: Any) -> Any:  # noqa: ANN401
    """Return the same with tensors for arrays: what a checkpoint holds."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: to_state(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_state(v) for v in value]
    return value


def from_state(value: Any) -> Any:  # noqa: ANN401
    """Undo to_state; tuples come back as lists."""
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, Mapping):
        return {key: from_state(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [from_state(v) for v in value]
    return value
