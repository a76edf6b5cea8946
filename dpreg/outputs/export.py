"""Saves a trained model as a folder of plain files, from which another process can predict."""

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from dpreg.config import Config
from dpreg.data import terms
from dpreg.data.schema import Schema
from dpreg.data.sources import RegressionData
from dpreg.errors import InputError
from dpreg.files import publish
from dpreg.outputs.metrics import to_json
from dpreg.solvers.fit import Fit
from dpreg.solvers.inference import Summary
from dpreg.spelling import spell
from dpreg.tables import standalone

_ARRAYS, _DESCRIPTION, _SCRIPT = standalone.PARAMETERS, standalone.DESCRIPTION, "predict.py"


@dataclasses.dataclass(frozen=True)
class ExactFit:
    """The exact fit of a linear model.

    Attributes:
      summaries: one for each target, in the units of the data, without covariances.
      roots: [t, k, n] float64: for each target the root of the covariance of the parameters in the units of training,
        see `dpreg.solvers.fit.Fit.covariance_root`; None where the standard errors are unknown.
    """

    summaries: tuple[Summary, ...]
    roots: np.ndarray | None

    @classmethod
    def of(cls, fit: Fit, summaries: Sequence[Summary]) -> "ExactFit":
        """The fit in the units of training, with its summaries in those of the data."""
        roots = None
        if fit.has_errors:
            roots = np.array([fit.covariance_root(target) for target in range(len(summaries))])
        without = tuple(dataclasses.replace(summary, covariance=None) for summary in summaries)
        return cls(without, roots if roots is not None and np.isfinite(roots).all() else None)

    @classmethod
    def from_json(cls, values: Sequence[Mapping[str, Any]], roots: np.ndarray | None) -> "ExactFit":
        """The fit that `to_json` described."""
        return cls(tuple(map(Summary.from_json, values)), roots)

    def to_json(self) -> list[dict[str, Any]]:
        """The summaries as plain values."""
        return [summary.to_json() for summary in self.summaries]

    def used(self, intercept: bool) -> np.ndarray:
        """The numbers of the columns that the fit uses, in the order of the roots."""
        return np.flatnonzero([each.used for each in self.summaries[0].coefficients[intercept:]])

    def has_size(self, targets: int, inputs: int, intercept: bool) -> bool:
        """Whether the fit is one of so many targets and inputs."""
        if [len(each.coefficients) for each in self.summaries] != [inputs + intercept] * targets:
            return False
        size = targets, len(self.used(intercept)) + intercept
        return self.roots is None or self.roots.shape[:-1] == size


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """A trained model.

    Attributes:
      flags: the settings that affect the result, see `Config.identity`.
      variables: {"params", "batch_stats"} as NumPy arrays.
      num_inputs, num_targets: the number of features and targets of a row.
      schema: the schema of the table that it was trained on; None if it was not trained on a table.
      digest: the checksum of all of that, which identifies the model.
      computation: the digest of its prediction, see `dpreg.step.digest`; None for the models of dpreg.
      smearing: the factors by which predicted medians become means, see `dpreg.outputs.smearing`; None for a model of
        the targets themselves.
      fit: the exact fit; None for a model that was trained by steps, and for losses without standard errors.
    """

    flags: Mapping[str, Any]
    variables: Mapping[str, Any]
    num_inputs: int
    num_targets: int
    schema: Schema | None
    digest: str
    computation: str | None
    smearing: tuple[float, ...] | None = None
    fit: ExactFit | None = None

    def summaries(self) -> tuple[Summary, ...]:
        """The summaries of the exact fit with their covariances, one for each target; none without such a fit."""
        if self.fit is None or self.fit.roots is None:
            return self.fit.summaries if self.fit else ()
        intercept, used = int(self.flags["intercept"]), self.fit.used(self.flags["intercept"])
        mean, scale = self.schema.units if self.schema else (np.zeros(self._columns), np.ones(self._columns))
        summaries = []
        for target, (summary, root) in enumerate(zip(self.fit.summaries, self.fit.roots, strict=True)):
            in_units = root * scale[self.num_inputs + target]
            in_units[intercept:] /= scale[used, None]
            if intercept:
                in_units[0] -= mean[used] @ in_units[1:]
            summaries.append(dataclasses.replace(summary, covariance=in_units @ in_units.T))
        return tuple(summaries)

    @property
    def _columns(self) -> int:
        return self.num_inputs + self.num_targets

    def with_means(self) -> "ExportedModel":
        """The model that predicts means where this one predicts medians.

        Raises:
          InputError: for a model of the targets themselves, and where the factors are not finite.
        """
        log = spell("target_transform", "log")
        if self.schema is None or not self.schema.log_targets:
            raise InputError(f"{spell('predict_mean')}: it applies only to a model with {log}; leave it out")
        if self.smearing is None:
            raise InputError(
                f"{spell('predict_mean')}: the means of the training rows are not finite, as the model is far from "
                "them; train it better, or leave this out"
            )
        return dataclasses.replace(self, schema=dataclasses.replace(self.schema, smearing=self.smearing))


def save_model(
    folder: pathlib.Path,
    config: Config,
    variables: Mapping[str, Any],
    data: RegressionData,
    computation: str | None = None,
    smearing: Sequence[float] | None = None,
    fit: ExactFit | None = None,
) -> None:
    """Writes `parameters.npz`, with arrays named by their paths such as params/w, and `model.json`, with checksums.

    For a linear model of a table it also writes `predict.py`, which needs only NumPy, and with a formula `terms.py`.

    Args:
      smearing, fit: as for `ExportedModel`.
    """
    folder.mkdir(exist_ok=True)
    for name in (_SCRIPT, standalone.TERMS):
        (folder / name).unlink(missing_ok=True)
    if data.schema is not None and config.model in ("linear", "concise"):
        shutil.copyfile(standalone.__file__, folder / _SCRIPT)
        if data.schema.terms:
            shutil.copyfile(terms.__file__, folder / standalone.TERMS)
    new = {name: folder / f".new-{name}" for name in (_ARRAYS, _DESCRIPTION)}
    arrays: dict[str, Any] = jax.tree.map(np.asarray, traverse_util.flatten_dict(dict(variables), sep="/"))
    if fit is not None and fit.roots is not None:
        arrays[standalone.ROOTS] = fit.roots
    np.savez(new[_ARRAYS], **arrays)
    description = {
        "format": standalone.FORMAT,
        "flags": config.identity(),
        "num_inputs": data.num_inputs,
        "num_targets": data.num_targets,
        "schema": data.schema and data.schema.to_json(),
        "computation": computation,
        "smearing": smearing,
        "fit": fit and fit.to_json(),
        _ARRAYS: hashlib.sha256(new[_ARRAYS].read_bytes()).hexdigest(),
    }
    # Round trip through JSON, which turns tuples into lists: the checksum must be that of the value that is read.
    text = json.dumps(standalone.add_checksum(json.loads(to_json(description))), indent=2)
    new[_DESCRIPTION].write_text(text + "\n", encoding="utf-8")
    for name, path in new.items():
        publish(path, folder / name)


def load_model(folder: pathlib.Path) -> ExportedModel:
    """Reads a model that `save_model` wrote.

    Raises:
      InputError: when there is none, or it differs from what was written.
    """
    if not (folder / _DESCRIPTION).exists():
        raise InputError(f"{folder}: there is no model; train with that {spell('workdir')} first, to the end")
    try:
        model, arrays = standalone.read_model(folder, of_table=False)
    except ValueError as error:
        raise InputError(str(error)) from error
    try:
        _check_flags(model["flags"])
        if not all(type(model[name]) is int and model[name] > 0 for name in ("num_inputs", "num_targets")):
            raise ValueError("its numbers of columns are not positive")
        roots = arrays.pop(standalone.ROOTS, None)
        fit = None if model["fit"] is None else ExactFit.from_json(model["fit"], roots)
        if fit and not fit.has_size(model["num_targets"], model["num_inputs"], model["flags"]["intercept"]):
            raise ValueError("its exact fit has other columns")
        variables = {"params": {}, "batch_stats": {}} | traverse_util.unflatten_dict(arrays, sep="/")
        schema, computation = model["schema"] and Schema.from_json(model["schema"]), model.get("computation")
        smearing = model["smearing"] and tuple(model["smearing"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: the model cannot be used ({error}); run the training command again") from error
    size = model["num_inputs"], model["num_targets"]
    return ExportedModel(model["flags"], variables, *size, schema, model["checksum"], computation, smearing, fit)


def _check_flags(flags: Mapping[str, Any]) -> None:
    """Raises ValueError unless these are the settings that affect the result in this version of dpreg."""
    if unknown := {*Config().identity()} ^ ({*flags} - {"max_epochs"}):
        raise ValueError(f"another version of dpreg wrote it: {spell(min(unknown))}")
    Config(**flags)
