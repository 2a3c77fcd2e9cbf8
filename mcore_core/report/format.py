"""How numbers read on a console and in a report: counts, sizes, durations, metric values."""

import math

GIB = 1024**3


def count(value: float) -> str:
    """Return a whole number with thousands separators: 1,234,567."""
    return f"{round(value):,}"


def short_count(value: float) -> str:
    """Return a count in three digits: 999, 1.23K, 135M, 7.62B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return (
                f"{value / size:.3g}{letter}"
                if abs(value) < 999.5 * size
                else f"{value / size:.0f}{letter}"
            )
    return f"{value:.0f}"


def gib(size: float) -> str:
    """Return a size in bytes as GiB with one decimal."""
    return f"{size / GIB:.1f} GiB"


def size(value: float) -> str:
    """Return a size in bytes in the unit that fits: 812 B, 3.4 MiB, 1.2 GiB."""
    if value < 1024:
        return f"{value:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} TiB"


def duration(seconds: float) -> str:
    """Return h:mm:ss, with days where there are some: 0:03:12, 2d 01:00:00."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02d}:{minutes:02d}:{rest:02d}"


def metric(name: str, value: float) -> str:
    """Return a metric as a log line shows it; the name decides how many digits are worth it."""
    if not math.isfinite(value):
        return str(value)
    if name == "lr" or name.endswith("/lr"):
        return f"{value:.2e}"
    if name == "tokens_per_second":
        return f"{value:.0f}"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.2f}" if name == "grad_norm" else f"{value:.4f}"
    return f"{value:.2e}"
