"""Charts of lines and of dots as SVG: where values lie on the axes. The template html/chart.svg draws them."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from dpreg.outputs.pages import render

_WIDE, _SMALL = (720, 320), (440, 280)
_LEFT, _BOTTOM, _MARGIN = 84, 48, 16  # around the lines and dots
_FEW_POINTS = 40  # a line of no more points has dots
_COLOURS = 6
_LARGEST = 1e300  # drawn: differences and powers of ten around larger values are not finite

Points = Sequence[tuple[float, float]]
Limits = Sequence[float] | None


class _Axis(NamedTuple):
    """From values to shares of an axis' length, and the values that are named on it."""

    scale: Callable[[float], float]
    low: float  # both as `scale` has them
    high: float
    ticks: list[float]

    def share(self, value: float) -> float:
        return (self.scale(value) - self.low) / (self.high - self.low)


class _Series(NamedTuple):
    """Points that are drawn alike."""

    name: str
    points: Points
    colour: int = 0
    width: int = 2  # of the line through them; 0 for none
    radius: int = 0  # of a dot at each; 0 for none
    opacity: float = 1  # of the dots


def _even(values: Iterable[float], also: float | None = None) -> _Axis:
    """From the least value to the greatest, with round ticks; `also` is one more value to have on it."""
    every = [*values, *([] if also is None else [also])]
    low, high = min(every), max(every)
    if high - low < 1e-9 * max(1.0, abs(low), abs(high)):
        around = max(abs(low), abs(high)) / 2 or 0.5
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


def _draw(
    template: str,
    series: Sequence[_Series],
    axes: tuple[_Axis, _Axis],
    names: tuple[str, str],
    label: str,
    size: tuple[int, int] = _SMALL,
    ideal: Points = (),
    background: bool = False,
) -> str:
    """Fills in the template, with all points in pixels from the upper left corner of the image.

    Args:
      template: "chart.html" within a page, "chart.svg" for a file.
      axes: of x and of y; names: theirs.
      label: what the chart shows, for those who cannot see it.
      size: width and height of the image in pixels.
      ideal: the ends of a dashed line; empty for none.
      background: whether the image has a background of its own.
    """
    (width, height), (across, up) = size, axes
    right, bottom = width - _MARGIN, height - _BOTTOM

    def to_x(value: float) -> float:
        return round(_LEFT + (right - _LEFT) * across.share(value), 1)

    def to_y(value: float) -> float:
        return round(bottom - (bottom - _MARGIN) * up.share(value), 1)

    return render(
        template,
        series=[one._replace(points=[(to_x(x), to_y(y)) for x, y in one.points]) for one in series],
        ideal=[(to_x(x), to_y(y)) for x, y in ideal],
        across_ticks=[(to_x(value), _short(value)) for value in across.ticks],
        up_ticks=[(to_y(value), _short(value)) for value in up.ticks],
        across=names[0],
        up=names[1],
        label=label,
        kind="wide" if size == _WIDE else "small",
        **{"width": width, "height": height, "left": _LEFT, "right": right, "top": _MARGIN, "bottom": bottom},
        file=template == "chart.svg",
        background=background,
    )


def picture(series: Mapping[str, Points], across: str, label: str) -> str:
    """A `chart` of lines that may lie on each other, as an SVG file of its own."""
    return chart(series, across, label, covering=True, template="chart.svg")


def live(
    series: Mapping[str, Points],
    across: str,
    up: str = "",
    limits: tuple[Limits, Limits] = (None, None),
    logarithmic: tuple[bool, bool] = (False, False),
) -> str:
    """Lines that still grow, as an SVG file with a background, as a notebook shows it.

    Args:
      series: points (x, y) by the name of their line; those that are not finite, or outside the limits, are left out.
      across: the name of the x axis; up: of the y axis.
      limits: (lowest, highest) of x and of y; None for those of the points.
      logarithmic: whether x is, whether y is: points that are not above 0 are left out then.
    """

    def fits(value: float, limits: Limits, logarithmic: bool) -> bool:
        within = limits is None or min(limits) <= value <= max(limits)
        return abs(value) < _LARGEST and within and (value > 1 / _LARGEST or not logarithmic)

    fitting = {
        name: [point for point in points if all(map(fits, point, limits, logarithmic))]
        for name, points in series.items()
    }
    values = [[point[i] for points in fitting.values() for point in points] for i in (0, 1)]
    if not values[0]:
        return render("chart.svg", series=[])
    axes = [
        _decades([*of_axis, *(value for value in limit or () if value > 0)]) if log else _even(limit or of_axis)
        for log, limit, of_axis in zip(logarithmic, limits, values, strict=True)
    ]
    ends = ", ".join(f"{name} {points[-1][1]:.4g}" for name, points in fitting.items() if points)
    return _draw("chart.svg", _lines(fitting), (axes[0], axes[1]), (across, up), ends, background=True)


def _lines(series: Mapping[str, Points]) -> list[_Series]:
    return [
        _Series(name, points, number % _COLOURS, radius=3 if len(points) <= _FEW_POINTS else 0)
        for number, (name, points) in enumerate(series.items())
    ]


def chart(
    series: Mapping[str, Points],
    across: str,
    label: str,
    doubling: bool = False,
    covering: bool = False,
    small: bool = False,
    even: bool = False,
    template: str = "chart.html",
) -> str:
    """Lines over an axis; the other axis is logarithmic where values are above 0 and some ten times as large as others.

    Args:
      series: points (x, y) by the name of their line; those that are not finite, or 1e300 and more, are left out.
      across: the name of the x axis; label: what the chart shows, for those who cannot see it.
      doubling: whether x doubles from point to point: the axis is logarithmic then, and begins at the least.
      covering: whether lines may lie on each other: each is broader than the next, and seen beside it.
      small: whether it is one of several beside each other.
      even: whether the other axis is not logarithmic in any case.
      template: "chart.html" within a page, "chart.svg" for a file.
    """
    finite = {
        name: [(x, _drawable(y)) for x, y in points if abs(y) < _LARGEST and abs(x) < _LARGEST]
        for name, points in series.items()
    }
    values = [y for points in finite.values() for _, y in points]
    if not values:
        return render(template, series=[])
    steps = [x for points in finite.values() for x, _ in points]
    last = max(steps) or 1.0  # an exact solution takes no epoch
    axes = (
        _doublings(steps) if doubling else _even([last], also=0.0),
        _even(values) if even or not 0 < 10 * min(values) <= max(values) else _decades(values),
    )
    lines = _lines(finite)
    if covering:
        lines = [line._replace(width=4 * (len(lines) - i) - 2, radius=0) for i, line in enumerate(lines)]
    ends = json.dumps({name: points[-1][1] for name, points in finite.items() if points})
    size, label = _SMALL if small else _WIDE, f"{label}, ending at {ends}"
    return _draw(template, lines, axes, (across, ""), label, size)


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
        return render("chart.html", series=[])
    wide, high = zip(*points, strict=True)
    axes = _even(wide), _even(high, also=0.0 if ideal == "zero" else None)
    ends: Points = [(min(wide), 0.0), (max(wide), 0.0)]
    if ideal == "equal":
        begin, end = max(min(wide), min(high)), min(max(wide), max(high))
        ends = [(begin, begin), (end, end)] if begin < end else []
    dots = _Series(label, points, radius=3) if joined else _Series(label, points, width=0, radius=2, opacity=0.5)
    return _draw("chart.html", [dots], axes, (across, up), label, ideal=ends)


def _short(value: float) -> str:
    """A number in few characters."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.4g}"
