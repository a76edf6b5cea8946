"""Finds, converts and checks the columns of a table."""

import collections
import dataclasses
import itertools
import re
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import pyarrow as pa
from absl import logging
from numpy.typing import DTypeLike

from dpreg.config import Columns
from dpreg.data.schema import GROUP, NUMBER, ROW, WEIGHT, Category, Number, Schema
from dpreg.errors import InputError, is_one_line, quote_names
from dpreg.spelling import spell
from dpreg.tables.codes import encode_texts
from dpreg.tables.formula import resolve_formula
from dpreg.tables.labels import code_labels
from dpreg.tables.standalone import to_text
from dpreg.tables.table import Table, TableChunk
from dpreg.tables.values import DATES, NUMBERS, TEXTS, NotNumericError, days_of, is_text, not_numeric, refuse_mixture

LARGEST = 1e150  # the largest value: squares of larger ones overflow in float64
_NARROW = {pa.bool_(), pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.float16(), pa.float32(), pa.null()}
_UNNAMED = re.compile(r"(?:Unnamed: \d+)?(?:_level_\d+)?")  # as pandas reads a column without a name
_LOGARITHM = re.compile(r"log\((.+)\)")
_BATCH_BYTES = 16 << 20  # of a batch of rows as float64


def resolve(columns: Columns, table: Table) -> Columns:
    """Resolves the names of the features, and groups of columns to their members.

    Raises:
      InputError: for a missing column, and for one that is named twice.
    """
    known = set(table.columns)

    def named(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(c for n in names for c in ((n,) if n in known else table.groups.get(n, (n,))))

    full = dataclasses.replace(
        columns,
        target=named(columns.target),
        exclude=named(columns.exclude),
        categorical=named(columns.categorical),
        dates=named(columns.dates),
    )
    if columns.formula is not None:
        if columns.features:
            raise InputError(f"{spell('features', columns.features)}: {spell('formula')} names them; leave one out")
        full = resolve_formula(full, lambda: _all_features(full, table))
    else:
        full = dataclasses.replace(full, features=named(columns.features) or _all_features(full, table))
    features = full.features
    as_features = set(features)
    if columns.offset_column is not None:  # the last of the features
        full = dataclasses.replace(full, features=(*features, _offset_name(columns.offset_column, known)))
    taken = full.used_columns
    grouped = () if full.group_column is None else (full.group_column,)
    for name in (*taken, *grouped, *full.exclude, *full.categorical, *full.dates):
        if not is_one_line(name):
            raise InputError(f"{table.name}: column {name!r} has characters that cannot be printed; rename it")
    table.require((*taken, *grouped, *full.exclude, *full.categorical, *full.dates))
    for name, count in collections.Counter(taken).items():
        if count > 1:
            raise InputError(f"{table.name}: column {name!r} is asked for twice; name it once")
    for setting, names in (("categorical", full.categorical), ("dates", full.dates)):
        for name in names:
            if name not in as_features:
                raise InputError(
                    f"{table.name}: {spell(setting, (name,))} is not a feature; leave it out there, or name it in "
                    f"{spell('features')}"
                )
    for name in sorted({*full.categorical} & {*full.dates}):
        both = f"{spell('categorical')} and in {spell('dates')}"
        raise InputError(f"{table.name}: column {name!r} is in {both}; choose one")
    if not features:
        raise InputError(
            f"{table.name}: there is no column to fit on besides the target; take some out of {spell('exclude')}"
        )
    return full


def _offset_name(text: str, known: Collection[str]) -> str:
    """The column of an offset, NAME or log(NAME); a column may have such a name itself."""
    logarithm = _LOGARITHM.fullmatch(text)
    return text if text in known or logarithm is None else logarithm[1]


def _all_features(columns: Columns, table: Table) -> tuple[str, ...]:
    """The features if none are named; logs those columns whose treatment a user may not expect."""
    used = {*columns.target, *columns.exclude, columns.weight_column}
    if columns.offset_column is not None:
        used.add(_offset_name(columns.offset_column, table.columns))
    if columns.group_column not in (*columns.categorical, *columns.dates):
        used.add(columns.group_column)
    left_out = [name for name in table.columns if name in table.index - used - {*columns.categorical, *columns.dates}]
    features = tuple(name for name in table.columns if name not in used.union(left_out))
    if left_out:
        logging.warning(
            "%s: %s: the index of a pandas DataFrame, and not a feature; to fit on it, name it in %s",
            *(table.name, quote_names(left_out), spell("features")),
        )
    unnamed = [name for name in features if _UNNAMED.fullmatch(name)]
    if unnamed:
        logging.warning(
            "%s: column %s has no name, as an index that pandas wrote, and is a feature; if it numbers the rows, leave "
            "it out with %s",
            *(table.name, quote_names(unnamed), spell("exclude", (unnamed[0],))),
        )
    return features


class RawReader:
    """Reads columns as float64, and records missing values.

    Args:
      columns: the columns to read, with resolved names.
      schema: the schema of a model with its categories and labels and their codes, where -1 stands for other
        categories. None assigns codes in the order of appearance.
      dtype: the dtype of numbers in the model.

    Attributes:
      labelled: the targets that are read as labels.
      codes: by column of categories or labels, the code of each text.
      fixed: the columns that have no other codes than these.
      narrow: for each column that `read` yields, whether float32 represents all its values so far exactly.
      without_weight: the number of rows with weight 0.
    """

    def __init__(self, columns: Columns, schema: Schema | None = None, dtype: DTypeLike = np.float32):
        self.columns, self.dtype = columns, np.dtype(dtype)
        self.names = columns.used_columns
        self.labelled = columns.target if columns.target_transform == "labels" else ()
        known = {c.name: c.values for c in schema.inputs if isinstance(c, Category)} if schema else {}
        self.codes = {n: {v: code for code, v in enumerate(known.get(n, ()))} for n in columns.categorical}
        self.codes |= {name: code_labels(schema.labels if schema else ()) for name in self.labelled}
        self.fixed = {*self.codes} if schema else set[str]()
        self._kinds = dict.fromkeys(self.names, NUMBERS) | dict.fromkeys(columns.dates, DATES)
        self._kinds |= dict.fromkeys(self.codes, TEXTS)
        self._group, self._codes_of_groups = columns.group_column, dict[str, int]()
        if self._group is not None:
            self._kinds.setdefault(self._group, TEXTS)  # it may be a feature, too
        self._predicts = schema is not None
        self._log_offset = columns.offset_column not in (None, *columns.features[-1:])
        if schema is not None:
            *_, last = schema.inputs
            self._log_offset = isinstance(last, Number) and last.log
        # float32 does not represent all row numbers.
        self.narrow = (*[True] * (len(columns.features) + len(columns.target) + 2), False, False)
        self.without_weight = 0
        self._missing: dict[str, tuple[int, str]] = {}  # column -> how many values, and where the first is
        self._booleans: dict[str, str] = {}  # column -> where the first is
        self._numbers: dict[str, str] = {}  # column -> where the first besides 0 and 1 is

    def read(self, table: Table, rows: int | None = None) -> Iterator[np.ndarray]:
        """The rows of a table in batches of equal size, so that sums over them do not depend on its files.

        A row of weight 0 is skipped before anything is learned from it or checked, and is not counted, as if the table
        did not have it.

        Yields:
          [n, inputs + targets + 4] float64: numbers, and codes of categories, with NaN for missing values; then, at
          `WEIGHT`, `GROUP`, `ROW` and `NUMBER` of `dpreg.data.schema`, the weight of the row, the code of its group,
          its number in the table, and its number among the rows with a weight, all from 0.

        Raises:
          InputError: for values that are not numbers, not finite as `dtype`, or out of range for weights or logarithms,
            and for labels that are not known.
        """
        try:
            yield from self._batches(table, rows)
        except NotNumericError as error:
            if error.column not in self.columns.target:
                raise
            labels, losses = spell("target_transform", "labels"), spell("loss", "logistic", "softmax")
            raise InputError(
                f"{error.problem}; for labels use {losses} ({labels}), or choose another {spell('target')}"
            ) from error

    def _batches(self, table: Table, rows: int | None) -> Iterator[np.ndarray]:
        seen, first, waiting = 0, 0, list[np.ndarray]()
        for chunk in itertools.chain(table.read(self._kinds), (None,)):
            if chunk is not None:
                waiting.append(self._raw(chunk, seen))
                seen += chunk.batch.num_rows
            if not waiting:
                continue
            size = rows or max(1, _BATCH_BYTES // (8 * waiting[0].shape[1]))
            while (have := sum(map(len, waiting))) >= size or (chunk is None and have):
                raw = np.concatenate(waiting) if len(waiting) > 1 else waiting[0]
                batch, waiting = raw[:size], [raw[size:]]
                batch[:, NUMBER] = np.arange(first, first + len(batch))  # exact in float64 below 2**53
                first += len(batch)
                yield batch

    def _raw(self, chunk: TableChunk, seen: int) -> np.ndarray:
        """The rows of a batch of the table that have a weight, not numbered yet; `seen` rows precede the batch."""
        columns = self.columns
        rows = np.arange(chunk.batch.num_rows)
        if columns.weight_column:
            # In the dtype of the model, in which a small weight may underflow to 0.
            weight = _numbers(chunk, columns.weight_column, len(self.names) - 1)
            rows = np.flatnonzero(weight.astype(self.dtype) != 0)
            if len(rows) < len(weight):
                self.without_weight += len(weight) - len(rows)
                chunk = chunk.take(rows)
        raw = np.ones((len(rows), len(columns.features) + len(columns.target) + 4))
        raw[:, GROUP], raw[:, ROW] = 0, seen + rows
        numbers = self._fill(raw, chunk)
        self._refuse_infinite(chunk, raw, numbers)
        self._refuse_mixtures(chunk, raw, numbers)
        self.narrow = (*(n and self._is_narrow(chunk, at) for at, n in enumerate(self.narrow[:ROW])), False, False)
        gone = np.isnan(raw)
        for at in map(int, np.flatnonzero(gone.any(axis=0))):
            name = self.names[at] if at < len(self.names) else str(self._group)
            if at >= len(self.names) and name in self.names:
                continue  # counted as a feature
            count, where = self._missing.get(name, (0, chunk.where(int(gone[:, at].argmax()))))
            self._missing[name] = count + int(gone[:, at].sum()), where
        self._refuse_unknown_labels(chunk, raw)
        if columns.weight_column and (bad := raw[:, WEIGHT] < 0).any():
            raise InputError(
                f"{chunk.where(int(bad.argmax()))}: column {columns.weight_column!r}: the weight is negative; "
                "use 0 or more"
            )
        if columns.target_transform == "log":
            for at in range(len(columns.features), len(columns.features) + len(columns.target)):
                self._take_log(chunk, raw, at, f"use another {spell('target_transform')}")
        if self._log_offset:
            self._take_log(chunk, raw, len(columns.features) - 1, "correct it, or leave out its row")
        return raw

    def _take_log(self, chunk: TableChunk, raw: np.ndarray, at: int, remedy: str) -> None:
        """Replaces a column of a batch by its logarithms."""
        if (bad := raw[:, at] <= 0).any():
            where = chunk.where(int(bad.argmax()))
            raise InputError(f"{where}: column {self.names[at]!r} is not above 0, and has no logarithm; {remedy}")
        raw[:, at] = np.log(raw[:, at])

    def _fill(self, raw: np.ndarray, chunk: TableChunk) -> list[int]:
        """Fills in the columns of a batch, and returns the positions of the numeric ones."""
        numbers, plain = list[int](), list[int]()
        kinds = dict(zip(self._kinds, chunk.batch.schema.types, strict=True))
        for at, (name, kind) in enumerate(kinds.items()):
            wanted = self._kinds[name]
            if wanted == NUMBERS:
                numbers.append(at)
            if is_text(kind):
                _require_utf8(chunk, name, at)
            if name == self._group:
                remedies = (f"name another {spell('group_column')}",) * 2
                raw[:, GROUP] = encode_texts(chunk, name, chunk.column(at), self._codes_of_groups, remedies=remedies)
            if at == len(self.names):  # the group, which is no feature
                break
            if wanted == NUMBERS and kind == pa.float64():
                plain.append(at)
            elif wanted == TEXTS:
                raw[:, at] = self._coded(chunk, name, chunk.column(at))
            elif wanted == DATES:
                raw[:, at] = days_of(name, chunk.column(at), chunk.where)
            else:
                raw[:, at] = _numbers(chunk, name, at)
                if len(raw) and pa.types.is_boolean(chunk.column(at).type):
                    self._booleans.setdefault(name, chunk.where(0))
        if plain:
            raw[:, plain] = chunk.batch.select(plain).to_tensor(null_to_nan=True).to_numpy()
        return numbers

    def _refuse_unknown_labels(self, chunk: TableChunk, raw: np.ndarray) -> None:
        """Raises InputError for a label that is not known, except in a row that is left out for a missing value."""
        for at, name in enumerate(self.columns.target, len(self.columns.features)):
            if name in self.fixed and (bad := self.valid(raw) & (raw[:, at] < 0)).any():
                row = int(bad.argmax())
                raise InputError(
                    f"{chunk.where(row)}: column {name!r} has {to_text(chunk.column(at)[row].as_py())!r:.60}, which is "
                    f"none of the labels {quote_names(self.codes[name])}; correct it, or leave out its row"
                )

    def _refuse_infinite(self, chunk: TableChunk, raw: np.ndarray, numbers: list[int]) -> None:
        """Raises InputError for a number that is not finite in the dtype of the model, after scaling by the schema."""
        most = LARGEST if self._predicts else min(float(np.finfo(self.dtype).max), LARGEST)
        bad = np.abs(raw[:, numbers]) > most  # False for NaN
        if bad.any():
            at = int(bad.any(axis=0).argmax())
            raise InputError(
                f"{chunk.where(int(bad[:, at].argmax()))}: column {self.names[numbers[at]]!r} has a value that is not "
                f"finite as {self.dtype}"
                + (f", or beyond {most:g}" if most == LARGEST else "")
                + f"; correct it, or leave the column out with {spell('exclude', (self.names[numbers[at]],))}"
            )

    def _refuse_mixtures(self, chunk: TableChunk, raw: np.ndarray, numbers: list[int]) -> None:
        """Raises InputError for a column that has booleans, and numbers other than 0 and 1, anywhere in the table."""
        new = [at for at in numbers if self.names[at] not in self._numbers]
        values = raw[:, new]
        other = (values != 0) & (values != 1) & ~np.isnan(values)
        for position in map(int, np.flatnonzero(other.any(axis=0))):
            self._numbers[self.names[new[position]]] = chunk.where(int(other[:, position].argmax()))
        for name, where in self._booleans.items():
            if name in self._numbers:
                raise refuse_mixture(name, where, self._numbers[name])

    def _is_narrow(self, chunk: TableChunk, at: int) -> bool:
        """Whether float32 represents all values of a column in a batch exactly."""
        if at >= len(self.names):
            return True  # weights that are all 1, and codes of groups, which are at most a million
        name = self.names[at]
        if name in self.codes:
            return True  # codes are at most a million
        features = len(self.columns.features) - self._log_offset
        as_it_is = at < features or (at > features - 1 + self._log_offset and self.columns.target_transform != "log")
        return as_it_is and self._kinds[name] != DATES and chunk.batch.schema.field(at).type in _NARROW

    def _coded(self, chunk: TableChunk, name: str, column: pa.Array) -> np.ndarray:
        """The codes of categories or labels; NaN for missing values."""
        if name in self.labelled:
            remedies = f"choose another {spell('target')}", f"use another {spell('loss')}"
        else:
            remedies = f"take it out of {spell('categorical')}", f"leave it out with {spell('exclude', (name,))}"
        return encode_texts(chunk, name, column, self.codes[name], name in self.fixed, name in self.labelled, remedies)

    def valid(self, raw: np.ndarray) -> np.ndarray:
        """[n] bool: which rows are used; with missing="drop", those without missing values."""
        if self.columns.missing != "drop":
            return np.ones(len(raw), bool)
        valid: np.ndarray = ~np.isnan(raw).any(axis=1)
        return valid

    def refuse_missing(self, table: str) -> None:
        """Raises InputError if values are missing and `missing` does not allow it."""
        columns = self.columns
        filled = columns.features if columns.missing == "mean" else ()
        filled = filled[:-1] if columns.offset_column is not None else filled
        filled = tuple(name for name in filled if name != columns.group_column)
        wrong = {name: m for name, m in self._missing.items() if columns.missing != "drop" and name not in filled}
        if wrong:
            least = "at least " if self._predicts else ""
            each = "; ".join(
                f"column {name!r} has {least}{n:,}, the first in {where}" for name, (n, where) in wrong.items()
            )
            remedies = ("drop",) if columns.missing == "mean" or self._predicts else ("drop", "mean")
            raise InputError(f"{table}: values are missing: {each}; fill them in, or use {spell('missing', *remedies)}")


def _require_utf8(chunk: TableChunk, name: str, at: int) -> None:
    """Raises InputError for text that is not UTF-8, as a Parquet file may hold it."""
    try:
        chunk.column(at).validate(full=True)
    except pa.ArrowInvalid as error:
        raise InputError(f"{chunk.where(0)}: column {name!r} holds text that is not UTF-8; correct the file") from error


def _numbers(chunk: TableChunk, name: str, at: int) -> np.ndarray:
    """A column as float64 [n], with NaN for missing values.

    Raises:
      InputError: for a value that is not a number.
    """
    column = chunk.column(at)
    kind = column.type
    if pa.types.is_boolean(kind):
        column = column.cast(pa.uint8())
    elif pa.types.is_decimal(kind):
        column = column.cast(pa.float64())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise not_numeric(name, column, chunk.where)
    values: np.ndarray = column.to_numpy(zero_copy_only=False).astype(np.float64, copy=False)
    return values
