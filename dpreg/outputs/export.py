"""Saves a trained model as a folder of plain files, from which another process can predict."""

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from dpreg.config import Config
from dpreg.data.schema import Schema
from dpreg.data.sources import RegressionData
from dpreg.errors import InputError
from dpreg.files import publish
from dpreg.spelling import spell
from dpreg.tables import standalone

_ARRAYS, _DESCRIPTION, _SCRIPT = standalone.PARAMETERS, standalone.DESCRIPTION, "predict.py"


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
    """

    flags: Mapping[str, Any]
    variables: Mapping[str, Any]
    num_inputs: int
    num_targets: int
    schema: Schema | None
    digest: str
    computation: str | None


def save_model(
    folder: pathlib.Path,
    config: Config,
    variables: Mapping[str, Any],
    data: RegressionData,
    computation: str | None = None,
) -> None:
    """Writes `parameters.npz`, with arrays named by their paths such as params/w, and `model.json`, with checksums.

    For a linear model of a table it also writes `predict.py`, which needs only NumPy.
    """
    folder.mkdir(exist_ok=True)
    (folder / _SCRIPT).unlink(missing_ok=True)
    if data.schema is not None and config.model in ("linear", "concise"):
        shutil.copyfile(standalone.__file__, folder / _SCRIPT)
    new = {name: folder / f".new-{name}" for name in (_ARRAYS, _DESCRIPTION)}
    arrays: dict[str, Any] = jax.tree.map(np.asarray, traverse_util.flatten_dict(dict(variables), sep="/"))
    np.savez(new[_ARRAYS], **arrays)
    description = {
        "format": standalone.FORMAT,
        "flags": config.identity(),
        "num_inputs": data.num_inputs,
        "num_targets": data.num_targets,
        "schema": data.schema and data.schema.to_json(),
        "computation": computation,
        _ARRAYS: hashlib.sha256(new[_ARRAYS].read_bytes()).hexdigest(),
    }
    # Round trip through JSON, which turns tuples into lists: the checksum must be that of the value that is read.
    text = json.dumps(standalone.add_checksum(json.loads(json.dumps(description))), indent=2)
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
        model, arrays = standalone.read_model(folder)
    except ValueError as error:
        raise InputError(str(error)) from error
    try:
        _check_flags(model["flags"])
        if not all(type(model[name]) is int and model[name] > 0 for name in ("num_inputs", "num_targets")):
            raise ValueError("its numbers of columns are not positive")
        variables = {"params": {}, "batch_stats": {}} | traverse_util.unflatten_dict(arrays, sep="/")
        schema, computation = model["schema"] and Schema.from_json(model["schema"]), model.get("computation")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: the model cannot be used ({error}); run the training command again") from error
    size = model["num_inputs"], model["num_targets"]
    return ExportedModel(model["flags"], variables, *size, schema, model["checksum"], computation)


def _check_flags(flags: Mapping[str, Any]) -> None:
    """Raises ValueError unless these are the settings that affect the result in this version of dpreg."""
    if unknown := {*Config().identity()} ^ ({*flags} - {"max_epochs"}):
        raise ValueError(f"another version of dpreg wrote it: {spell(min(unknown))}")
    Config(**flags)
