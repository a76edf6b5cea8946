"""report.html: a run, or several beside each other, on one page that needs nothing but itself."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy

from dpreg.config import Config
from dpreg.outputs.chart import chart, picture, scatter
from dpreg.outputs.pages import render
from dpreg.outputs.workdir import write_whole
from dpreg.solvers.inference import intercept_name

COMPARED_ROWS = 1000  # of which residuals are drawn

_CURVES = {"train_loss": "training loss", "val_loss": "validation loss", "rows_per_second": "rows per second"}
_GROUPS = 10  # of rows, by their prediction, for the calibration
_OF_A_VALUE = ("squared", "huber", "absolute", "quantile")  # losses whose residuals may have a shape
_MOST_TARGETS = 4  # drawn

Pairs = Sequence[tuple[str, Any]]
Records = Sequence[Mapping[str, Any]]


class Compared(NamedTuple):
    """What is predicted and observed of one target for some rows, and their weights: each [n] float64."""

    predicted: np.ndarray
    observed: np.ndarray
    weight: np.ndarray


class _Part(NamedTuple):
    """A section about the fit of a target; `chart` may be empty."""

    heading: str
    text: str
    chart: str = ""


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
    where = "held out" if summary["val_loss"] is not None else "of training: none were held out"
    page = render(
        "report.html",
        title=config.dataset,
        summary=summary,
        devices_used=f"{summary['device_count']} x {summary['device_kind']}",
        **_losses(summary, records, config),
        courses=_courses(records) | _path(summary),
        fits={name: _fit(rows, where, config) for name, rows in list(compared.items())[:_MOST_TARGETS]},
        results=_results(summary),
        parameters=_parameters(summary.get("parameters", {})),
        cost=_cost(summary),
        devices=devices,
        starts=[_start(start) for start in starts],
        audited=_audited(records),
        flags=[line[2:].split("=", 1) for line in config.to_flagfile().splitlines()],
    )
    write_whole(path, page)


def _results(summary: Mapping[str, Any]) -> Pairs:
    errors = summary.get("parameter_error", {})
    return [
        *((f"rows, {name.replace('_', ' ')}", count) for name, count in summary["rows"].items()),
        ("training loss, last epoch", summary["train_loss"]),
        ("validation loss", summary["val_loss"]),
        *summary["metrics"].items(),
        *((f"truth less estimate, {name}", value) for name, value in errors.items()),
        ("parameters, SHA-256", summary["params_sha256"]),
    ]


def _cost(summary: Mapping[str, Any]) -> Pairs:
    return [
        ("steps", summary["step"]),
        ("epochs", summary["epoch"]),
        ("rows per second", summary["rows_per_second"]),
        ("steps per second", summary["steps_per_second"]),
        *((f"seconds, {name}", value) for name, value in summary["seconds"].items()),
        ("devices", f"{summary['device_count']} x {summary['device_kind']}"),
        *(
            (name.replace("_", " "), summary[name])
            for name in ("process_count", "num_shards", "placement", "reduction", "backend")
        ),
        *summary["versions"].items(),
    ]


def _start(start: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "time, UTC": start["time"][:19].replace("T", " "),
        "from step": start["step"],
        "devices": start["device_count"],
        "processes": start["process_count"],
    }


def _losses(summary: Mapping[str, Any], records: Records, config: Config) -> dict[str, Any]:
    """The curves; with the least loss there is, where that is known, also how far they are above it.

    Not with a penalty, which the curves are without, whether it was given or chosen.
    """
    losses = {title: _curve(records, name) for name, title in _CURVES.items() if name.endswith("loss")}
    optimum = summary.get("optimality", {})
    best, gap = optimum.get("best"), optimum.get("gap")
    if best is None or gap is None or config.is_penalized:
        above = []
    else:
        above = [(x, y - best) for x, y in losses[_CURVES["train_loss"]] if y > best]
    title, label = "training loss above the best possible", "training loss less the best possible"
    return {
        "losses": chart(losses, "epoch", "loss curves"),
        "best": best if gap is not None else None,
        "gap": gap,
        "above_best": chart({title: above}, "epoch", label) if len(above) > 1 else "",
    }


def _courses(records: Records) -> dict[str, str]:
    """Charts of what else went with the epochs, as far as it is known, by their titles."""
    drawn = {}
    for name in ("learning_rate", "gradient_norm", "rows_per_second"):
        title, curve = name.replace("_", " "), _curve(records, name)
        if curve:
            drawn[title] = chart({title: curve}, "epoch", title, small=True, even=name != "gradient_norm")
    return drawn


def _path(summary: Mapping[str, Any]) -> dict[str, str]:
    """The held-out losses of a path of penalties, if folds chose one."""
    if "path" not in summary:
        return {}
    strengths, losses = np.array(summary["path"]["strengths"]), summary["path"]["held_out_loss"]
    weaker = np.log10(strengths[0] / strengths).tolist()
    title = "held-out loss by strength of the penalty"
    curve = {title: list(zip(weaker, losses, strict=True))}
    return {title: chart(curve, "powers of ten below the strongest", title, small=True)}


def _fit(compared: Compared, where: str, config: Config) -> list[_Part]:
    """Residuals and calibration of one target, in which a row of weight 2 counts as two."""
    predicted, observed, weight = compared
    residual = observed - predicted
    count = len(residual)
    drawing = scatter(list(zip(predicted, residual, strict=True)), "predicted", "residual", "residuals", "zero")
    parts = [_Part("Residuals", f"Observed less predicted, {count:,} rows {where}.", drawing)]
    if config.loss in _OF_A_VALUE and count > 1 and np.ptp(residual) > 0:
        mean = np.average(residual, weights=weight)
        deviation = np.sqrt(np.average(np.square(residual - mean), weights=weight))
        order = np.argsort(residual, kind="stable")
        normal = scipy.special.ndtri(_shares(weight[order])) * deviation + mean
        drawing = scatter(list(zip(normal, residual[order], strict=True)), "normal", "residual", "quantiles", "equal")
        text = "Their quantiles over those of a normal distribution: on the line where they are normal."
        parts.append(_Part("Shape of the residuals", text, drawing))
    if config.loss == "quantile":
        share = float(np.average(residual <= 0, weights=weight)) if count else float("nan")
        text = f"{share:.3f} of rows, by weight, lie at or below the predicted {config.quantile:g}."
        parts.append(_Part("Calibration", text))
    elif count >= 2 * _GROUPS:
        text = f"Means of {_GROUPS} groups of rows, by prediction: on the line where what is predicted comes true."
        drawing = scatter(calibration(compared), "predicted", "observed", "calibration", "equal", joined=True)
        parts.append(_Part("Calibration", text, drawing))
    return parts


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


def _parameters(parameters: Mapping[str, Any]) -> Pairs:
    """Those of a linear model, by the names of its features where they have some, and the intercept."""
    if not parameters:
        return []
    w = parameters["w"]
    named = w if isinstance(w, Mapping) else {f"w[{at}]": value for at, value in enumerate(w)}
    return [*named.items(), (intercept_name(named), parameters["b"])]


def _audited(records: Records) -> Records:
    """Which epochs used every row once, as the audit found."""
    return [
        {"epoch": f"{record['epoch']:g}", "rows used": record["audit"]["rows"], "sum of tags": record["audit"]["tags"]}
        for record in records
        if "audit" in record
    ]


def write_comparison(path: pathlib.Path, records: Mapping[str, Records], rows: Mapping[str, Sequence[Any]]) -> None:
    """Writes a page with the curves of several runs, one over the other, and what they reached.

    Or, into an .svg file, a picture of their training losses alone.

    Args:
      records: of each run, by its name, the log points.
      rows: what is compared, by its name: a value for each run.
    """
    curves = {name: {run: _curve(of_run, name) for run, of_run in records.items()} for name in _CURVES}
    if path.suffix == ".svg":
        write_whole(path, picture(curves["train_loss"], "epoch", "training loss"))
        return
    charts = {
        title: chart(curves[name], "epoch", title, covering=name.endswith("loss"))
        for name, title in _CURVES.items()
        if any(curves[name].values())
    }
    write_whole(path, render("comparison.html", title="runs", charts=charts, runs=[*records], rows=rows))


def _curve(records: Records, name: str) -> list[tuple[float, float]]:
    return [(record["epoch"], record[name]) for record in records if record.get(name) is not None]
