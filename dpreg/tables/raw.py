"""Encodes the columns of a table by a model's schema, alike for files, data frames and arrays."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike

from dpreg.config import Columns
from dpreg.data.schema import Category, Number, Schema
from dpreg.data.sources import Rows, Source
from dpreg.errors import InputError, prefix_errors
from dpreg.spelling import spell
from dpreg.tables.columns import RawReader
from dpreg.tables.table import Kinds, Table, TableChunk

_BATCH_ROWS = 1 << 14


def columns_of(schema: Schema, columns: Columns | None, targets: bool) -> Columns:
    """The columns to read from a table for prediction by a model with this schema.

    Args:
      columns: the columns that the model was trained on. If None, a missing value becomes the mean if the schema has
        one, and otherwise its row is left out.
      targets: whether to read the targets and the weights as well.

    Raises:
      InputError: when missing values should become the mean, and the schema has none.
    """
    numbers = [column for column in schema.inputs if isinstance(column, Number)]
    if columns is None:
        columns = Columns(missing="mean" if any(c.fill is not None for c in numbers) else "drop")
    if columns.missing == "mean" and any(c.fill is None for c in numbers):
        raise InputError(
            f"{spell('missing', 'mean')}: the model was trained without it; use {spell('missing', 'drop')}, or train "
            "it with that"
        )
    return dataclasses.replace(
        columns,
        features=tuple(column.name for column in schema.inputs),
        formula=None,
        exclude=(),
        categorical=tuple(column.name for column in schema.inputs if isinstance(column, Category)),
        dates=tuple(column.name for column in numbers if column.days),
        target=tuple(target.name for target in schema.targets) if targets else (),
        target_transform="labels" if schema.labels else "log" if schema.log_targets else "none",
        weight_column=columns.weight_column if targets else None,
        group_column=None,
    )


class RawRows:
    """A stream of the encoded rows of a table, which records which of them can be predicted.

    Args:
      table: the table.
      columns: the columns to read, from `columns_of`.
      schema: the schema of the model.
      dtype: the dtype of the encoded rows.

    Attributes:
      rows, used: the number of rows read so far, and of those among them without missing values.
      valid: for each chunk that was yielded, [n] bool: which rows have no missing value.
      others: by column, the number of rows with a category that the model does not know.

    Raises:
      InputError: for a missing column.
    """

    def __init__(self, table: Table, columns: Columns, schema: Schema, dtype: DTypeLike = np.float32):
        table.require(columns.used_columns)
        self.rows = self.used = 0
        self.valid: collections.deque[np.ndarray] = collections.deque()
        self.others: collections.Counter[str] = collections.Counter()
        self._table, self._schema, self._reader = table, schema, RawReader(columns, schema, dtype)

    def chunks(self, most: int) -> Iterator[Rows]:
        """Yields `{"x", "y", "weight"}` of up to `most` rows; a row with a missing value has zeros and weight 0.

        Raises:
          InputError: as `RawReader.read`; for missing values that are not allowed; and for a table without rows.
        """
        for raw in self._reader.read(self._table, most):
            valid = self._reader.valid(raw)
            self._reader.refuse_missing(self._table.name)
            self.rows, self.used = self.rows + len(raw), self.used + int(valid.sum())
            self.valid.append(valid)
            for at, column in enumerate(self._schema.inputs):
                if isinstance(column, Category) and (unknown := int((raw[valid, at] < 0).sum())):
                    self.others[column.name] += unknown
            with prefix_errors(self._table.name):
                rows = self._encode(raw, valid)
            yield rows
        if not self.rows:
            which = " with a weight" if self._reader.without_weight else ""
            raise InputError(f"{self._table.name}: there are no rows{which}; name a table that has some")

    def _encode(self, raw: np.ndarray, valid: np.ndarray) -> Rows:
        if valid.all():
            return self._schema.rows(raw, self._reader.dtype)
        encoded = self._schema.rows(raw[valid], self._reader.dtype)
        rows = {name: np.zeros((len(raw), *values.shape[1:]), values.dtype) for name, values in encoded.items()}
        for name, values in encoded.items():
            rows[name][valid] = values
        return rows


def open_columns(x: Any, columns: Columns, name: str = "x") -> Table:
    """Columns in memory as a table.

    Args:
      x: columns by their names: a mapping, a pandas DataFrame, an Arrow table, or any object with Arrow's PyCapsule
        interface; or an array [n, features] with the features in the order of `columns.features`.
      columns: the columns that will be read.
      name: the name of the argument, for messages.

    Raises:
      InputError: for other types, and for columns of different lengths or of mixed types.
    """
    if isinstance(x, pa.RecordBatch):
        x = pa.Table.from_batches([x])
    of_frame = hasattr(x, "iloc") and hasattr(x, "columns")
    if isinstance(x, Mapping) or of_frame:
        given = list(x.columns if of_frame else x)
        keys = {str(key): key for key in given}
        if len(keys) < len(given):
            twice = next(key for key, count in collections.Counter(map(str, given)).items() if count > 1)
            raise InputError(f"{name}: there are two columns {twice!r}; rename one")
        arrays = {key: _array(name, key, x[keys[key]]) for key in dict.fromkeys(columns.used_columns) if key in keys}
        unused = [key for key in keys if key not in arrays]
    elif hasattr(x, "__arrow_c_stream__") or hasattr(x, "__arrow_c_array__"):
        table = pa.table(x)
        arrays = {
            key: table.column(key) for key in dict.fromkeys(columns.used_columns) if table.column_names.count(key) == 1
        }
        unused = [key for key in table.column_names if key not in arrays]
    else:
        arrays, unused = _columns_of_array(x, columns, name), []
    sizes = {key: len(array) for key, array in arrays.items()}
    if len(set(sizes.values())) > 1:
        each = ", ".join(f"{key!r} has {size:,}" for key, size in sizes.items())
        raise InputError(f"{name}: the columns are not equally long: {each}; give each row a value in each column")
    whole = pa.table(arrays)

    def stream(asked: Kinds) -> Iterator[TableChunk]:
        first = 0
        for batch in whole.select(list(asked)).to_batches(_BATCH_ROWS):
            yield TableChunk(name, first, batch)
            first += batch.num_rows

    return Table(name, (*arrays, *unused), {}, stream)


def open_source(source: Source, columns: Columns) -> tuple[Table, Columns]:
    """A source with the unencoded columns of a table, as a table, and the columns to read from it.

    Args:
      source: its x are `columns.features`; if there are `columns.target`, they are its y, and its weights are used.

    Raises:
      InputError: when it has other numbers of features or targets.
    """
    kinds = {"x": columns.features}
    if columns.target:
        weight = "weight"
        while weight in (*columns.features, *columns.target):
            weight += "_"
        columns = dataclasses.replace(columns, weight_column=weight)
        kinds["y"] = columns.target
    for kind, names in kinds.items():
        if (width := source[np.zeros(1, np.int32)][kind].shape[1]) != len(names):
            raise _wrong_width(f"the rows have {width:,} columns in {kind}", names)

    def stream(asked: Kinds) -> Iterator[TableChunk]:
        for first in range(0, len(source), _BATCH_ROWS):
            rows = source[np.arange(first, min(first + _BATCH_ROWS, len(source)))]
            values = [
                *rows["x"].T,
                *(*rows["y"].T, rows["weight"])[: len(columns.used_columns) - len(columns.features)],
            ]
            named = dict(zip(columns.used_columns, values, strict=True))
            yield TableChunk("the rows", first, pa.RecordBatch.from_pydict({c: pa.array(named[c]) for c in asked}))

    return Table("the rows", columns.used_columns, {}, stream), columns


def encoded_schema(source: Any) -> Schema | None:
    """The schema by which the rows of a source are already encoded; None for rows that do not come from a table."""
    while hasattr(source, "source"):  # in another order, or another precision
        source = source.source
    schema = getattr(source, "schema", None)
    return schema if isinstance(schema, Schema) else None


def _columns_of_array(x: Any, columns: Columns, name: str) -> dict[str, pa.Array]:
    try:
        array = x if isinstance(x, np.ma.MaskedArray) else np.asarray(x)
    except ValueError as error:  # rows of unequal length
        raise _wrong_width(f"{name}: no array ({error})", columns.features) from error
    if array.ndim != 2 or array.shape[1] != len(columns.features) or columns.target or not len(array):
        raise _wrong_width(f"{name}: shape {list(array.shape)}", columns.used_columns)
    return {key: _array(name, key, array[:, at]) for at, key in enumerate(columns.features)}


def _wrong_width(what: str, names: Sequence[str]) -> InputError:
    shown = [*map(repr, names[:20]), *([f"and {len(names) - 20:,} more"] if len(names) > 20 else [])]
    return InputError(
        f"{what}; the columns of the table, as they are there, are: {', '.join(shown)}; give "
        "them in that order, or by name, in a mapping or a data frame"
    )


def _array(table: str, name: str, values: Any) -> pa.Array | pa.ChunkedArray:
    """A column as an Arrow array; NaN is a missing value.

    Raises:
      InputError: for columns with more than one axis, and for values of mixed types.
    """
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        return values
    try:
        if isinstance(values, np.ma.MaskedArray):
            return pa.array(np.ma.getdata(values), mask=np.ma.getmaskarray(values), from_pandas=True)
        if hasattr(values, "__array__") and not hasattr(values, "iloc"):
            values = np.asarray(values)
            values = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
        if getattr(values, "dtype", None) == np.dtype(object) and not hasattr(values, "iloc"):
            values = values.tolist()
        return pa.array(values, from_pandas=True)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{table}: column {name!r} is no sequence of values of one type ({reason}); give one value for each row"
        ) from error
