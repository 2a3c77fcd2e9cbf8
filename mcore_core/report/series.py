"""Curves out of metrics.jsonl: points by metric, smoothed and thinned, grouped into panels."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

type Points = list[tuple[int, float]]
"""(step, value), steps ascending; values may be NaN or infinite."""

TITLES = {
    "loss": ("loss", ""),
    "lr": ("learning rate", ""),
    "grad_norm": ("gradient norm", ""),
    "tokens_per_second": ("tokens per second", ""),
    "memory_gib": ("peak memory", "GiB"),
}
"""Metrics that every run has: panel title and unit, in the order of the page."""
HIDDEN = frozenset({"step", "epoch", "tokens", "seconds"})
RESERVED = frozenset(TITLES) | HIDDEN
PER_LAYER = "/layer_"
"""In the names of metrics of single layers: a line each in metrics.jsonl and TensorBoard, too many
for the console and the page."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One small picture."""

    name: str
    title: str
    unit: str
    train: Points
    evaluation: Points
    smooth: bool
    """False for what has no noise: the learning rate, memory."""


def panels(records: Iterable[Mapping[str, Any]]) -> list[Panel]:
    """Return the panels in page order: the common ones, then a recipe's own by name.

    "eval/loss" is drawn into the panel of "loss"; an evaluation metric that training does not have
    gets a panel of its own.
    """
    points: dict[str, Points] = {}
    for record in records:
        for name, value in record.items():
            if name not in HIDDEN and PER_LAYER not in name and isinstance(value, int | float):
                points.setdefault(name, []).append((int(record["step"]), float(value)))
    evals = {n.removeprefix("eval/"): p for n, p in points.items() if n.startswith("eval/")}
    names = {n for n in points if not n.startswith("eval/")} | set(evals)
    ordered = [n for n in TITLES if n in names] + sorted(names - set(TITLES))
    return [
        Panel(
            name,
            *TITLES.get(name, (name.replace("_", " "), "")),
            train=points.get(name, []),
            evaluation=evals.get(name, []),
            smooth=name not in {"lr", "memory_gib"},
        )
        for name in ordered
    ]


def finite(points: Points) -> Points:
    """Return the points that can be drawn."""
    return [(s, v) for s, v in points if math.isfinite(v)]


def smooth(points: Points, *, span: float) -> Points:
    """Return the exponential moving average over about `span` points, without a start-up bias."""
    keep = 1 - 1 / max(span, 1.0)
    total = weight = 0.0
    result: Points = []
    for step, value in points:
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        result.append((step, total / weight))
    return result


def thin(points: Points, limit: int) -> Points:
    """Keep at most about `limit` points: the lowest and the highest of each stretch."""
    if len(points) <= limit:
        return points
    width = math.ceil(2 * len(points) / limit)
    result: Points = [points[0]]
    for start in range(1, len(points) - 1, width):
        part = points[start : min(start + width, len(points) - 1)]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        result.extend(sorted(ends))
    return [*result, points[-1]]


def value_range(values: Sequence[float]) -> tuple[float, float]:
    """Return the range to draw: all values, unless a few spikes would flatten the rest.

    Spikes are cut where the full range is over five times that of the middle 96 percent.
    """
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    edge = len(ordered) // 50
    inner_low, inner_high = ordered[edge], ordered[-1 - edge]
    inner = inner_high - inner_low
    if edge and inner > 0 and high - low > 5 * inner:
        low, high = max(low, inner_low - inner / 2), min(high, inner_high + inner / 2)
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        return low - pad, high + pad
    pad = (high - low) * 0.06
    floor = 0.0 if low >= 0 else -math.inf
    return max(low - pad, floor), high + pad


def ticks(low: float, high: float, about: int) -> list[float]:
    """Return round numbers within the range: steps of 1, 2, 2.5 or 5 times a power of ten."""
    rough = (high - low) / max(about, 1)
    if rough <= 0 or not math.isfinite(rough):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [(first + i) * step for i in range(count)]
