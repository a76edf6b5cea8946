"""summary.json: what a run was, reached and cost."""

import hashlib
import importlib.metadata
import platform
from typing import Any

import jax
import numpy as np

from dpreg.data.sources import RegressionData
from dpreg.data.synthetic import SyntheticRegressionData
from dpreg.models.linear import linear_parameters
from dpreg.solvers.inference import Summary, summarize_fit
from dpreg.solvers.tsqr import Fit
from dpreg.train.trainer import Trainer


def summarize(trainer: Trainer, data: RegressionData, reading: float = 0.0) -> dict[str, Any]:
    """The summary of a finished run, ready for JSON.

    `best_step` is there where early stopping chose the parameters: those after it.
    `target_transform` is there where the model predicts the logarithm of the target, as do its parameters then.
    `exchange_bytes` are those of what a step sums over devices, where there are several.
    `train_loss` is the mean over the last epoch; `rows_per_second` counts training alone: no ingest, no
    compilation, no evaluation, and no step before a resume. It is 0 where no step was left to do.

    Args:
      reading: seconds before `trainer` had the rows, which count as ingest.
    """
    settings, loop = trainer.settings, trainer.loop
    steps_an_epoch = trainer.train.sampler.steps_per_epoch
    steps_per_second = loop.steps_trained / trainer.seconds["train"] if loop.steps_trained else 0.0
    return {
        "step": trainer.step,
        "epoch": trainer.step / steps_an_epoch,
        **({"best_step": loop.best.step} if settings.patience else {}),
        "train_loss": trainer.train_loss,
        "val_loss": trainer.val_loss,
        "metrics": trainer.metrics,
        **describe_parameters(trainer.state.params, data),
        "params_sha256": params_sha256(trainer.state.params),
        "rows_per_second": steps_per_second * len(data.train) / steps_an_epoch,
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


def describe_devices(trainer: Trainer) -> list[dict[str, Any]]:
    """Of each device of the run: its process, and the logical shards and training rows that it carries."""
    slots, sampler = trainer.train.slots, trainer.train.sampler
    found = []
    for number, device in enumerate(trainer.mesh.devices.flat):
        first, end = (min(at * slots, trainer.settings.num_shards) for at in (number, number + 1))
        shards = "none" if first == end else f"{first}" if end - first == 1 else f"{first} to {end - 1}"
        rows = int(sampler.shard_start(end) - sampler.shard_start(first))
        found.append({"device": number, "process": device.process_index, "shards": shards, "rows": rows})
    return found


def describe_parameters(params: Any, data: RegressionData) -> dict[str, Any]:
    """`parameters` of a linear model, in the units of the data, and `parameter_error` where the truth is known.

    With named columns `w` is by name, else a list; `b` is a number. Several targets make lists of both.
    """
    linear = linear_parameters(params)
    if linear is None:
        return {}
    w, b = linear
    one = w.shape[1] == 1
    result: dict[str, Any] = {"target_transform": "log"} if data.schema and data.schema.log_targets else {}
    result["parameters"] = _named(w, b, data)
    if isinstance(data, SyntheticRegressionData) and w.size == np.size(data.w):
        error_w, error_b = np.asarray(data.w) - w.reshape(data.w.shape), np.asarray(data.b) - b
        result["parameter_error"] = {
            "w": error_w.tolist(),
            "b": float(error_b[0]) if one else error_b.tolist(),
        }
    return result


def _named(w: np.ndarray, b: np.ndarray, data: RegressionData) -> dict[str, Any]:
    """Parameters in the units of the data."""
    if data.schema is not None:
        w, b = data.schema.parameters(w, b)
    one = w.shape[1] == 1
    listed = (w[:, 0] if one else w).tolist()
    return {
        "w": listed if data.schema is None else dict(zip(data.schema.features, listed, strict=True)),
        "b": float(b[0]) if one else b.tolist(),
    }


def describe_optimum(params: Any, data: RegressionData, fit: Fit) -> dict[str, Any]:
    """How far a linear model is from the least loss that any has on the training rows, and what that one is.

    `gap`, of the squared loss with its penalty, is what is left of it as a share of the least: 0 at the optimum.
    `not_used` names the features that are constant or combinations of others. Without a penalty there are also the
    standard errors. All in the units of the data.
    """
    (w, b), names = linear_parameters(params) or (np.zeros(0), np.zeros(0)), feature_names(data)
    result: dict[str, Any] = {}
    if fit.dispersion is None:
        loss, best = (
            fit.triangle.loss(at_w, at_b) + fit.l2 / 2 * float(np.square(at_w).sum())
            for at_w, at_b in ((w.astype(np.float64), b.astype(np.float64)), (fit.w, fit.b))
        )
        result = {"loss": loss, "best": best, "gap": (loss - best) / best if best > 0 else None}
    result["parameters"] = _named(fit.w, fit.b, data)
    result["not_used"] = [name for j, name in enumerate(names) if j not in fit.kept]
    if not fit.l2:
        error_w, error_b = in_units_of(data, fit).standard_errors
        *errors, of_b = [None if np.isnan(row).any() else row.tolist() for row in (*error_w, error_b)]
        result["standard_errors"] = {"w": dict(zip(names, errors, strict=True)), "b": of_b}
    return result


def describe_fit(data: RegressionData, fit: Fit) -> list[Summary]:
    """The summaries of a fit by target, in the units of the data."""
    fit, names = in_units_of(data, fit), feature_names(data)
    return [summarize_fit(fit, names, t, name) for t, name in enumerate(target_names(data, as_fitted=True))]


def in_units_of(data: RegressionData, fit: Fit) -> Fit:
    """The fit of the rows as the table has them."""
    return fit if data.schema is None else fit.in_units(*data.schema.units)


def feature_names(data: RegressionData) -> tuple[str, ...]:
    """Of the d features: x0, x1 and so on where they have none."""
    return data.schema.features if data.schema is not None else tuple(f"x{j}" for j in range(data.num_inputs))


def target_names(data: RegressionData, as_fitted: bool = False) -> tuple[str, ...]:
    """Of the t targets; as they are fitted: log(NAME) where that is their logarithm."""
    if data.schema is None:
        return tuple(f"y{t}" for t in range(data.num_targets))
    logs = as_fitted and data.schema.log_targets
    return tuple(f"log({t.name})" if logs else t.name for t in data.schema.targets)


def params_sha256(params: Any) -> str:
    """SHA-256 of the parameters: leaves in the order of their paths (sorted), each row-major and little-endian."""
    digest = hashlib.sha256()
    for _, leaf in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda item: jax.tree_util.keystr(item[0])):
        array = np.asarray(leaf)
        digest.update(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes())
    return digest.hexdigest()


def package_versions() -> dict[str, str]:
    """The versions of the packages that a result depends on."""

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return {name: version(name) for name in ("dpreg", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")}
