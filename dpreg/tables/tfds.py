"""Datasets prepared by TensorFlow Datasets, read as a random-access data source: without TensorFlow."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from dpreg.errors import InputError
from dpreg.spelling import spell
from dpreg.tables.files import File, sign
from dpreg.tables.table import Kinds, Table, TableChunk

_READ_ROWS = 4096
_HELD_OUT = ("validation", "val", "test")


def open_tfds(name: str, data_dir: str | None = None) -> tuple[Table, Table | None, tuple[str, ...], tuple[str, ...]]:
    """A prepared TFDS dataset as tables of the columns that are numbers of a fixed shape, or text.

    `synthetic_regression`, the builder of this package, is prepared first where it is not. A feature with
    several values a row gives the columns NAME0, NAME1 and so on.

    Args:
      name: as TFDS names it: NAME, NAME/CONFIG or NAME:VERSION.
      data_dir: where datasets are prepared; TFDS's own place by default.

    Returns:
      The split "train"; the split to hold out, where there is one ("validation", "val" or "test"); and what TFDS
      says is to be predicted, and from what: column names, or none.

    Raises:
      InputError: when the dataset is not prepared there.
    """
    import tensorflow_datasets as tfds  # slow to import, and few runs need it

    from dpreg.data.synthetic_regression import SyntheticRegression

    where = spell("dataset", f"tfds:{name}")
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
        raise InputError(
            f"{where}: {reason.rstrip('.')}; prepare it with file_format=array_record, and name its folder with "
            f"{spell('data_dir')}"
        ) from error
    if "train" not in splits:
        raise InputError(f"{where}: there is no split 'train' but {', '.join(splits)}; prepare it with that split")

    def table(split: str) -> Table:
        return _table(where, split, splits[split], builder)

    held_out = next((table(split) for split in _HELD_OUT if split in splits), None)
    inputs, target = (tuple(np.atleast_1d(keys)) for keys in builder.info.supervised_keys or ((), ()))
    return table("train"), held_out, target, inputs


def _table(where: str, split: str, rows: Any, builder: Any) -> Table:
    import tensorflow_datasets as tfds

    columns, groups = dict[str, None](), dict[str, tuple[str, ...]]()
    for name, feature in sorted(builder.info.features.items()):
        if isinstance(feature, tfds.features.Text):
            columns[name] = None
        elif isinstance(feature, tfds.features.Tensor) and None not in feature.shape and _is_numeric(feature.np_dtype):
            size = int(np.prod(feature.shape, dtype=np.int64))
            groups[name] = tuple(f"{name}{j}" for j in range(size)) if feature.shape else (name,)
            columns |= dict.fromkeys(groups[name])

    def stream(asked: Kinds) -> Iterator[TableChunk]:
        of = {column: (name, j) for name, members in groups.items() for j, column in enumerate(members)}
        for first in range(0, len(rows), _READ_ROWS):
            records = rows.__getitems__(range(first, min(first + _READ_ROWS, len(rows))))
            needed = {of[column][0] for column in asked if column in of}
            flat = {name: np.stack([np.ravel(record[name]) for record in records]) for name in needed}
            arrays = []
            for column in asked:
                if column in of:
                    arrays.append(pa.array(np.ascontiguousarray(flat[of[column][0]][:, of[column][1]])))
                else:
                    arrays.append(pa.array([bytes(record[column]).decode() for record in records]))
            yield TableChunk(f"{where}, {split}", first, pa.RecordBatch.from_arrays(arrays, list(asked)))

    files = [File(os.fspath(path)) for path in builder.info.splits[split].filepaths]
    return Table(f"{where}, {split}", tuple(columns), groups, stream, lambda: sign(files))


def _is_numeric(dtype: Any) -> bool:
    return np.issubdtype(dtype, np.number) or dtype == np.bool_
