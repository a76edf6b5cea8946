"""Describes a finished run for summary.json: its results, its speed, and its environment."""

import dataclasses
import hashlib
import importlib.metadata
import platform
from typing import Any

import jax
import numpy as np

from dpreg.config import Config
from dpreg.data.sources import RegressionData
from dpreg.data.synthetic import SyntheticRegressionData
from dpreg.models.linear import linear_parameters
from dpreg.solvers.elastic_net import Path
from dpreg.solvers.fit import Fit
from dpreg.solvers.inference import UNSEEN, Coefficient, Summary, summarize_fit
from dpreg.spelling import spell
from dpreg.tables.standalone import are_codes, label_text
from dpreg.train.trainer import Trainer

_MOST_OF_PATH = 1 << 14  # weights that are written: of so few features, for each strength


def summarize(trainer: Trainer, data: RegressionData, reading: float = 0.0) -> dict[str, Any]:
    """The summary of a finished run, as values for JSON.

    - `best_step`: with early stopping, the step of the parameters with the lowest validation loss.
    - `target_transform`: "log" if the model predicts the logarithm of the target; its parameters are for that.
    - `labels`: those of the target, in the order of the classes, if they are not the numbers 0 to C - 1.
    - `rows`: the numbers of rows that are fitted, held out, and left out.
    - `exchange_bytes`: the bytes that a step sums over devices, if there are several.
    - `train_loss`: the mean over the last epoch.
    - `rows_per_second`: the speed of training alone, without ingest, compilation, evaluation, and the steps before a
      resume; 0 if this process trained no step.

    Args:
      trainer: the trainer, after the last step.
      data: the data that it was trained on.
      reading: seconds spent to read the rows before `trainer` got them, which count as ingest.
    """
    settings, loop = trainer.settings, trainer.loop
    steps_per_epoch = trainer.train.sampler.steps_per_epoch
    steps_per_second = loop.steps_trained / trainer.seconds["train"] if loop.steps_trained else 0.0
    return {
        "step": trainer.step,
        "epoch": trainer.step / steps_per_epoch,
        **({"best_step": loop.best.step} if settings.patience else {}),
        "train_loss": trainer.train_loss,
        "val_loss": trainer.val_loss,
        "metrics": trainer.metrics,
        **({"labels": list(data.schema.labels)} if data.schema and not are_codes(data.schema.labels) else {}),
        "rows": count_rows(data),
        **describe_parameters(trainer.state.params, data),
        "params_sha256": params_sha256(trainer.state.params),
        "rows_per_second": steps_per_second * len(data.train) / steps_per_epoch,
        "steps_per_second": steps_per_second,
        "seconds": trainer.seconds | {"ingest": reading + trainer.seconds["ingest"]},
        "device_count": trainer.mesh.size,
        "device_kind": trainer.mesh.devices.flat[0].device_kind,
        "process_count": jax.process_count(),
        "num_shards": settings.num_shards,
        "placement": trainer.train.resolved_placement,
        "reduction": settings.reduction,
        "backend": settings.backend,
        "exchange_bytes": trainer.exchange_bytes,
        "versions": {"python": platform.python_version(), **package_versions()},
    }


def count_rows(data: RegressionData) -> dict[str, int]:
    """The numbers of rows that are fitted and held out, and of those of a table that are left out, by the reason."""
    return {"fitted": len(data.train), "held_out": len(data.val) if data.val else 0, **data.left_out}


def describe_devices(trainer: Trainer) -> list[dict[str, Any]]:
    """For each device of the run: its process, its logical shards, and its number of training rows."""
    slots, sampler = trainer.train.slots, trainer.train.sampler
    described = []
    for number, device in enumerate(trainer.mesh.devices.flat):
        first, end = (min(at * slots, trainer.settings.num_shards) for at in (number, number + 1))
        shards = "none" if first == end else f"{first}" if end - first == 1 else f"{first} to {end - 1}"
        rows = int(sampler.shard_start(end) - sampler.shard_start(first))
        described.append({"device": number, "process": device.process_index, "shards": shards, "rows": rows})
    return described


def describe_parameters(params: Any, data: RegressionData) -> dict[str, Any]:
    """`parameters` of a linear model in the units of the data, and `parameter_error` if the true ones are known.

    `w` maps the names of the features, if there are names, to numbers, otherwise it is a list. `b` is a number. For
    several targets or classes, each of these numbers is a list; or a mapping by the names of the labels if the classes
    have them.
    """
    linear = linear_parameters(params)
    if linear is None:
        return {}
    w, b = linear
    result: dict[str, Any] = {"target_transform": "log"} if data.schema and data.schema.log_targets else {}
    result["parameters"] = _name_parameters(w, b, data)
    if isinstance(data, SyntheticRegressionData) and w.size == np.size(data.w):
        error_w, error_b = np.asarray(data.w) - w.reshape(data.w.shape), np.asarray(data.b) - b
        result["parameter_error"] = {
            "w": error_w.tolist(),
            "b": float(error_b[0]) if w.shape[1] == 1 else error_b.tolist(),
        }
    return result


def _name_parameters(w: np.ndarray, b: np.ndarray, data: RegressionData) -> dict[str, Any]:
    """Converts parameters w [d, t] and b [t] to the units of the data, with the names of its columns."""
    if data.schema is not None:
        w, b = data.schema.parameters(w, b)
    labels = data.schema.labels if data.schema else ()

    def named(row: np.ndarray) -> Any:
        if len(row) == 1:
            return float(row[0])
        if are_codes(labels):
            return row.tolist()
        return dict(zip(map(label_text, labels), row.tolist(), strict=True))

    weights = [named(row) for row in w]
    return {
        "w": weights if data.schema is None else dict(zip(data.schema.features, weights, strict=True)),
        "b": named(b),
    }


def describe_optimum(params: Any, data: RegressionData, fit: Fit) -> dict[str, Any]:
    """Compares a linear model with the least-squares solution `fit` on the training rows, in the units of the data.

    - `loss`, `best`: the penalised squared loss of the model, and that of the solution.
    - `gap`: (loss - best) / best.
    - `parameters`: those of the solution.
    - `base_levels`: the features of base levels, with which the other levels of a category are compared.
    - `not_used`: the other features that are constant, or combinations of others; unknown with l1, which may use any.
    - `standard_errors`: those of the solution, if there is no penalty.
    """
    (w, b), names = linear_parameters(params) or (np.zeros(0), np.zeros(0)), feature_names(data)
    result: dict[str, Any] = {}
    if fit.dispersion is None:
        loss, best = (
            fit.triangle.loss(weights, bias)
            + float(fit.l1 * np.abs(weights).sum() + fit.l2 / 2 * np.square(weights).sum())
            for weights, bias in ((w.astype(np.float64), b.astype(np.float64)), (fit.w, fit.b))
        )
        result = {"loss": loss, "best": best, "gap": (loss - best) / best if best > 0 else None}
    result["parameters"] = _name_parameters(fit.w, fit.b, data)
    result["base_levels"] = [names[j] for j in fit.left_out]
    explained = {*fit.kept, *fit.left_out, *fit.infinite}
    result["not_used"] = [] if fit.l1 else [name for j, name in enumerate(names) if j not in explained]
    if not fit.is_penalized:
        error_w, error_b = in_units_of(data, fit).standard_errors
        *of_w, of_b = [None if np.isnan(row).any() else row.tolist() for row in (*error_w, error_b)]
        result["standard_errors"] = {"w": dict(zip(names, of_w, strict=True)), "b": of_b}
    return result


def describe_path(data: RegressionData, path: Path) -> dict[str, Any]:
    """The path of penalties that folds chose from, in the order of `strengths`, the strongest first.

    - `strengths`: each adds strength (l1_ratio sum |w| + (1 - l1_ratio) / 2 sum w^2) to the mean loss.
    - `best`: the strength of least held-out loss, whose fit is that of the run.
    - `best_within_error`: the greatest strength whose held-out loss is at most one standard error above the least.
    - `nonzero`: the number of weights that are not 0.
    - `held_out_loss`, `standard_error`: the mean loss of all rows, each held out of the fit, and its standard error.
    - `parameters`: the intercepts, and the weights by feature, in the units of the data; not for long paths.
    """
    described: dict[str, Any] = {
        "folds": len(path.fold_losses),
        "l1_ratio": path.l1_ratio,
        "best": float(path.strengths[path.best]),
        "best_within_error": float(path.strengths[path.best_within_error]),
        "strengths": path.strengths.tolist(),
        "nonzero": np.count_nonzero(path.w, axis=0).tolist(),
        "held_out_loss": path.losses.tolist(),
        "standard_error": path.standard_errors.tolist(),
    }
    if path.w.size <= _MOST_OF_PATH:
        w, b = (path.w, path.b) if data.schema is None else data.schema.parameters(path.w, path.b)
        described["parameters"] = {"w": dict(zip(feature_names(data), w.tolist(), strict=True)), "b": b.tolist()}
    return described


def describe_choice(path: Path) -> str:
    """One line about the penalty that folds chose."""
    best, (l1, l2) = path.best, path.penalties(path.best)
    penalties = " ".join(spell(name, float(f"{value:.6g}")) for name, value in (("l1", l1), ("l2", l2)) if value)
    at_end = ", the weakest of the path: perhaps none is better" if best == len(path.strengths) - 1 else ""
    return (
        f"{len(path.fold_losses)} folds chose {penalties} of {len(path.strengths)} strengths{at_end}: held-out loss "
        f"{path.losses[best]:.6g} (standard error {path.standard_errors[best]:.2g}), "
        f"{np.count_nonzero(path.w[:, best]):,} of {len(path.w):,} weights are not 0"
    )


def describe_fit(config: Config, data: RegressionData, fit: Fit) -> list[Summary]:
    """The summaries of a fit by target, in the units of the data. Products that are not used have the note `UNSEEN`."""
    fit, names = in_units_of(data, fit), feature_names(data)
    weighted = bool(data.columns and data.columns.weight_column)
    products = data.schema.products if data.schema else frozenset()
    summaries = (
        summarize_fit(fit, names, t, name, weights=config.kind_of_weights if weighted else None)
        for t, name in enumerate(target_names(data, as_fitted=True))
    )

    def noted(c: Coefficient) -> Coefficient:
        return c._replace(note=UNSEEN) if c.name in products and not c.used else c

    return [dataclasses.replace(each, coefficients=tuple(map(noted, each.coefficients))) for each in summaries]


def in_units_of(data: RegressionData, fit: Fit) -> Fit:
    """The least-squares solution in the units of the data."""
    return fit if data.schema is None else fit.in_units(*data.schema.units)


def feature_names(data: RegressionData) -> tuple[str, ...]:
    """The names of the d features; x0, x1 and so on if they have no names."""
    return data.schema.features if data.schema is not None else tuple(f"x{j}" for j in range(data.num_inputs))


def target_names(data: RegressionData, as_fitted: bool = False) -> tuple[str, ...]:
    """The names of the t targets; y0, y1 and so on if they have no names.

    Args:
      data: the data.
      as_fitted: whether to write log(NAME) for a target whose logarithm is fitted.
    """
    if data.schema is None:
        return tuple(f"y{t}" for t in range(data.num_targets))
    logs = as_fitted and data.schema.log_targets
    return tuple(f"log({t.name})" if logs else t.name for t in data.schema.targets)


def params_sha256(params: Any) -> str:
    """SHA-256 of the parameters: the leaves sorted by their paths, each in row-major, little-endian order."""
    digest = hashlib.sha256()
    for _, leaf in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda item: jax.tree_util.keystr(item[0])):
        array = np.asarray(leaf)
        digest.update(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes())
    return digest.hexdigest()


def package_versions() -> dict[str, str]:
    """The versions of the packages on which a result depends, by name."""

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return {name: version(name) for name in ("dpreg", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")}
