"""Running numbers of a run: means since the last logged line, tokens per second, time left."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mcore_core.protocols import StepResult


@dataclass(frozen=True, slots=True)
class Means:
    """What one logged line says. Means are over the steps since the previous line."""

    loss: float
    grad_norm: float
    lr: float
    """Of the last step, not a mean."""
    tokens_per_second: float
    """Tokens of these steps by the seconds they took."""
    metrics: Mapping[str, float]
    """A recipe's own, each a mean over the steps that had it."""
    steps: int = 1
    tables: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    """Sums over these steps."""


class Interval:
    """Accumulates steps until `take`, which returns their means and starts again."""

    def __init__(self) -> None:
        self._steps: list[StepResult] = []
        self._metrics: dict[str, list[float]] = {}
        self._tables: dict[str, dict[str, list[float]]] = {}

    def add(self, result: StepResult, metrics: Mapping[str, float]) -> None:
        """Count one step; `metrics` are all of its named values."""
        self._steps.append(result)
        for name, value in metrics.items():
            self._metrics.setdefault(name, []).append(value)
        for name, rows in result.tables.items():
            kept = self._tables.setdefault(name, {})
            for label, values in rows.items():
                before = kept.get(label, [0.0] * len(values))
                kept[label] = [a + b for a, b in zip(before, values, strict=True)]

    @property
    def steps(self) -> int:
        """How many steps `take` would average."""
        return len(self._steps)

    def take(self) -> Means:
        """Return the means since the last call. At least one step must have been added."""
        steps, metrics, tables = self._steps, self._metrics, self._tables
        self._steps, self._metrics, self._tables = [], {}, {}
        seconds = math.fsum(s.seconds for s in steps)
        return Means(
            loss=_mean([s.loss for s in steps]),
            grad_norm=_mean([s.grad_norm for s in steps]),
            lr=steps[-1].lr,
            tokens_per_second=sum(s.tokens for s in steps) / seconds if seconds > 0 else 0.0,
            metrics={name: _mean(values) for name, values in metrics.items()},
            steps=len(steps),
            tables=tables,
        )


class TimeLeft:
    """Estimates the remaining seconds from the duration of the last steps.

    The first step of a process (warm-up, compilation) is left out once there is another.
    """

    def __init__(self, window: int = 50) -> None:
        self._seconds: deque[float] = deque(maxlen=window)
        self._warm = False

    def add(self, seconds: float) -> None:
        """Count one step."""
        if len(self._seconds) == 1 and not self._warm:
            self._seconds.clear()
            self._warm = True
        self._seconds.append(seconds)

    def estimate(self, steps_left: int) -> float:
        """Return the seconds that `steps_left` more steps take; NaN before the first step."""
        if not self._seconds:
            return math.nan
        return max(steps_left, 0) * math.fsum(self._seconds) / len(self._seconds)


def _mean(values: list[float]) -> float:
    # A sum of inf and -inf raises in fsum; NaN and inf must come through as they are.
    return sum(values) / len(values)
