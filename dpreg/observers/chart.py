"""A chart of lines as SVG, for pages that need nothing but themselves."""

import html
import json
import math
from collections.abc import Mapping, Sequence

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _MARGIN = 720, 320, 84, 48, 16
_FEW_POINTS = 40  # as many get dots
_COLOURS = 6

Points = Sequence[tuple[float, float]]

# Colours by the order of the lines; for light and for dark.
STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --faint: #6b7685; --line: #d7dce3; --paper: #fff;
  --line0: #2463c9; --line1: #c2500f; --line2: #1a7f5a; --line3: #8b3fb8; --line4: #a8790a; --line5: #b8285f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --faint: #9aa5b4; --line: #39424f;
  --paper: #14181e; --line0: #7aaaf7; --line1: #f2a065; --line2: #5cc79c; --line3: #c797e8; --line4: #e3bc55;
  --line5: #f08bb0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0 0; color: var(--faint); }
svg { width: 100%; height: auto; display: block; font: 13px system-ui, sans-serif; }
@media (max-width: 40rem) { svg { font-size: 22px; } }
svg text { fill: var(--faint); } svg .key { font-weight: 600; } .grid { stroke: var(--line); }
.curve { fill: none; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
.legend { display: flex; flex-wrap: wrap; column-gap: 1.5rem; color: var(--ink); margin: 0 0 .25rem; }
.legend i { display: inline-block; width: 1.2rem; height: .2rem; margin-right: .4rem; vertical-align: middle; }
"""


def page(title: str, body: str, style: str = "") -> str:
    """A whole page; the title is escaped, the body is HTML."""
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>dpreg: {html.escape(title)}</title>\n<style>{STYLE}{style}</style>\n{body}\n</html>\n"
    )


def picture(series: Mapping[str, Points], across: str, label: str) -> str:
    """A `chart` of lines that may lie on each other, as an SVG file of its own."""
    _, drawing = chart(series, across, label, covering=True).split("<svg", 1)
    names = "".join(
        f'<tspan style="fill: var(--line{number % _COLOURS})" dx="12">{html.escape(name)}</tspan>'
        for number, name in enumerate(series)
    )
    key = f'<text class="key" x="{_WIDTH - _MARGIN}" y="{2 * _MARGIN}" text-anchor="end">{names}</text></svg>'
    opened, rest = drawing.split(">", 1)
    return f'<svg xmlns="http://www.w3.org/2000/svg"{opened}><style>{STYLE}</style>{rest.removesuffix("</svg>")}{key}\n'


def chart(series: Mapping[str, Points], across: str, label: str, doubling: bool = False, covering: bool = False) -> str:
    """Lines over an axis; the other axis is logarithmic where all values are above 0.

    Args:
      series: points (x, y) by the name of their line; those that are not finite are left out.
      across: the name of the x axis; label: what the chart shows, for those who cannot see it.
      doubling: whether x doubles from point to point: the axis is logarithmic then, and begins at the least.
      covering: whether lines may lie on each other: each is broader than the next, and seen beside it.
    """
    finite = {name: [point for point in points if math.isfinite(point[1])] for name, points in series.items()}
    values = [y for points in finite.values() for _, y in points]
    if not values:
        return "<p>Nothing to show.</p>"
    logarithmic = min(values) > 0
    scale = math.log10 if logarithmic else float
    low, high = scale(min(values)), scale(max(values))
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    last = max(x for points in finite.values() for x, _ in points) or 1.0  # an exact solution takes no epoch

    def right(x: float) -> float:
        share = math.log2(x) / max(math.log2(last), 1) if doubling else x / last
        return _LEFT + (_WIDTH - _LEFT - _MARGIN) * share

    def down(y: float) -> float:
        return _MARGIN + (_HEIGHT - _BOTTOM - _MARGIN) * (high - scale(y)) / (high - low)

    parts = []
    decades = range(math.ceil(low), math.floor(high) + 1, max(1, round((high - low) / 5)))
    whole = logarithmic and len(decades) >= 3
    for value in decades if whole else (low + (high - low) * i / 4 for i in range(5)):
        y = 10.0**value if logarithmic else value
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _MARGIN}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{down(y) + 4:.1f}" text-anchor="end">{_short(y)}</text>')
    ticks = [last * i / 4 for i in range(5)]
    if doubling:
        powers = int(math.log2(last))
        ticks = [2.0**power for power in range(0, powers + 1, max(1, powers // 6))]
    parts += (f'<text x="{right(x):.1f}" y="{_HEIGHT - 26}" text-anchor="middle">{x:.6g}</text>' for x in ticks)
    parts.append(
        f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{html.escape(across)}</text>'
    )
    for number, points in enumerate(finite.values()):
        colour = f"var(--line{number % _COLOURS})"
        line = " ".join(f"{right(x):.1f},{down(y):.1f}" for x, y in points)
        width = 2 + 4 * (len(finite) - 1 - number) * covering
        parts.append(f'<polyline class="curve" stroke="{colour}" stroke-width="{width}" points="{line}"/>')
        if len(points) <= _FEW_POINTS and not covering:
            parts += (f'<circle fill="{colour}" cx="{right(x):.1f}" cy="{down(y):.1f}" r="3"/>' for x, y in points)
    legend = "".join(
        f'<span><i style="background: var(--line{number % _COLOURS})"></i>{html.escape(name)}</span>'
        for number, (name, points) in enumerate(finite.items())
        if points
    )
    ends = json.dumps({name: points[-1][1] for name, points in finite.items() if points})
    return (
        f'<div class="legend">{legend}</div>\n'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(f"{label}, ending at {ends}")}">'
        f"{''.join(parts)}</svg>"
    )


def _short(value: float) -> str:
    """A number in few characters."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
