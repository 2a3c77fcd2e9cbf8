"""Tables of a run as heat maps: each row's shares, even ones pale, used more orange, less blue.

A table holds counts that add up over steps; what is drawn is each cell against an even share of its
row. Cells of one colour are one path: a map of thousands of cells stays small.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from mcore_core.report.format import count

WIDTH, LEFT, TOP, BOTTOM = 1000, 74, 4, 22
TITLES = {"moe/load": ("load of experts", "expert", "share of a layer's choices, even share = 1")}
"""Table -> its title, what its columns are, and what a cell is."""
STEPS = (
    ("none", 0.0, "none"),
    ("low2", 0.5, "below ½"),
    ("low1", 0.8, "½ to ⅘"),
    ("even", 1.25, "even"),
    ("high1", 2.0, "1¼ to 2"),
    ("high2", 4.0, "2 to 4"),
    ("high3", float("inf"), "above 4"),
)
"""CSS class of a cell, the largest value it stands for, and what the legend calls it."""

type Rows = Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class HeatMap:
    """One table, drawn."""

    title: str
    unit: str
    note: str
    legend: tuple[tuple[str, str], ...]
    """(CSS class, text)."""
    svg: str


def heat_maps(records: Iterable[Mapping[str, Any]]) -> list[HeatMap]:
    """Draw the newest of each table in the lines of tables.jsonl."""
    newest: dict[str, tuple[int, int, Rows]] = {}
    for record in records:
        for name, rows in record.get("tables", {}).items():
            newest[name] = (int(record["step"]), int(record.get("steps", 1)), rows)
    return [_draw(name, *found) for name, found in sorted(newest.items())]


def _draw(name: str, step: int, steps: int, rows: Rows) -> HeatMap:
    title, column, unit = TITLES.get(name, (name, "column", "share of a row, even share = 1"))
    shares = {label: _shares(values) for label, values in rows.items()}
    unused = sum(value == 0 for values in shares.values() for value in values)
    span = f"steps {step - steps + 1} to {step}" if steps > 1 else f"step {step}"
    note = f"{span}; highest {max((max(v, default=0) for v in shares.values()), default=0):.2f}"
    if unused:
        note += f"; {count(unused)} unused"
    return HeatMap(
        title=title,
        unit=unit,
        note=note,
        legend=tuple((css, text) for css, _, text in STEPS),
        svg=_svg(title, column, shares),
    )


def _shares(values: Sequence[float]) -> list[float]:
    total = sum(values)
    return [v * len(values) / total if total else 0.0 for v in values]


def kind_of(share: float) -> str:
    """Return the CSS class of a cell."""
    return next(css for css, top, _ in STEPS if share <= top)


def _svg(title: str, column: str, rows: Mapping[str, Sequence[float]]) -> str:
    columns = max((len(v) for v in rows.values()), default=1)
    high = min(26.0, max(9.0, 320 / max(len(rows), 1)))
    wide = (WIDTH - LEFT) / columns
    gap = 1.0 if min(wide, high) > 6 else 0.0
    cells: dict[str, list[str]] = {}
    parts = []
    for index, (label, values) in enumerate(rows.items()):
        y = TOP + index * high
        if len(rows) * high <= 420 or index % 4 == 0:
            parts.append(
                f'<text class="tick" x="{LEFT - 8}" y="{y + high / 2 + 4:.1f}" text-anchor="end">'
                f"{escape(label)}</text>"
            )
        for i, value in enumerate(values):
            cells.setdefault(kind_of(value), []).append(
                f"M{LEFT + i * wide:.1f} {y:.1f}h{wide - gap:.1f}v{high - gap:.1f}"
                f"h{gap - wide:.1f}z"
            )
    parts += [f'<path class="{css}" d="{"".join(found)}"/>' for css, found in sorted(cells.items())]
    bottom = TOP + len(rows) * high
    every = next(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if columns / n <= 32 or n == 128)
    for i in range(0, columns, every):
        parts.append(
            f'<text class="tick" x="{LEFT + (i + 0.5) * wide:.1f}" y="{bottom + 16:.1f}" '
            f'text-anchor="middle">{i}</text>'
        )
    parts.append(
        f'<text class="tick" x="{LEFT - 8}" y="{bottom + 16:.1f}" text-anchor="end">{column}</text>'
    )
    return (
        f'<svg class="heat" viewBox="0 0 {WIDTH} {bottom + BOTTOM:.0f}" role="img" '
        f'aria-label="{escape(title)}">' + "".join(parts) + "</svg>"
    )
