"""report.html: a run, or several beside each other, on one page that needs nothing but itself."""

import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dpreg.config import Config
from dpreg.observers.chart import chart, page, picture

_CURVES = {"train_loss": "training loss", "val_loss": "validation loss", "rows_per_second": "rows per second"}

_STYLE = """
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
th, td { text-align: left; padding: .25rem .5rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
th { font-weight: 400; color: var(--faint); width: 38%; }
.beside { overflow-x: auto; } .beside table { table-layout: auto; white-space: nowrap; }
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
    losses = {title: _curve(records, name) for name, title in _CURVES.items() if name.endswith("loss")}
    speed = {"rows per second": _curve(records, "rows_per_second")}
    body = f"""<h1>{html.escape(config.dataset)}</h1>
<p>{summary["step"]:,} steps on {html.escape(devices)}, reduction {summary["reduction"]}</p>
<h2>Loss</h2>
{chart(losses, "epoch", "loss curves")}
<h2>Rows per second</h2>
{chart(speed, "epoch", "rows per second")}
<div class="columns">
<section><h2>Result</h2>{_table(results)}</section>
<section><h2>Run</h2>{_table(cost)}</section>
<section><h2>Flags</h2>{_table(flags)}</section>
</div>"""
    path.write_text(page(config.dataset, body, _STYLE), encoding="utf-8")


def write_comparison(
    path: pathlib.Path, records: Mapping[str, Sequence[Mapping[str, Any]]], rows: Mapping[str, Sequence[Any]]
) -> None:
    """Writes a page with the curves of several runs, one over the other, and what they reached.

    Or, into an .svg file, a picture of their training losses alone.

    Args:
      records: of each run, by its name, the log points.
      rows: what is compared, by its name: a value for each run.
    """
    if path.suffix == ".svg":
        losses = {run: _curve(of_run, "train_loss") for run, of_run in records.items()}
        path.write_text(picture(losses, "epoch", "training loss"), encoding="utf-8")
        return
    body = "<h1>Runs</h1>"
    for name, title in _CURVES.items():
        curves = {run: _curve(of_run, name) for run, of_run in records.items()}
        if any(curves.values()):
            body += f"<h2>{title.capitalize()}</h2>{chart(curves, 'epoch', title, covering=name.endswith('loss'))}"
    heads = "".join(f"<td>{html.escape(run)}" for run in records)
    cells = (
        f"<tr><th>{html.escape(name)}{''.join(f'<td>{html.escape(shown(value))}' for value in values)}"
        for name, values in rows.items()
    )
    body += f'<h2>Results</h2><div class="beside"><table><tr><th>{heads}{"".join(cells)}</table></div>'
    path.write_text(page("runs", body, _STYLE), encoding="utf-8")


def _curve(records: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(record["epoch"], record[name]) for record in records if record.get(name) is not None]


def _table(values: Mapping[str, Any]) -> str:
    rows = (f"<tr><th>{html.escape(name)}<td>{html.escape(shown(value))}</tr>" for name, value in values.items())
    return f"<table>{''.join(rows)}</table>"


def shown(value: Any) -> str:
    """A value of a summary, for people."""
    match value:
        case None:
            return "none"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.6g}"
        case dict():
            return ", ".join(f"{name} {shown(part)}" for name, part in value.items())
        case list():
            return ", ".join(map(shown, value))
        case _:
            return str(value)
