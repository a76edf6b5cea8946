"""report.html: the run on one page that needs nothing but itself."""

import html
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dpreg.config import Config

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _MARGIN = 720, 320, 84, 48, 16
_SERIES = (("train_loss", "training loss"), ("val_loss", "validation loss"))

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --faint: #6b7685; --line: #d7dce3; --paper: #fff;
  --train_loss: #2463c9; --val_loss: #c2500f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --faint: #9aa5b4; --line: #39424f;
  --paper: #14181e; --train_loss: #7aaaf7; --val_loss: #f2a065; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0 0; color: var(--faint); }
svg { width: 100%; height: auto; display: block; font: 13px system-ui, sans-serif; }
@media (max-width: 40rem) { svg { font-size: 22px; } }
svg text { fill: var(--faint); } .grid { stroke: var(--line); }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.train_loss { stroke: var(--train_loss); } .val_loss { stroke: var(--val_loss); }
.dot.train_loss { fill: var(--train_loss); } .dot.val_loss { fill: var(--val_loss); }
.legend { display: flex; gap: 1.5rem; color: var(--ink); margin: 0 0 .25rem; }
.legend i { display: inline-block; width: 1.2rem; height: .2rem; margin-right: .4rem; vertical-align: middle; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
th, td { text-align: left; padding: .25rem .5rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
th { font-weight: 400; color: var(--faint); width: 38%; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); column-gap: 3rem; }
"""


def write_report(
    path: pathlib.Path, config: Config, summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> None:
    """Writes the page: curves, results, what was run on what.

    Args:
      records: the log points, as in metrics.jsonl.
    """
    devices = f"{summary['device_count']} x {summary['device_kind']}"
    results = {
        "training loss, last epoch": summary["train_loss"],
        "validation loss": summary["val_loss"],
        **summary["metrics"],
        **{
            f"{group.replace('_', ' ')}: {name}": value
            for group in ("parameters", "parameter_error")
            for name, value in summary.get(group, {}).items()
        },
        "parameters, SHA-256": summary["params_sha256"],
    }
    cost = {
        "steps": summary["step"],
        "epochs": summary["epoch"],
        "rows per second": summary["rows_per_second"],
        "steps per second": summary["steps_per_second"],
        **{f"seconds, {name}": value for name, value in summary["seconds"].items()},
        "devices": devices,
        **{
            name.replace("_", " "): summary[name]
            for name in ("process_count", "num_shards", "placement", "reduction", "backend")
        },
        **summary["versions"],
    }
    flags = dict(line[2:].split("=", 1) for line in config.to_flagfile().splitlines())
    body = f"""<h1>{html.escape(config.dataset)}</h1>
<p>{summary["step"]:,} steps on {html.escape(devices)}, reduction {summary["reduction"]}</p>
<h2>Loss</h2>
{_curves(records)}
<div class="columns">
<section><h2>Result</h2>{_table(results)}</section>
<section><h2>Run</h2>{_table(cost)}</section>
<section><h2>Flags</h2>{_table(flags)}</section>
</div>"""
    path.write_text(
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>dpreg: {html.escape(config.dataset)}</title>\n<style>{_STYLE}</style>\n{body}\n</html>\n",
        encoding="utf-8",
    )


def _table(values: Mapping[str, Any]) -> str:
    rows = (f"<tr><th>{html.escape(name)}<td>{html.escape(_shown(value))}</tr>" for name, value in values.items())
    return f"<table>{''.join(rows)}</table>"


def _shown(value: Any) -> str:
    match value:
        case None:
            return "none"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.6g}"
        case dict():
            return ", ".join(f"{name} {_shown(part)}" for name, part in value.items())
        case list():
            return ", ".join(map(_shown, value))
        case _:
            return str(value)


def _curves(records: Sequence[Mapping[str, Any]]) -> str:
    """The loss curves over epochs as SVG; the loss axis is logarithmic where all losses are above 0."""
    series = {
        name: [(r["epoch"], r[name]) for r in records if r.get(name) is not None and math.isfinite(r[name])]
        for name, _ in _SERIES
    }
    losses = [loss for points in series.values() for _, loss in points]
    if not losses:
        return "<p>No log point.</p>"
    logarithmic = min(losses) > 0
    scale = math.log10 if logarithmic else float
    low, high = scale(min(losses)), scale(max(losses))
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    last = max(r["epoch"] for r in records) or 1.0  # an exact solution takes no epoch

    def across(epoch: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _MARGIN) * epoch / last

    def down(loss: float) -> float:
        return _MARGIN + (_HEIGHT - _BOTTOM - _MARGIN) * (high - scale(loss)) / (high - low)

    parts = []
    decades = range(math.ceil(low), math.floor(high) + 1, max(1, round((high - low) / 5)))
    whole = logarithmic and len(decades) >= 3
    for value in decades if whole else (low + (high - low) * i / 4 for i in range(5)):
        loss = 10.0**value if logarithmic else value
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _MARGIN}" y1="{down(loss):.1f}" y2="{down(loss):.1f}"/>'
        )
        parts.append(f'<text x="{_LEFT - 8}" y="{down(loss) + 4:.1f}" text-anchor="end">{loss:.3g}</text>')
    for i in range(5):
        epoch = last * i / 4
        parts.append(f'<text x="{across(epoch):.1f}" y="{_HEIGHT - 26}" text-anchor="middle">{epoch:.3g}</text>')
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">epoch</text>')
    for name, points in series.items():
        line = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="curve {name}" points="{line}"/>')
        if len(points) <= 40:
            parts += (f'<circle class="dot {name}" cx="{across(x):.1f}" cy="{down(y):.1f}" r="3"/>' for x, y in points)
    legend = "".join(f'<span><i style="background: var(--{n})"></i>{text}</span>' for n, text in _SERIES if series[n])
    label = html.escape(json.dumps({name: points[-1][1] for name, points in series.items() if points}))
    return (
        f'<div class="legend">{legend}</div>\n'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="loss curves, ending at {label}">'
        f"{''.join(parts)}</svg>"
    )
