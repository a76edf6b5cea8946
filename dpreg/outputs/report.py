"""report.html: a run, or several beside each other, on one page that needs nothing but itself."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy

from dpreg.config import Config
from dpreg.outputs.chart import chart, escape, page, picture, scatter
from dpreg.outputs.workdir import write_whole
from dpreg.solvers.inference import intercept_name

COMPARED_ROWS = 1000  # of which residuals are drawn

_CURVES = {"train_loss": "training loss", "val_loss": "validation loss", "rows_per_second": "rows per second"}
_GROUPS = 10  # of rows, by their prediction, for the calibration
_OF_A_VALUE = ("squared", "huber", "absolute", "quantile")  # losses whose residuals may have a shape
_MOST_TARGETS = 4  # drawn

_STYLE = """
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
th, td { text-align: left; padding: .25rem .5rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
th { font-weight: 400; color: var(--faint); width: 38%; }
.beside { overflow: auto; max-height: 24rem; } .beside table { table-layout: auto; white-space: nowrap; }
.beside th { width: auto; } .beside.named th { width: 60%; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); column-gap: 3rem; }
"""

Records = Sequence[Mapping[str, Any]]


class Compared(NamedTuple):
    """What is predicted and observed of one target for some rows, and their weights: each [n] float64."""

    predicted: np.ndarray
    observed: np.ndarray
    weight: np.ndarray


def write_report(
    path: pathlib.Path,
    config: Config,
    summary: Mapping[str, Any],
    records: Records,
    starts: Records,
    devices: Records,
    compared: Mapping[str, Compared],
) -> None:
    """Writes the page: curves, fit, results, what was run on what, and how it went.

    Args:
      records: the log points, as in metrics.jsonl.
      starts: when the run was started, as in starts.jsonl.
      devices: what each carried, as of `describe_devices`.
      compared: by the name of a target; none where they are labels.
    """
    on = f"{summary['device_count']} x {summary['device_kind']}"
    results = {
        "training loss, last epoch": summary["train_loss"],
        "validation loss": summary["val_loss"],
        **summary["metrics"],
        **{f"truth less estimate, {name}": value for name, value in summary.get("parameter_error", {}).items()},
        "parameters, SHA-256": summary["params_sha256"],
    }
    history = [
        {
            "time, UTC": start["time"][:19].replace("T", " "),
            "from step": start["step"],
            "devices": start["device_count"],
        }
        | {"processes": start["process_count"]}
        for start in starts
    ]
    cost = {
        "steps": summary["step"],
        "epochs": summary["epoch"],
        "rows per second": summary["rows_per_second"],
        "steps per second": summary["steps_per_second"],
        **{f"seconds, {name}": value for name, value in summary["seconds"].items()},
        "devices": on,
        **{
            name.replace("_", " "): summary[name]
            for name in ("process_count", "num_shards", "placement", "reduction", "backend")
        },
        **summary["versions"],
    }
    flags = dict(line[2:].split("=", 1) for line in config.to_flagfile().splitlines())
    where = "held out" if summary["val_loss"] is not None else "of training: none were held out"
    body = f"""<h1>{escape(config.dataset)}</h1>
<p>{summary["step"]:,} steps on {escape(on)}, reduction {summary["reduction"]}</p>
{_losses(summary, records, config)}
<div class="columns">{_courses(records)}</div>
{"".join(_fit(name, rows, where, config) for name, rows in list(compared.items())[:_MOST_TARGETS])}
<div class="columns">
<section><h2>Result</h2>{_table(results)}{_parameters(summary.get("parameters", {}))}</section>
<section><h2>Run</h2>{_table(cost)}</section>
<section><h2>Devices</h2><p>Each carries some of the run's logical shards.</p>{_rows(devices)}</section>
<section><h2>Starts</h2><p>Each goes on from the step of the newest checkpoint.</p>{_rows(history)}</section>
{_audit(records)}
<section><h2>Flags</h2>{_table(flags)}</section>
</div>"""
    write_whole(path, page(config.dataset, body, _STYLE))


def _losses(summary: Mapping[str, Any], records: Records, config: Config) -> str:
    """The curves; with the least loss there is, where that is known, also how far they are above it.

    Not with a penalty, which the curves are without.
    """
    losses = {title: _curve(records, name) for name, title in _CURVES.items() if name.endswith("loss")}
    body = f"<h2>Loss</h2>{chart(losses, 'epoch', 'loss curves')}"
    optimum = summary.get("optimality", {})
    best, gap = optimum.get("best"), optimum.get("gap")
    if best is None or gap is None:
        return body
    above = [] if config.l2 else [(x, y - best) for x, y in losses[_CURVES["train_loss"]] if y > best]
    text = f"The best possible is {best:.6g}; the trained parameters are {gap:.3%} above it."
    if len(above) < 2:
        return f"{body}<p>{text}</p>"
    return f"{body}<h2>Optimality gap</h2><p>{text}</p>" + chart(
        {"training loss above the best possible": above}, "epoch", "training loss less the best possible"
    )


def _courses(records: Records) -> str:
    """What else went with the epochs, as far as it is known."""
    drawn = []
    for name in ("learning_rate", "gradient_norm", "rows_per_second"):
        title, curve = name.replace("_", " "), _curve(records, name)
        if curve:
            drawing = chart({title: curve}, "epoch", title, small=True, even=name != "gradient_norm")
            drawn.append(f"<section><h2>{title.capitalize()}</h2>{drawing}</section>")
    return "".join(drawn)


def _fit(name: str, compared: Compared, where: str, config: Config) -> str:
    """Residuals and calibration of one target, in which a row of weight 2 counts as two."""
    predicted, observed, weight = compared
    residual = observed - predicted
    count = len(residual)
    of = f"{count:,} rows {where}"
    drawing = scatter(list(zip(predicted, residual, strict=True)), "predicted", "residual", "residuals", "zero")
    parts = [f"<h3>Residuals</h3><p>Observed less predicted, {of}.</p>{drawing}"]
    if config.loss in _OF_A_VALUE and count > 1 and np.ptp(residual) > 0:
        mean = np.average(residual, weights=weight)
        deviation = np.sqrt(np.average(np.square(residual - mean), weights=weight))
        order = np.argsort(residual, kind="stable")
        normal = scipy.special.ndtri(_shares(weight[order])) * deviation + mean
        drawing = scatter(list(zip(normal, residual[order], strict=True)), "normal", "residual", "quantiles", "equal")
        text = "Their quantiles over those of a normal distribution: on the line where they are normal."
        parts.append(f"<h3>Shape of the residuals</h3><p>{text}</p>{drawing}")
    if config.loss == "quantile":
        share = float(np.average(residual <= 0, weights=weight)) if count else float("nan")
        parts.append(
            f"<h3>Calibration</h3><p>{share:.3f} of rows, by weight, "
            f"lie at or below the predicted {config.quantile:g}.</p>"
        )
    elif count >= 2 * _GROUPS:
        means = calibration(compared)
        text = f"Means of {_GROUPS} groups of rows, by prediction: on the line where what is predicted comes true."
        drawing = scatter(means, "predicted", "observed", "calibration", "equal", joined=True)
        parts.append(f"<h3>Calibration</h3><p>{text}</p>{drawing}")
    sections = "".join(f"<section>{part}</section>" for part in parts)
    return f'<h2>Fit of {escape(name)}</h2><div class="columns">{sections}</div>'


def calibration(compared: Compared) -> list[tuple[float, float]]:
    """(mean predicted, mean observed) of up to 10 groups of rows of equal weight, from the least prediction on."""
    order = np.argsort(compared.predicted, kind="stable")
    predicted, observed, weight = (column[order] for column in compared)
    groups = np.minimum(_shares(weight) * _GROUPS, _GROUPS - 1).astype(int)
    total = np.bincount(groups, weight)
    means = (np.bincount(groups, weight * column)[total > 0] / total[total > 0] for column in (predicted, observed))
    return list(zip(*(mean.tolist() for mean in means), strict=True))


def _shares(weight: np.ndarray) -> np.ndarray:
    """The share of all weight [n] that is before the middle of each row."""
    shares: np.ndarray = (np.cumsum(weight) - weight / 2) / weight.sum()
    return shares


def _parameters(parameters: Mapping[str, Any]) -> str:
    """Those of a linear model, by the names of its features where they have some, and the intercept."""
    if not parameters:
        return ""
    w = parameters["w"]
    named = w if isinstance(w, Mapping) else {f"w[{at}]": value for at, value in enumerate(w)}
    rows = [*named.items(), (intercept_name(named), parameters["b"])]
    return f'<h2>Parameters</h2><div class="beside named">{_table(rows)}</div>'


def _audit(records: Records) -> str:
    """Which epochs used every row once, as the audit found."""
    audited = [
        {"epoch": f"{record['epoch']:g}", "rows used": record["audit"]["rows"], "sum of tags": record["audit"]["tags"]}
        for record in records
        if "audit" in record
    ]
    if not audited:
        return ""
    text = "What the steps of each epoch used: every row once, else the run would have ended."
    return f"<section><h2>Audit</h2><p>{text}</p>{_rows(audited)}</section>"


def write_comparison(path: pathlib.Path, records: Mapping[str, Records], rows: Mapping[str, Sequence[Any]]) -> None:
    """Writes a page with the curves of several runs, one over the other, and what they reached.

    Or, into an .svg file, a picture of their training losses alone.

    Args:
      records: of each run, by its name, the log points.
      rows: what is compared, by its name: a value for each run.
    """
    if path.suffix == ".svg":
        losses = {run: _curve(of_run, "train_loss") for run, of_run in records.items()}
        write_whole(path, picture(losses, "epoch", "training loss"))
        return
    body = "<h1>Runs</h1>"
    for name, title in _CURVES.items():
        curves = {run: _curve(of_run, name) for run, of_run in records.items()}
        if any(curves.values()):
            body += f"<h2>{title.capitalize()}</h2>{chart(curves, 'epoch', title, covering=name.endswith('loss'))}"
    heads = "".join(f"<td>{escape(run)}" for run in records)
    cells = (
        f"<tr><th>{escape(name)}{''.join(f'<td>{escape(shown(value))}' for value in values)}"
        for name, values in rows.items()
    )
    body += f'<h2>Results</h2><div class="beside"><table><tr><th>{heads}{"".join(cells)}</table></div>'
    write_whole(path, page("runs", body, _STYLE))


def _curve(records: Records, name: str) -> list[tuple[float, float]]:
    return [(record["epoch"], record[name]) for record in records if record.get(name) is not None]


def _rows(records: Records) -> str:
    """A table with a row for each record."""
    if not records:
        return "<p>None.</p>"
    heads = "".join(f"<th>{escape(name.replace('_', ' '))}" for name in records[0])
    cells = ("".join(f"<td>{escape(shown(value))}" for value in record.values()) for record in records)
    return f'<div class="beside"><table><tr>{heads}{"".join(f"<tr>{row}" for row in cells)}</table></div>'


def _table(values: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> str:
    pairs = values.items() if isinstance(values, Mapping) else values
    rows = (f"<tr><th>{escape(name)}<td>{escape(shown(value))}</tr>" for name, value in pairs)
    return f"<table>{''.join(rows)}</table>"


def shown(value: Any) -> str:
    """A value of a summary, for people."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.6g}"
        case dict():
            return ", ".join(f"{name} {shown(part)}" for name, part in value.items())
        case list():
            return ", ".join(map(shown, value))
        case _:
            return str(value)
