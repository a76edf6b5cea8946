"""summary.json: what a run was, reached and cost."""

import hashlib
import importlib.metadata
import platform
from typing import Any

import jax
import numpy as np

from dpreg.data.sources import RegressionData
from dpreg.data.synthetic import SyntheticRegressionData
from dpreg.trainer import Trainer


def summarize(trainer: Trainer, data: RegressionData) -> dict[str, Any]:
    """The summary of a finished run, ready for JSON.

    `target_transform` is there where the model predicts the logarithm of the target, as do its parameters then.
    `train_loss` is the mean over the last epoch; `rows_per_second` counts training alone: no ingest, no
    compilation, no evaluation, and no step before a resume. It is 0 where no step was left to do.
    """
    steps_an_epoch = trainer.train.sampler.steps_per_epoch
    steps_per_second = trainer.steps_trained / trainer.seconds["train"] if trainer.steps_trained else 0.0
    return {
        "step": trainer.step,
        "epoch": trainer.step / steps_an_epoch,
        "train_loss": trainer.train_loss,
        "val_loss": trainer.val_loss,
        "metrics": trainer.metrics,
        **describe_parameters(trainer.state.params, data),
        "params_sha256": params_sha256(trainer.state.params),
        "rows_per_second": steps_per_second * len(data.train) / steps_an_epoch,
        "steps_per_second": steps_per_second,
        "seconds": trainer.seconds,
        "device_count": trainer.mesh.size,
        "device_kind": trainer.mesh.devices.flat[0].device_kind,
        "process_count": jax.process_count(),
        "num_shards": trainer.num_shards,
        "placement": trainer.train.resolved_placement,
        "reduction": trainer.reduction,
        "backend": trainer.backend,
        "versions": {"python": platform.python_version(), **package_versions()},
    }


def describe_parameters(params: Any, data: RegressionData) -> dict[str, Any]:
    """`parameters` of a linear model, in the units of the data, and `parameter_error` where the truth is known.

    With named columns `w` is by name, else a list; `b` is a number. Several targets make lists of both.
    """
    linear = params.get("Dense_0") if set(params) == {"Dense_0"} else params
    names = next((names for names in (("w", "b"), ("kernel", "bias")) if set(linear) == set(names)), None)
    if names is None:
        return {}
    w, b = (np.asarray(linear[name]) for name in names)
    if data.schema is not None:
        w, b = data.schema.parameters(w, b)
    one = w.shape[1] == 1
    listed = (w[:, 0] if one else w).tolist()
    result: dict[str, Any] = {"target_transform": "log"} if data.schema and data.schema.log_targets else {}
    result |= {
        "parameters": {
            "w": listed if data.schema is None else dict(zip(data.schema.features, listed, strict=True)),
            "b": float(b[0]) if one else b.tolist(),
        }
    }
    if isinstance(data, SyntheticRegressionData) and w.size == np.size(data.w):
        error_w, error_b = np.asarray(data.w) - w.reshape(data.w.shape), np.asarray(data.b) - b
        result["parameter_error"] = {
            "w": error_w.tolist(),
            "b": float(error_b[0]) if one else error_b.tolist(),
        }
    return result


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
