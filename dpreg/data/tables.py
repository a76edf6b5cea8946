"""Tables from files: numeric columns of CSV and Parquet, checked, split and put into a fixed shuffle."""

import pathlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from dpreg.data.order import keyed_hash
from dpreg.data.sources import ArraySource, RegressionData, Scaling, Shuffled
from dpreg.errors import InputError


def read_table(
    path: str,
    target: Sequence[str] | str,
    features: Sequence[str] = (),
    *,
    batch_size: int = 32,
    validation_fraction: float = 0.1,
    standardize: bool = True,
) -> RegressionData:
    """Reads a table of numbers, holds some rows out, and shuffles the others once.

    Args:
      path: a .csv or .parquet file.
      target: the column to predict, or several.
      features: the columns to fit on, in this order; all but the target by default.
      batch_size: rows of a global batch.
      validation_fraction: share of rows held out. Which ones is a function of the row number alone.
      standardize: scale features to mean 0 and deviation 1 over the training rows (float64 moments).

    Raises:
      InputError: for a file that is not there or not whole, a column that is missing or not numeric, and
        values that are missing or not finite; names the file, the column and the row, counted from 1.
    """
    target = (target,) if isinstance(target, str) else tuple(target)
    table = _read(path)
    table = table.rename_columns([name.strip() for name in table.column_names])
    names = table.column_names
    features = tuple(features) or tuple(name for name in names if name not in target)
    for name in (*features, *target):
        if names.count(name) != 1:
            found = "twice" if names.count(name) else "not there"
            raise InputError(f"{path}: column {name!r} is {found}; the columns are {', '.join(map(repr, names))}")
    check_named_once(path, features, target)
    if not features:
        raise InputError(f"{path}: there is no column to fit on besides the target")
    if not table.num_rows:
        raise InputError(f"{path}: there are no rows")
    x, y = (np.stack([_numbers(path, table, name) for name in group], axis=1) for group in (features, target))
    return split_rows(x, y, features, batch_size, validation_fraction, standardize)


def check_named_once(where: str, features: Sequence[str], target: Sequence[str]) -> None:
    """Raises InputError when a column is named twice, or as a feature and the target."""
    named = (*features, *target)
    for name in named:
        if named.count(name) > 1:
            raise InputError(f"{where}: column {name!r} is asked for twice in features and target; name it once")


def split_rows(
    x: np.ndarray,
    y: np.ndarray,
    features: tuple[str, ...] | None,
    batch_size: int,
    validation_fraction: float,
    standardize: bool,
) -> RegressionData:
    """Rows [n, d], [n, t] as data: held out by a keyed hash of the row number, scaled, and shuffled once."""
    held_out = keyed_hash(np.arange(len(x)), 1) < np.uint32(validation_fraction * 0xFFFFFFFF)
    held_out[keyed_hash(np.arange(len(x)), 1).argmax()] = False  # one row to fit there always is
    return regression_data(x[~held_out], y[~held_out], x[held_out], y[held_out], features, batch_size, standardize)


def regression_data(
    x: np.ndarray,
    y: np.ndarray,
    x_val: np.ndarray,
    y_val: np.ndarray,
    features: tuple[str, ...] | None,
    batch_size: int,
    standardize: bool,
) -> RegressionData:
    """Training and validation rows as data, scaled by the moments of the former, which are shuffled once."""
    scaling = Scaling.of(x) if standardize and len(x) else None
    scale = scaling or (lambda rows: rows)
    train = Shuffled(ArraySource(scale(x), y))
    val = ArraySource(scale(x_val), y_val) if len(x_val) else None
    return RegressionData(train, val, batch_size, features, scaling)


def _read(path: str) -> pa.Table:
    suffix = pathlib.Path(path).suffix.lower()
    if suffix not in (".csv", ".parquet"):
        raise InputError(f"--dataset={path}: unknown; use synthetic, a .csv or .parquet file, or tfds:NAME")
    try:
        if suffix == ".parquet":
            return pyarrow.parquet.ParquetFile(path).read()
        try:
            return pyarrow.csv.read_csv(path)
        except pa.ArrowInvalid:  # again on one thread: then the message names the row
            return pyarrow.csv.read_csv(path, pyarrow.csv.ReadOptions(use_threads=False))
    except FileNotFoundError as error:
        raise InputError(f"--dataset={path}: there is no such file") from error
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a readable {suffix[1:]} file: {reason[:200]}") from error


def _numbers(path: str, table: pa.Table, name: str) -> np.ndarray:
    """A column as float64 [n], all of it finite as float32."""
    column = table[name]
    kind = column.type
    if pa.types.is_boolean(kind):
        column = column.cast(pa.uint8())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        hint = ""
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            row = next((i for i, v in enumerate(column) if v.is_valid and not _is_number(v.as_py())), 0)
            hint = f" ({column[row].as_py()!r} in row {row + 1})"
        raise InputError(f"{path}: column {name!r} is not numeric but {kind}{hint}; choose columns with --features")
    missing = column.null_count
    if missing:
        row = pc.index(column.is_null(), True).as_py()
        raise InputError(f"{path}: column {name!r} has {missing} missing values, the first in row {row + 1}")
    values = column.to_numpy().astype(np.float64)
    bad = ~(np.abs(values) <= np.finfo(np.float32).max)
    if bad.any():
        row = int(bad.argmax())
        raise InputError(
            f"{path}: column {name!r} has {bad.sum()} values that are not finite, the first in row {row + 1}"
        )
    return values


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
