"""Charts of lines and of dots as SVG, for pages that need nothing but themselves."""

import html
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from dpreg.terminal import printable

_LEFT, _BOTTOM, _MARGIN = 84, 48, 16
_WIDE, _SMALL = (720, 320), (440, 280)
_FEW_POINTS = 40  # as many get dots
_COLOURS = 6
_EMPTY = "Nothing to show."
_EMPTY_FILE = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 240 32"><text y="24">{_EMPTY}</text></svg>\n'
_LARGEST = 1e300  # drawn: differences and powers of ten around larger values are not finite

Points = Sequence[tuple[float, float]]

# Colours by the order of the lines; for light and for dark.
STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --faint: #5d6775; --line: #d7dce3; --paper: #fff;
  --line0: #2463c9; --line1: #c2500f; --line2: #1a7f5a; --line3: #8b3fb8; --line4: #a8790a; --line5: #b8285f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --faint: #9aa5b4; --line: #39424f;
  --paper: #14181e; --line0: #7aaaf7; --line1: #f2a065; --line2: #5cc79c; --line3: #c797e8; --line4: #e3bc55;
  --line5: #f08bb0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; font-weight: 600; margin: 1rem 0 .25rem; }
p { margin: .25rem 0 0; color: var(--faint); }
svg { width: 100%; height: auto; display: block; font: 13px system-ui, sans-serif; }
@media (max-width: 40rem) { svg.wide { font-size: 22px; } }
svg text { fill: var(--faint); } svg .key { font-weight: 600; } .grid { stroke: var(--line); }
.curve { fill: none; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
.ideal { stroke: var(--faint); stroke-dasharray: 5 4; vector-effect: non-scaling-stroke; }
.legend { display: flex; flex-wrap: wrap; column-gap: 1.5rem; color: var(--ink); margin: 0 0 .25rem; }
.legend i { display: inline-block; width: 1.2rem; height: .2rem; margin-right: .4rem; vertical-align: middle; }
"""


def escape(text: str) -> str:
    """The text for HTML and SVG, `printable`: XML has no control characters, and UTF-8 no unpaired surrogates."""
    return html.escape(printable(text))


def page(title: str, body: str, style: str = "") -> str:
    """A whole page; the title is escaped, the body is HTML."""
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>dpreg: {escape(title)}</title>\n<style>{STYLE}{style}</style>\n{body}\n</html>\n"
    )


class _Axis(NamedTuple):
    """From values to shares of an axis' length, and the values that are named on it."""

    scale: Callable[[float], float]
    low: float  # both as `scale` has them
    high: float
    ticks: list[float]

    def share(self, value: float) -> float:
        return (self.scale(value) - self.low) / (self.high - self.low)


def _even(values: Iterable[float], also: float | None = None) -> _Axis:
    """From the least value to the greatest, with round ticks; `also` is one more value to have on it."""
    every = [*values, *([] if also is None else [also])]
    low, high = min(every), max(every)
    if high - low < 1e-9 * max(1.0, abs(low), abs(high)):
        around = max(0.5, 1e-6 * abs(low))
        low, high = low - around, high + around
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if (high - low) / step <= 5)
    ticks = [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return _Axis(float, low, high, ticks)


def _decades(values: Iterable[float]) -> _Axis:
    """Logarithmic: powers of ten are named, or round values between where there are few."""
    every = list(values)
    low, high = math.log10(min(every)), math.log10(max(every))
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    powers = range(math.floor(low), math.ceil(high) + 1)
    for each in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [mark * 10.0**power for power in powers for mark in each]
        ticks = [tick for tick in ticks if low - 1e-9 <= math.log10(tick) <= high + 1e-9]
        if len(ticks) >= 3:
            return _Axis(math.log10, low, high, ticks[:: -(-len(ticks) // 6)])
    return _Axis(math.log10, low, high, [10 ** (low + (high - low) * i / 3) for i in range(4)])


def _doublings(values: Iterable[float]) -> _Axis:
    """From 1 to the greatest value, each twice as far as the one before."""
    powers = int(math.log2(max(values)))
    ticks = [2.0**power for power in range(0, powers + 1, max(1, powers // 6))]
    return _Axis(math.log2, 0.0, max(math.log2(max(values)), 1.0), ticks)


class _Frame:
    """The axes of a chart, and where its points lie."""

    def __init__(self, across: _Axis, up: _Axis, size: tuple[int, int], names: tuple[str, str]):
        self._across, self._up, (self.width, self.height) = across, up, size
        below, beside = names
        self.parts = list[str]()
        for value in up.ticks:
            y = self.down(value)
            self.parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{self.width - _MARGIN}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            self.parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>')
        for value in across.ticks:
            x = self.right(value)
            self.parts.append(f'<text x="{x:.1f}" y="{self.height - 26}" text-anchor="middle">{_short(value)}</text>')
        middle = (_LEFT + self.width) / 2
        self.parts.append(f'<text x="{middle}" y="{self.height - 4}" text-anchor="middle">{escape(below)}</text>')
        if beside:
            at = f'x="12" y="{self.height / 2 - _MARGIN}"'
            turned = f'transform="rotate(-90 12 {self.height / 2 - _MARGIN})"'
            self.parts.append(f'<text {at} {turned} text-anchor="middle">{escape(beside)}</text>')

    def right(self, value: float) -> float:
        return _LEFT + (self.width - _LEFT - _MARGIN) * self._across.share(value)

    def down(self, value: float) -> float:
        return _MARGIN + (self.height - _BOTTOM - _MARGIN) * (1 - self._up.share(value))

    def line(self, points: Points, colour: int, width: int = 2) -> None:
        places = " ".join(f"{self.right(x):.1f},{self.down(y):.1f}" for x, y in points)
        self.parts.append(
            f'<polyline class="curve" stroke="var(--line{colour})" stroke-width="{width}" points="{places}"/>'
        )

    def dots(self, points: Points, colour: int, radius: float = 3, opacity: float = 1) -> None:
        opaque = "" if opacity == 1 else f' fill-opacity="{opacity}"'
        circles = "".join(f'<circle cx="{self.right(x):.1f}" cy="{self.down(y):.1f}" r="{radius}"/>' for x, y in points)
        self.parts.append(f'<g fill="var(--line{colour})"{opaque}>{circles}</g>')

    def ideal(self, begin: tuple[float, float], end: tuple[float, float]) -> None:
        (x1, y1), (x2, y2) = ((f"{self.right(x):.1f}", f"{self.down(y):.1f}") for x, y in (begin, end))
        self.parts.append(f'<line class="ideal" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>')

    def svg(self, label: str) -> str:
        kind = "wide" if self.width == _WIDE[0] else "small"
        return (
            f'<svg class="{kind}" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{html.escape(label)}">{"".join(self.parts)}</svg>'
        )


def picture(series: Mapping[str, Points], across: str, label: str) -> str:
    """A `chart` of lines that may lie on each other, as an SVG file of its own."""
    drawing = chart(series, across, label, covering=True).partition("<svg")[2]
    if not drawing:
        return _EMPTY_FILE
    return _svg_file(drawing, series, _WIDE[0])


def live(
    series: Mapping[str, Points],
    across: str,
    up: str = "",
    limits: tuple[Sequence[float] | None, Sequence[float] | None] = (None, None),
    logarithmic: tuple[bool, bool] = (False, False),
) -> str:
    """Lines that still grow, as an SVG file with a background, as a notebook shows it.

    Args:
      series: points (x, y) by the name of their line; those that are not finite, or outside the limits, are left out.
      across: the name of the x axis; up: of the y axis.
      limits: (lowest, highest) of x and of y; None for those of the points.
      logarithmic: whether x is, whether y is: points that are not above 0 are left out then.
    """

    def fits(value: float, limits: Sequence[float] | None, logarithmic: bool) -> bool:
        within = limits is None or min(limits) <= value <= max(limits)
        return abs(value) < _LARGEST and within and (value > 0 or not logarithmic)

    shown = {
        name: [point for point in points if all(map(fits, point, limits, logarithmic))]
        for name, points in series.items()
    }
    values = [[point[i] for points in shown.values() for point in points] for i in (0, 1)]
    if not values[0]:
        return _EMPTY_FILE
    scales = [
        (_decades if log else _even)(limit or of_axis)
        for log, limit, of_axis in zip(logarithmic, limits, values, strict=True)
    ]
    frame = _Frame(scales[0], scales[1], _SMALL, (across, up))
    frame.parts.insert(0, '<rect width="100%" height="100%" fill="var(--paper)"/>')
    for number, points in enumerate(shown.values()):
        frame.line(points, number % _COLOURS)
        if len(points) <= _FEW_POINTS:
            frame.dots(points, number % _COLOURS)
    ends = ", ".join(f"{name} {points[-1][1]:.4g}" for name, points in shown.items() if points)
    return _svg_file(frame.svg(ends).partition("<svg")[2], shown, _SMALL[0])


def _svg_file(drawing: str, series: Mapping[str, Points], width: int) -> str:
    """A standalone SVG file: `drawing` (all that follows "<svg"), with its colours and the names of its lines."""
    names = "".join(
        f'<tspan style="fill: var(--line{number % _COLOURS})" dx="12">{escape(name)}</tspan>'
        for number, name in enumerate(series)
    )
    key = f'<text class="key" x="{width - _MARGIN}" y="{2 * _MARGIN}" text-anchor="end">{names}</text></svg>'
    opened, rest = drawing.split(">", 1)
    return f'<svg xmlns="http://www.w3.org/2000/svg"{opened}><style>{STYLE}</style>{rest.removesuffix("</svg>")}{key}\n'


def chart(
    series: Mapping[str, Points],
    across: str,
    label: str,
    doubling: bool = False,
    covering: bool = False,
    small: bool = False,
    even: bool = False,
) -> str:
    """Lines over an axis; the other axis is logarithmic where values are above 0 and some ten times as large as others.

    Args:
      series: points (x, y) by the name of their line; those that are not finite, or 1e300 and more, are left out.
      across: the name of the x axis; label: what the chart shows, for those who cannot see it.
      doubling: whether x doubles from point to point: the axis is logarithmic then, and begins at the least.
      covering: whether lines may lie on each other: each is broader than the next, and seen beside it.
      small: whether it is one of several beside each other.
      even: whether the other axis is not logarithmic in any case.
    """
    finite = {
        name: [(x, _drawable(y)) for x, y in points if abs(y) < _LARGEST and abs(x) < _LARGEST]
        for name, points in series.items()
    }
    values = [y for points in finite.values() for _, y in points]
    if not values:
        return f"<p>{_EMPTY}</p>"
    steps = [x for points in finite.values() for x, _ in points]
    last = max(steps) or 1.0  # an exact solution takes no epoch
    frame = _Frame(
        _doublings(steps) if doubling else _even([last], also=0.0),
        _even(values) if even or not 0 < 10 * min(values) <= max(values) else _decades(values),
        _SMALL if small else _WIDE,
        (across, ""),
    )
    for number, points in enumerate(finite.values()):
        frame.line(points, number % _COLOURS, 2 + 4 * (len(finite) - 1 - number) * covering)
        if len(points) <= _FEW_POINTS and not covering:
            frame.dots(points, number % _COLOURS)
    legend = "".join(
        f'<span><i style="background: var(--line{number % _COLOURS})"></i>{escape(name)}</span>'
        for number, (name, points) in enumerate(finite.items())
        if points
    )
    ends = json.dumps({name: points[-1][1] for name, points in finite.items() if points})
    legend = f'<div class="legend">{legend}</div>\n' if len(series) > 1 else ""
    return legend + frame.svg(f"{label}, ending at {ends}")


def _drawable(value: float) -> float:
    """0 for what is so small that a power of ten near it is not a float."""
    return value if abs(value) > 1 / _LARGEST else 0.0


def scatter(points: Points, across: str, up: str, label: str, ideal: str, joined: bool = False) -> str:
    """Dots, and a dashed line where they would ideally lie.

    Args:
      points: (x, y); those that are not finite, or 1e300 and more, are left out.
      across: the name of the x axis; up: of the y axis; label: what is shown, for those who cannot see it.
      ideal: "zero" for y = 0, "equal" for y = x.
      joined: whether the dots are few, and a line joins them.
    """
    points = [(_drawable(x), _drawable(y)) for x, y in points if abs(x) < _LARGEST and abs(y) < _LARGEST]
    if not points:
        return f"<p>{_EMPTY}</p>"
    least, most = min(x for x, _ in points), max(x for x, _ in points)
    frame = _Frame(
        _even([least, most]), _even([y for _, y in points], also=0.0 if ideal == "zero" else None), _SMALL, (across, up)
    )
    heights = [y for _, y in points]
    if ideal == "zero":
        frame.ideal((least, 0.0), (most, 0.0))
    elif (begin := max(least, min(heights))) < (end := min(most, max(heights))):
        frame.ideal((begin, begin), (end, end))
    if joined:
        frame.line(points, 0)
    frame.dots(points, 0, 3 if joined else 2, 1 if joined else 0.5)
    return frame.svg(label)


def _short(value: float) -> str:
    """A number in few characters."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.4g}"
