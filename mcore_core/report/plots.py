"""Panels as inline SVG: faint raw line, smoothed line, evaluations as dots; colours are CSS's.

Everything is drawn here rather than by a plotting library, so that a picture follows the page's
light or dark scheme, stays sharp at any size and costs no import.
"""

from dataclasses import dataclass
from html import escape

from mcore_core.report.format import count, metric, short_count
from mcore_core.report.series import Panel, Points, finite, smooth, thin, ticks, value_range

WIDTH, HEIGHT = 380, 204
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
MAX_POINTS = 500


@dataclass(frozen=True, slots=True)
class Picture:
    """One panel, drawn."""

    title: str
    unit: str
    last: str
    """The newest value (of the smoothed line where there is one)."""
    evaluation: str
    """The newest evaluation; empty without any."""
    warning: str
    """About values that are not finite; empty without any."""
    note: str
    """About spikes that are cut; empty without any."""
    svg: str


@dataclass(frozen=True, slots=True)
class _Scale:
    x: tuple[float, float]
    y: tuple[float, float]

    def px(self, step: float) -> float:
        low, high = self.x
        return LEFT + (step - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def py(self, value: float) -> float:
        low, high = self.y
        y = TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return min(max(y, -HEIGHT), 2.0 * HEIGHT)  # clipped anyway; browsers dislike huge numbers

    def path(self, points: Points) -> str:
        return " ".join(f"{self.px(s):.1f},{self.py(v):.1f}" for s, v in points)


def draw(panel: Panel, steps: tuple[int, int]) -> Picture | None:
    """Draw a panel over the run's first and last step; None where nothing finite is there."""
    raw, evaluation = finite(panel.train), finite(panel.evaluation)
    if not raw and not evaluation:
        return None
    y = value_range([v for _, v in raw + evaluation])
    inside = [(s, min(max(v, y[0]), y[1])) for s, v in raw]  # a spike must not drag the line along
    smoothed = smooth(inside, span=max(len(raw) / 40, 4)) if panel.smooth and len(raw) > 8 else []
    scale = _Scale((steps[0], max(steps[1], steps[0] + 1)), y)
    last = (smoothed or raw)[-1][1] if raw else evaluation[-1][1]
    lost = [s for s, v in panel.train + panel.evaluation if not _is_finite(v)]
    cut = sum(not y[0] <= v <= y[1] for _, v in raw + evaluation)
    return Picture(
        title=panel.title,
        unit=panel.unit,
        last=_show(panel.name, last),
        evaluation=_show(panel.name, evaluation[-1][1]) if evaluation and raw else "",
        warning=f"{count(len(lost))} not finite, first at step {lost[0]}" if lost else "",
        note=f"{count(cut)} outside the picture" if cut else "",
        svg=_svg(panel, scale, raw, smoothed, evaluation),
    )


def _svg(panel: Panel, scale: _Scale, raw: Points, smoothed: Points, evaluation: Points) -> str:
    clip = "c-" + "".join(c if c.isalnum() else "-" for c in panel.name)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(panel.title)} by step"'
        f' data-x="{scale.x[0]:g} {scale.x[1]:g}" data-y="{scale.y[0]:.9g} {scale.y[1]:.9g}"'
        f' data-box="{LEFT} {TOP} {WIDTH - RIGHT} {HEIGHT - BOTTOM}">',
        f'<clipPath id="{clip}"><rect x="{LEFT}" y="{TOP - 4}" width="{WIDTH - LEFT - RIGHT + 6}"'
        f' height="{HEIGHT - TOP - BOTTOM + 8}"/></clipPath>',
        *_axes(scale),
        f'<g clip-path="url(#{clip})">',
    ]
    if len(raw) == 1:
        parts.append(_dot("dot", scale, raw[0]))
    elif raw:
        kind = "raw" if smoothed else "line"
        parts.append(f'<polyline class="{kind}" points="{scale.path(thin(raw, MAX_POINTS))}"/>')
    if smoothed:
        points = scale.path(thin(smoothed, MAX_POINTS))
        parts.append(f'<polyline class="line" points="{points}"/>')
    if len(evaluation) > 1:
        points = scale.path(thin(evaluation, MAX_POINTS))
        parts.append(f'<polyline class="eval" points="{points}"/>')
    parts += [_dot("evaldot", scale, p) for p in thin(evaluation, 60)]
    lost = [scale.px(s) for s, v in panel.train if not _is_finite(v)]
    parts += [
        f'<line class="lost" x1="{x:.1f}" x2="{x:.1f}" y1="{HEIGHT - BOTTOM - 8}"'
        f' y2="{HEIGHT - BOTTOM}"/>'
        for x in sorted({round(x) for x in lost})
    ]
    return "".join([*parts, "</g></svg>"])


def _axes(scale: _Scale) -> list[str]:
    parts = []
    y_ticks = ticks(*scale.y, about=5)
    for value, label in zip(y_ticks, _labels(y_ticks), strict=True):
        y = scale.py(value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for value in ticks(*scale.x, about=5):
        if value != int(value):
            continue
        x = scale.px(value)
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        text = short_count(value) if value >= 10000 else f"{value:.0f}"
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{text}</text>'
        )
    return parts


def _labels(values: list[float]) -> list[str]:
    """Return tick labels with the same number of decimals each."""
    top = max(abs(v) for v in values)
    if top >= 10000:
        return [short_count(v) if v else "0" for v in values]
    if 0 < top < 1e-3:
        return [f"{v:.1e}".replace("e-0", "e-") if v else "0" for v in values]
    step = values[1] - values[0] if len(values) > 1 else top or 1.0
    places = next((p for p in range(7) if _is_round(step * 10**p)), 6)
    return [f"{v:.{places}f}" for v in values]


def _is_round(value: float) -> bool:
    return abs(value - round(value)) < 1e-6 * max(abs(value), 1.0)


def _is_finite(value: float) -> bool:
    return value - value == 0


def _dot(kind: str, scale: _Scale, point: tuple[int, float]) -> str:
    x, y = scale.px(point[0]), scale.py(point[1])
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'


def _show(name: str, value: float) -> str:
    match name:
        case "tokens_per_second":
            return count(value)
        case "memory_gib":
            return f"{value:.1f}"
        case _:
            return metric(name, value) if value else "0"
