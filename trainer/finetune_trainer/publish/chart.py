"""Line charts as plain SVG, without a script: they show in any browser, mail or bucket viewer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 28
MOST_POINTS = 500
TICKS = 5
LARGEST = 1e15
NARROWEST = 1e-12
"""A range that is narrower than this, as a share of its ends, is a point."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line; ``dots`` marks its points, for few of them."""

    name: str
    points: list[Point]
    dots: bool = False


def line_chart(title: str, series: Sequence[Series], x_label: str = "step") -> str:
    """An SVG element. Points that are no numbers, or beyond LARGEST, are left out; without any, an empty text.

    Args:
        series: drawn in this order, in the classes line-0, line-1, …, whose colours the page gives.
    """
    kept = [
        Series(s.name, thinned([p for p in s.points if all(abs(value) <= LARGEST for value in p)]), s.dots)
        for s in series
    ]
    kept = [s for s in kept if s.points]
    if not kept:
        return ""
    xs, ys = ([p[axis] for s in kept for p in s.points] for axis in (0, 1))
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_low, x_high = min(*xs, x_ticks[0]), max(*xs, x_ticks[-1])
    y_low, y_high = min(*ys, y_ticks[0]), max(*ys, y_ticks[-1])

    def x_at(value: float) -> float:
        return LEFT + (value - x_low) / ((x_high - x_low) or 1) * (WIDTH - LEFT - RIGHT)

    def y_at(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_low) / ((y_high - y_low) or 1) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in y_ticks:
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_at(tick):.1f}" y2="{y_at(tick):.1f}"/>'
        )
        parts.append(f'<text class="tick y" x="{LEFT - 6}" y="{y_at(tick) + 4:.1f}">{number(tick)}</text>')
    for tick in x_ticks:
        parts.append(f'<text class="tick x" x="{x_at(tick):.1f}" y="{HEIGHT - 10}">{number(tick)}</text>')
    parts.append(f'<text class="tick y" x="{LEFT - 6}" y="{HEIGHT - 10}">{escape(x_label)}</text>')
    for index, line in enumerate(kept):
        drawn = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in line.points)
        parts.append(
            f'<polyline class="line line-{index}" points="{drawn}"><title>{escape(line.name)}</title></polyline>'
        )
        if line.dots or len(line.points) == 1:
            parts += [
                f'<circle class="dot line-{index}" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="3.5">'
                f"<title>{escape(line.name)}, {escape(x_label)} {number(x)}: {y:.4g}</title></circle>"
                for x, y in line.points
            ]
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float) -> list[float]:
    """Round numbers within the range, about TICKS of them: multiples of 1, 2 or 5 times a power of ten."""
    if high - low <= NARROWEST * max(abs(low), abs(high), NARROWEST):
        return [low]
    rough = (high - low) / TICKS
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)] or [low, high]


def thinned(points: list[Point]) -> list[Point]:
    """At most MOST_POINTS: means of neighbours, and the last as it is."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / (MOST_POINTS - 1))
    groups = [points[start : start + size] for start in range(0, len(points) - 1, size)]
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [*means, points[-1]]


def number(value: float) -> str:
    """``1,200``, ``0.05``, ``2e-05``."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"
