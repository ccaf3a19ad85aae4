"""A line chart as a picture that stands beside a card: SVG, without scripts.

The page draws its charts itself; a Markdown file can only show a picture. Knows no report.
"""

from __future__ import annotations

from html import escape

from nla_ray.report.rendering.content import LineChart, Series
from nla_ray.report.rendering.vocabulary import spaced

_WIDTH, _HEIGHT = 760, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 180, 40, 50
"""Margins; the legend stands on the right."""
_COLOURS = (
    "#4269d0", "#c9761a", "#d1495b", "#2f8f83", "#6cc5b0", "#9467bd", "#7f6a52", "#8a8f98",
)  # fmt: skip
_TICKS = 5
_FONT = "font-family='sans-serif' font-size='13'"


def line_picture(chart: LineChart) -> str:
    """The chart's lines with their intervals, from 0 to 1 upwards.

    For shares: other values would leave the frame.
    """
    drawn = [series for series in chart.series if _points(series)]
    reach = max(x for series in drawn for x, _, _, _ in _points(series))
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def across(x: float) -> float:
        return round(_LEFT + (right - _LEFT) * x / reach, 1)

    def up(y: float) -> float:
        return round(bottom - (bottom - _TOP) * y, 1)

    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {_HEIGHT}' {_FONT}>",
        f"<rect width='{_WIDTH}' height='{_HEIGHT}' fill='white'/>",
        f"<text x='{_LEFT}' y='24' font-weight='bold'>{escape(chart.label)}</text>",
    ]
    for number in range(_TICKS + 1):
        y = number / _TICKS
        parts.append(f"<path d='M{_LEFT} {up(y)}H{right}' stroke='#ddd'/>")
        parts.append(f"<text x='{_LEFT - 8}' y='{up(y) + 4}' text-anchor='end'>{y:g}</text>")
    for x in range(int(reach) + 1):
        parts.append(f"<text x='{across(x)}' y='{bottom + 18}' text-anchor='middle'>{x}</text>")
    middle = (_LEFT + right) / 2
    label = f"<text x='{middle}' y='{_HEIGHT - 12}' text-anchor='middle'>{escape(chart.x_label)}"
    parts.append(f"{label}</text>")
    for number, series in enumerate(drawn):
        colour, y = _COLOURS[number % len(_COLOURS)], _TOP + 8 + 22 * number
        line = " ".join(f"{across(x)},{up(y)}" for x, y, _, _ in _points(series))
        parts.append(f"<polyline points='{line}' fill='none' stroke='{colour}' stroke-width='2'/>")
        for x, value, low, high in _points(series):
            parts.append(f"<path d='M{across(x)} {up(low)}V{up(high)}' stroke='{colour}'/>")
            parts.append(f"<circle cx='{across(x)}' cy='{up(value)}' r='3' fill='{colour}'/>")
        parts.append(f"<rect x='{right + 20}' y='{y - 8}' width='12' height='12' fill='{colour}'/>")
        parts.append(f"<text x='{right + 38}' y='{y + 3}'>{escape(spaced(series.name))}</text>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def _points(series: Series) -> list[tuple[float, float, float, float]]:
    """x, value, low and high of the points that have a value."""
    found = []
    for point in series.points:
        x, value = point["x"], point["y"]
        if x is not None and value is not None:
            low, high = point.get("low"), point.get("high")
            found.append((x, value, value if low is None else low, value if high is None else high))
    return found
