"""Datasets prepared by TensorFlow Datasets, read as a random-access data source: without TensorFlow."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpreg.data.sources import RegressionData
from dpreg.data.tables import check_named_once, regression_data, split_rows
from dpreg.errors import InputError

_READ_ROWS = 4096


def read_tfds(
    name: str,
    target: Sequence[str] = (),
    features: Sequence[str] = (),
    *,
    data_dir: str | None = None,
    batch_size: int = 32,
    validation_fraction: float = 0.1,
    standardize: bool = False,
) -> RegressionData:
    """Reads a prepared TFDS dataset with numeric features into memory.

    `synthetic_regression`, the builder of this package, is prepared first where it is not. The split
    "train" is fitted; "validation" or "test" is held out, else a share of the rows of "train".

    Args:
      name: as TFDS names it: NAME, NAME/CONFIG or NAME:VERSION.
      target: features to predict; the dataset's supervised target by default.
      features: features to fit on; the supervised input, or all but the target, by default.
      data_dir: where datasets are prepared; TFDS's own place by default.
      batch_size, validation_fraction, standardize: as for `read_table`.

    Raises:
      InputError: when the dataset is not prepared there, or a feature is missing or not numeric.
    """
    import tensorflow_datasets as tfds  # slow to import, and few runs need it

    from dpreg.data.synthetic_regression import SyntheticRegression

    where = f"--dataset=tfds:{name}"
    prepared = tfds.core.read_only_builder.builder_from_files  # as it lies on disk, whatever code made it
    try:
        try:
            builder = prepared(name, data_dir=data_dir)
        except tfds.core.DatasetNotFoundError:
            if name != SyntheticRegression.name:
                raise
            SyntheticRegression(data_dir=data_dir).download_and_prepare(file_format="array_record")
            builder = prepared(name, data_dir=data_dir)
        splits = builder.as_data_source()
    except (ValueError, NotImplementedError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{where}: {reason} Prepare it with file_format=array_record under --data_dir.") from error

    supervised: Any = builder.info.supervised_keys or ((), ())
    columns = sorted(builder.info.features)
    target = tuple(target) or tuple(np.atleast_1d(supervised[1]))
    if not target:
        raise InputError(f"{where}: say what to predict with --target; it has {', '.join(columns)}")
    features = tuple(features) or tuple(np.atleast_1d(supervised[0])) or tuple(c for c in columns if c not in target)
    for column in (*features, *target):
        if column not in columns:
            raise InputError(f"{where}: there is no feature {column!r}; it has {', '.join(columns)}")
        feature = builder.info.features[column]
        numeric = isinstance(feature, tfds.features.Tensor) and (
            np.issubdtype(feature.np_dtype, np.number) or feature.np_dtype == np.bool_
        )
        if not numeric or None in feature.shape:
            raise InputError(f"{where}: feature {column!r} is not numbers of a fixed shape; choose with --features")
    check_named_once(where, features, target)
    if "train" not in splits:
        raise InputError(f"{where}: there is no split 'train'; it has {', '.join(splits)}")

    scalar = all(builder.info.features[column].shape == () for column in features)
    names = features if scalar else None
    x, y = (_read(where, splits["train"], group) for group in (features, target))
    held_out = next((splits[s] for s in ("validation", "val", "test") if s in splits), None)
    if held_out is None:
        return split_rows(x, y, names, batch_size, validation_fraction, standardize)
    x_val, y_val = (_read(where, held_out, group) for group in (features, target))
    return regression_data(x, y, x_val, y_val, names, batch_size, standardize)


def _read(where: str, split: Any, columns: Sequence[str]) -> np.ndarray:
    """All rows of some columns, finite float64 [n, sum of their sizes]."""
    parts = []
    for start in range(0, len(split), _READ_ROWS):
        records = split.__getitems__(range(start, min(start + _READ_ROWS, len(split))))
        parts.append(np.stack([np.concatenate([np.ravel(record[c]) for c in columns]) for record in records]))
    values = np.concatenate(parts).astype(np.float64)
    bad = ~(np.abs(values) <= np.finfo(np.float32).max).all(axis=1)
    if bad.any():
        raise InputError(f"{where}: {' or '.join(columns)} has a value that is not finite in row {bad.argmax() + 1}")
    return values
