"""The columns of a table as numbers: found, converted and checked."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import DTypeLike

from dpreg.config import Columns
from dpreg.data.schema import NUMBER, ROW, WEIGHT, Category, Schema
from dpreg.data.standalone import spelled
from dpreg.data.tables import Part, Table, first_wrong
from dpreg.errors import InputError

_LARGEST = 1e150  # of float64: squares of larger values are not finite
_MOST_CATEGORIES = 1_000_000  # that are held in memory, with their counts
_MICROSECONDS_A_DAY = 86_400e6
_NARROW = {pa.bool_(), pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.float16(), pa.float32(), pa.null()}
_BATCH_BYTES = 16 << 20  # of rows as float64, taken in at once


def resolve(columns: Columns, table: Table) -> Columns:
    """With the features named, and groups of columns by their members.

    Raises:
      InputError: for a column that is not there, or that is asked for twice.
    """

    def named(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(c for n in names for c in ((n,) if n in table.columns else table.groups.get(n, (n,))))

    full = dataclasses.replace(
        columns,
        target=named(columns.target),
        exclude=named(columns.exclude),
        categorical=named(columns.categorical),
        dates=named(columns.dates),
    )
    left_out = {*full.target, *full.exclude, full.weight_column}
    features = named(columns.features) or tuple(name for name in table.columns if name not in left_out)
    full = dataclasses.replace(full, features=features)
    table.require((*full.taken, *full.exclude, *full.categorical, *full.dates))
    for name in full.taken:
        if len(name.splitlines()) > 1:
            raise InputError(f"{table.name}: the name of column {name!r} has several lines; rename it")
        if full.taken.count(name) > 1:
            raise InputError(f"{table.name}: column {name!r} is asked for twice; name it once")
    for flag, names in (("categorical", full.categorical), ("dates", full.dates)):
        for name in names:
            if name not in features:
                raise InputError(
                    f"{table.name}: --{flag}={name} is no feature; leave it out there, or name it in --features"
                )
    for name in full.categorical:
        if name in full.dates:
            raise InputError(f"{table.name}: column {name!r} is in --categorical and in --dates; choose one")
    if not features:
        raise InputError(f"{table.name}: there is no column to fit on besides the target; leave some out of --exclude")
    return full


class RawReader:
    """Reads the columns asked for as float64, and notes what is missing.

    Args:
      columns: what to take from tables, resolved.
      schema: of a model, which knows categories and their codes; -1 is any other. None: codes are given in the order
        of appearance.
      dtype: what the model sees numbers as.

    Attributes:
      narrow: for each column of what `read` yields whether float32 holds all values that it had so far.
      without_weight: how many rows had the weight 0.
    """

    def __init__(self, columns: Columns, schema: Schema | None = None, dtype: DTypeLike = np.float32):
        self.columns, self.dtype = columns, np.dtype(dtype)
        self.names = columns.taken
        known = {c.name: c.values for c in schema.inputs if isinstance(c, Category)} if schema else {}
        self.codes = {n: {v: code for code, v in enumerate(known.get(n, ()))} for n in columns.categorical}
        self._predicts = schema is not None
        # float32 does not hold the numbers of rows.
        self.narrow = (*[True] * (len(columns.features) + len(columns.target) + 1), False, False)
        self.without_weight = 0
        self._missing: dict[str, tuple[int, str]] = {}  # column -> how many values, and where the first is

    def read(self, table: Table, rows: int | None = None) -> Iterator[np.ndarray]:
        """The rows of a table in batches of that many, so that sums over them do not depend on how its parts are cut.

        A row of weight 0 is left out before anything is learned or checked of it, and gets no number: all else is as
        if the table did not have it.

        Yields:
          [n, inputs + targets + 3] float64: numbers, codes of categories, NaN where missing; then, as the constants
          `WEIGHT`, `ROW` and `NUMBER` of `dpreg.data.schema` have it, the row's weight, which row of the table it is,
          and its number among those with a weight, both from 0.

        Raises:
          InputError: for what is no number, not finite as `dtype`, or not in the range of weights or logarithms.
        """
        seen, first, waiting = 0, 0, list[np.ndarray]()
        # Dates that begin with blanks have no type of their own.
        blank = [name for name in self.columns.dates if pa.types.is_null(table.columns[name])]
        for part in itertools.chain(table.read(self.names, [*self.columns.categorical, *blank]), (None,)):
            if part is not None:
                waiting.append(self._raw(part, seen))
                seen += part.batch.num_rows
            if not waiting:
                continue
            size = rows or max(1, _BATCH_BYTES // (8 * waiting[0].shape[1]))
            while (have := sum(map(len, waiting))) >= size or (part is None and have):
                raw = np.concatenate(waiting) if len(waiting) > 1 else waiting[0]
                batch, waiting = raw[:size], [raw[size:]]
                batch[:, NUMBER] = np.arange(first, first + len(batch))  # float64 holds every number below 2**53
                first += len(batch)
                yield batch

    def _raw(self, part: Part, seen: int) -> np.ndarray:
        """The rows of a part that have a weight, not numbered yet; `seen` rows of the table are before it."""
        columns = self.columns
        rows = np.arange(part.batch.num_rows)
        if columns.weight_column:
            # Of the dtype of the model, in which a small weight may be 0.
            weight = _numbers(part, columns.weight_column, part.batch.column(columns.weight_column), self.dtype)
            rows = np.flatnonzero(weight.astype(self.dtype) != 0)
            if len(rows) < len(weight):
                self.without_weight += len(weight) - len(rows)
                part = part.take(rows)
        raw = np.ones((len(rows), len(columns.features) + len(columns.target) + 3))
        raw[:, ROW] = seen + rows
        for at, name in enumerate(self.names):
            column = part.batch.column(name)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            if name in self.codes:
                raw[:, at] = self._coded(part, name, column)
            elif name in columns.dates:
                raw[:, at] = _days(part, name, column)
            else:
                raw[:, at] = _numbers(part, name, column, self.dtype)
        self.narrow = (*(n and self._is_narrow(part, at) for at, n in enumerate(self.narrow[:ROW])), False, False)
        gone = np.isnan(raw)
        for at in map(int, np.flatnonzero(gone.any(axis=0))):
            name = self.names[at]
            count, where = self._missing.get(name, (0, part.where(int(gone[:, at].argmax()))))
            self._missing[name] = count + int(gone[:, at].sum()), where
        if columns.weight_column and (bad := raw[:, WEIGHT] < 0).any():
            raise InputError(
                f"{part.where(int(bad.argmax()))}: column {columns.weight_column!r}: the weight is negative; "
                "use 0 or more"
            )
        if columns.target_transform == "log":
            for at, name in enumerate(columns.target, len(columns.features)):
                if (bad := raw[:, at] <= 0).any():
                    where = part.where(int(bad.argmax()))
                    raise InputError(
                        f"{where}: column {name!r} is not above 0, and has no logarithm; use another --target_transform"
                    )
                raw[:, at] = np.log(raw[:, at])
        return raw

    def _is_narrow(self, part: Part, at: int) -> bool:
        """Whether float32 holds all values of a column of a part."""
        if at == len(self.names):
            return True  # weights of 1
        name = self.names[at]
        if name in self.codes:
            return True  # up to a million
        as_it_is = at < len(self.columns.features) or self.columns.target_transform != "log"
        return as_it_is and name not in self.columns.dates and part.batch.column(name).type in _NARROW

    def _coded(self, part: Part, name: str, column: pa.Array) -> np.ndarray:
        """Categories as their codes; NaN where missing: null, NaN or empty."""
        try:
            if pa.types.is_floating(column.type):
                column = pa.array(column.to_numpy(zero_copy_only=False) + 0.0, from_pandas=True)  # and no -0
            text = column.cast(pa.string())
        except (pa.ArrowException, TypeError, ValueError) as error:
            reason = (
                f"has no categories but {column.type}: {' '.join(str(error).split())[:100]}; take it from --categorical"
            )
            raise InputError(f"{part.where(0)}: column {name!r} {reason}") from error
        encoded = pc.dictionary_encode(pc.if_else(pc.equal(text, ""), None, text))
        codes = self.codes[name]
        values = [value and spelled(value) for value in encoded.dictionary.to_pylist()]
        if self._predicts:
            own = np.array([codes.get(value, -1) for value in values], np.float64)
        else:
            own = np.array([codes.setdefault(value, len(codes)) for value in values], np.float64)
        if len(codes) > _MOST_CATEGORIES:
            raise InputError(
                f"{part.where(0)}: column {name!r} has more than {_MOST_CATEGORIES:,} categories by here; "
                "leave it out with --exclude"
            )
        indices = encoded.indices.to_numpy(zero_copy_only=False).astype(np.float64)  # NaN where missing
        return np.where(np.isnan(indices), np.nan, own[np.nan_to_num(indices).astype(np.intp)] if len(own) else np.nan)

    def there(self, raw: np.ndarray) -> np.ndarray:
        """Which rows are used: with --missing=drop those without missing values."""
        if self.columns.missing != "drop":
            return np.ones(len(raw), bool)
        there: np.ndarray = ~np.isnan(raw).any(axis=1)
        return there

    def refuse_missing(self, table: str) -> None:
        """Raises InputError where values are missing that may not be."""
        columns = self.columns
        filled = columns.features if columns.missing == "mean" else ()
        wrong = {name: m for name, m in self._missing.items() if columns.missing != "drop" and name not in filled}
        if wrong:
            least = "at least " if self._predicts else ""
            each = "; ".join(
                f"column {name!r} has {least}{n:,}, the first in {where}" for name, (n, where) in wrong.items()
            )
            remedy = "drop" if columns.missing == "mean" or self._predicts else "drop or --missing=mean"
            raise InputError(f"{table}: values are missing: {each}; mend them, or use --missing={remedy}")


def _numbers(part: Part, name: str, column: pa.Array, dtype: np.dtype) -> np.ndarray:
    """A column as float64 [n], NaN where missing.

    Raises:
      InputError: for what is no number, or not finite as the dtype that the model sees.
    """
    kind = column.type
    if pa.types.is_boolean(kind):
        column = column.cast(pa.uint8())
    elif pa.types.is_decimal(kind):
        column = column.cast(pa.float64())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise InputError(_not_numeric(part, name, column))
    values: np.ndarray = column.to_numpy(zero_copy_only=False).astype(np.float64, copy=False)
    most = min(float(np.finfo(dtype).max), _LARGEST)
    bad = np.abs(values) > most  # False for NaN
    if bad.any():
        raise InputError(
            f"{part.where(int(bad.argmax()))}: column {name!r} has a value that is not finite as {dtype}"
            + (f", or beyond {most:g}" if most == _LARGEST else "")
            + "; mend it, or leave the column out with --exclude"
        )
    return values


def _days(part: Part, name: str, column: pa.Array) -> np.ndarray:
    """A column of dates, times or durations as float64 [n]: days, since the beginning of 1970 (UTC)."""
    if _is_text(column.type):
        try:
            column = column.cast(pa.timestamp("us"))
        except pa.ArrowInvalid as error:
            row = first_wrong(column, pa.timestamp("us"))
            value = column[row].as_py()
            raise InputError(
                f"{part.where(row)}: column {name!r} has {value!r}, which is no date such as 2026-01-31; "
                "mend it, or take the column from --dates"
            ) from error
    kind = column.type
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        column = column.cast(pa.timestamp("us", getattr(kind, "tz", None)), safe=False).cast(pa.int64())
    elif pa.types.is_duration(kind):
        column = column.cast(pa.duration("us"), safe=False).cast(pa.int64())
    elif not pa.types.is_null(kind):
        raise InputError(f"{part.where(0)}: column {name!r} holds no dates but {kind}; take it from --dates")
    days: np.ndarray = column.to_numpy(zero_copy_only=False).astype(np.float64) / _MICROSECONDS_A_DAY
    return days


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _not_numeric(part: Part, name: str, column: pa.Array) -> str:
    if pa.types.is_temporal(column.type) and not pa.types.is_time(column.type):
        return f"{part.where(0)}: column {name!r} is not numeric but {column.type}; use --dates={name}, or --exclude"
    hint = "choose columns with --features or --exclude"
    if not _is_text(column.type):
        return f"{part.where(0)}: column {name!r} is not numeric but {column.type}; {hint}"
    row = next((i for i, value in enumerate(column.to_pylist()) if value is not None and not _is_number(value)), None)
    if row is None:
        return f"{part.where(0)}: column {name!r} holds numbers written as text; store numbers, or use --categorical"
    value = column[row].as_py()
    remedy = f"{hint}, or --categorical" if value.strip() else "leave no blanks where a value is missing"
    return f"{part.where(row)}: column {name!r} has {value!r}, which is no number; {remedy}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
