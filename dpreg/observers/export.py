"""A trained model as a folder of plain files: what another process needs to predict with it."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from dpreg.config import Config
from dpreg.data import standalone
from dpreg.data.schema import Schema
from dpreg.data.sources import RegressionData
from dpreg.errors import InputError

_FORMAT = 2
_ARRAYS, _REST, _ALONE = "parameters.npz", "model.json", "predict.py"


@dataclasses.dataclass(frozen=True)
class Exported:
    """A trained model.

    Attributes:
      flags: those that decide the answer, as of `Config.identity`.
      variables: {"params", "batch_stats"} as NumPy arrays.
      num_inputs, num_targets: features and targets of a row.
      schema: of the table that it was trained on; None where that was no table.
      digest: of all that.
    """

    flags: Mapping[str, Any]
    variables: Mapping[str, Any]
    num_inputs: int
    num_targets: int
    schema: Schema | None
    digest: str


def save_model(folder: pathlib.Path, config: Config, variables: Mapping[str, Any], data: RegressionData) -> None:
    """Writes `parameters.npz` (by their paths, such as params/w) and `model.json`; neither is pickled.

    Beside a linear model of a table lies `predict.py`, which needs NumPy alone.
    """
    folder.mkdir(exist_ok=True)
    (folder / _ALONE).unlink(missing_ok=True)
    if data.schema is not None and config.model in ("linear", "concise"):
        shutil.copyfile(standalone.__file__, folder / _ALONE)
    new = {name: folder / f".new-{name}" for name in (_ARRAYS, _REST)}
    arrays: dict[str, Any] = jax.tree.map(np.asarray, traverse_util.flatten_dict(dict(variables), sep="/"))
    np.savez(new[_ARRAYS], **arrays)
    rest = {
        "format": _FORMAT,
        "flags": config.identity(),
        "num_inputs": data.num_inputs,
        "num_targets": data.num_targets,
        "schema": data.schema and data.schema.to_json(),
        _ARRAYS: hashlib.sha256(new[_ARRAYS].read_bytes()).hexdigest(),
    }
    new[_REST].write_text(json.dumps(rest, indent=2) + "\n", encoding="utf-8")
    for name, path in new.items():
        os.replace(path, folder / name)


def load_model(folder: pathlib.Path) -> Exported:
    """The model that `save_model` wrote.

    Raises:
      InputError: when there is none, or it is damaged.
    """
    if not (folder / _REST).exists():
        raise InputError(f"{folder}: there is no model; train with that --workdir first, to the end")
    try:
        text = (folder / _REST).read_text(encoding="utf-8")
        rest = json.loads(text)
        if rest["format"] != _FORMAT:
            raise ValueError("another version of dpreg wrote it")
        if hashlib.sha256((folder / _ARRAYS).read_bytes()).hexdigest() != rest[_ARRAYS]:
            raise ValueError(f"{_ARRAYS} is not what was written")
        with np.load(folder / _ARRAYS, allow_pickle=False) as arrays:
            variables = traverse_util.unflatten_dict(dict(arrays), sep="/")
        return Exported(
            rest["flags"],
            {"params": {}, "batch_stats": {}} | jax.tree.map(np.asarray, variables),
            rest["num_inputs"],
            rest["num_targets"],
            rest["schema"] and Schema.from_json(rest["schema"]),
            hashlib.sha256(text.encode()).hexdigest(),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: the model cannot be used ({error}); run the training command again") from error
