"""Inline SVG charts, drawn by hand: they need no library, no script and no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 480, 210
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 28
MOST_POINTS = 600

Point = tuple[float, float]


def line_chart(points: Sequence[Point], *, unit: str, from_zero: bool = False) -> str:
    """Return a line over steps as SVG; each point tells its figures when pointed at.

    Args:
        points: (step, value), in order; those that are not finite are left out.
        unit: Said after a value.
        from_zero: Whether the axis begins at 0, and not near the least value.
    """
    points = _thinned([(x, y) for x, y in points if math.isfinite(y)])
    if not points:
        return '<p class="quiet">nothing was logged</p>'
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = _range(min(ys), max(ys), from_zero=from_zero)
    first, last = min(xs), max(*xs, min(xs) + 1)

    def at(point: Point) -> Point:
        x = LEFT + (point[0] - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        y = TOP + (high - point[1]) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    path = " ".join(f"{x},{y}" for x, y in map(at, points))
    dots = "".join(
        _dot(at(point), f"step {point[0]:g}: {short(point[1])} {unit}") for point in points
    )
    end_x, end_y = at(points[-1])
    body = (
        _grid([(at((first, y))[1], short(y)) for y in ticks(low, high, 4)])
        + _steps([(at((x, low))[0], f"{x:g}") for x in ticks(first, last, 5) if x == int(x)])
        + f'<polyline class="line" points="{path}"/>'
        + f'<circle class="end" cx="{end_x}" cy="{end_y}" r="3"/>{dots}'
    )
    return _svg(body, f"{unit} by step, from {short(ys[0])} to {short(ys[-1])}")


def heat_map(rows: dict[str, dict[int, float]]) -> str:
    """Return a table of shaded cells: ``rows[name][column]``, the darker the greater."""
    columns = sorted({column for row in rows.values() for column in row})
    high = max((value for row in rows.values() for value in row.values()), default=0) or 1
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(_cell(row.get(column), f"layer {column}, {name}", high) for column in columns)
        + "</tr>"
        for name, row in rows.items()
    )
    return (
        f'<div class="wide"><table class="heat"><tr><th class="quiet">layer</th>{head}</tr>'
        f'{body}</table><p class="quiet">full colour: {short(high)}</p></div>'
    )


def _cell(value: float | None, name: str, high: float) -> str:
    if value is None:
        return "<td></td>"
    title = escape(f"{name}: {short(value)}")
    return f'<td style="--share:{100 * value / high:.0f}%" title="{title}"></td>'


def short(value: float) -> str:
    """Return a number in few characters: 3.1e-06 as 3.1e-6, 12345 as 12.3k."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:.4g}".replace("e-0", "e-")


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` round numbers from ``low`` to ``high``."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _range(low: float, high: float, *, from_zero: bool) -> tuple[float, float]:
    if from_zero:
        low = 0.0
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low if from_zero else low - margin), high + margin


def _thinned(points: list[Point]) -> list[Point]:
    """Return at most ``MOST_POINTS`` points, each the mean of its neighbours."""
    size = math.ceil(len(points) / MOST_POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _dot(at: Point, title: str) -> str:
    return f'<circle class="dot" cx="{at[0]}" cy="{at[1]}" r="7"><title>{escape(title)}</title></circle>'


def _grid(lines: Sequence[tuple[float, str]]) -> str:
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" text-anchor="end" x="{LEFT - 7}" y="{y + 4:.1f}">{name}</text>'
        for y, name in lines
    )


def _steps(places: Sequence[tuple[float, str]]) -> str:
    return "".join(
        f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{HEIGHT - 9}">{name}</text>'
        for x, name in places
    )


def _svg(body: str, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{body}</svg>'
    )
