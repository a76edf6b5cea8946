"""Ingest: a table becomes memory-mapped rows, read once, checked once and shuffled once.

Two passes keep memory bounded whatever the table's size. The first streams the table, finds missing and invalid values,
learns moments and categories from the rows to fit and the labels of the target, and shuffles the rows. The second
writes the encoded rows in their new order.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import DTypeLike

from dpreg.config import Columns, Config
from dpreg.data.prefetch import prefetch
from dpreg.data.sampler import keyed_hash
from dpreg.data.schema import GROUP, NUMBER, ROW, Schema
from dpreg.data.sources import RegressionData
from dpreg.distributed.presence import at_work
from dpreg.errors import InputError, prefix_errors, quote_names
from dpreg.spelling import spell
from dpreg.tables.cache import (
    COLUMNS,
    ColumnWriter,
    DamagedCacheError,
    MappedSource,
    Part,
    block_rows,
    new_folder,
    opened,
    write_manifest,
)
from dpreg.tables.columns import RawReader, resolve
from dpreg.tables.formula import refuse_numbers
from dpreg.tables.shuffle import Shuffle
from dpreg.tables.statistics import ColumnStatistics
from dpreg.tables.table import Table, open_table
from dpreg.tables.tfds import open_tfds
from dpreg.tables.values import NotNumericError

_FORMAT = 10  # version of the cache, a part of its key
_ENCODED_BYTES = 16 << 20  # written at a time
_AHEAD = 2  # batches that are read ahead in a thread
_HELD_OUT = 1  # key of the hash of the numbers of rows or groups that selects validation rows
_MOST_ROWS = 2**31 - 1

Progress = Callable[[str, int], None]  # called with "reading" or "writing", and the number of rows so far


@at_work("reading a table")
def read_table(
    name: str,
    columns: Columns,
    *,
    batch_size: int = Config.batch_size,
    validation_dataset: str | None = None,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    dtype: DTypeLike = np.float32,
    progress: Progress = lambda what, rows: None,
    seed: int = Config.seed,
) -> RegressionData:
    r"""The rows of a table, split, scaled and shuffled; its files are read the first time only.

    Args:
      name: a file, a pattern or a folder, as for `dpreg.tables.table.open_table`; or tfds:NAME.
      columns: the columns to read, and how to encode them.
      batch_size: the number of rows of a global batch.
      validation_dataset: another table, all rows of which are validation rows.
      data_dir: the folder of prepared TFDS datasets.
      cache_dir: the folder of cached tables; ~/.cache/dpreg/tables by default.
      dtype: the dtype of the rows on the host, float32 or float64.
      progress: called at intervals with the activity and the number of rows so far.
      seed: of the choice of the rows that are held out.

    Raises:
      InputError: as `ingest`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "table.csv")
    ...     _ = file.write_text("height,cost\n1,2\n2,4\n3,6\n")
    ...     data = read_table(str(file), Columns(target=("cost",), validation_fraction=0), cache_dir=folder)
    >>> len(data.train), data.schema.features
    (3, ('height',))
    """
    validation = None
    if name.startswith("tfds:"):
        table, validation, target, inputs = open_tfds(name.removeprefix("tfds:"), data_dir)
        if not columns.target:
            columns = dataclasses.replace(columns, target=target)
            if not columns.features and not columns.exclude and columns.formula is None:
                columns = dataclasses.replace(columns, features=inputs)
    else:
        table = open_table(name)
    if not columns.target:
        remedy = spell("target", ("COLUMN",))
        raise InputError(f"{table.name}: say what to predict with {remedy}; it has {quote_names(table.columns)}")
    if validation_dataset is not None:
        validation = open_table(validation_dataset, "validation_dataset")
    cache = pathlib.Path(cache_dir or "~/.cache/dpreg/tables").expanduser()
    train, val, schema = ingest(table, columns, cache, validation, dtype, progress, seed)
    return RegressionData(train, val, batch_size, schema, columns, train.left_out)


def ingest(
    table: Table,
    columns: Columns,
    cache: pathlib.Path,
    validation: Table | None = None,
    dtype: DTypeLike = np.float32,
    progress: Progress = lambda what, rows: None,
    seed: int = Config.seed,
) -> tuple[MappedSource, MappedSource | None, Schema]:
    """The rows to fit of a table, its validation rows, and its schema; from the cache if they are in it.

    Args:
      table: the table.
      columns: the columns to read, and how to encode them.
      cache: the folder of all caches. Processes may share it, since incomplete entries are not visible.
      validation: a table of validation rows; by default, a fraction of `table`.
      dtype: the dtype of the rows.
      progress: called at intervals with the activity and the number of rows so far.
      seed: of the choice of the rows, or the groups, that are held out.

    Raises:
      InputError: for missing columns, values that are not numbers, missing or not finite (names the file, the column
        and the row), labels that cannot be fitted or that only the validation rows have, a table without rows, and a
        full disk.
    """
    columns = resolve(columns, table)
    if validation is not None:
        validation.require((*columns.used_columns, *([columns.group_column] if columns.group_column else [])))
    split = seed if validation is None and columns.validation_fraction else None
    dtype = np.dtype(dtype)
    files = [table.signature, validation.signature if validation else None]
    what = [_FORMAT, str(dtype), *files, dataclasses.asdict(columns), split]
    folder = cache / hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
    try:
        rows = opened(folder)
    except DamagedCacheError as error:
        logging.warning("%s: the cached table is damaged (%s): the table is read anew", folder, error.damage)
        rows = None
    if rows is None:
        try:
            _write_folder(table, validation, columns, dtype, folder, progress, split)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise InputError(
                    f"{spell('cache_dir', cache)}: the disk is full; free some of it, or name another folder"
                ) from error
            if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.EPERM):
                raise InputError(
                    f"{spell('cache_dir', cache)}: cannot be written: {error.strerror}; name another folder"
                ) from error
            raise
        rows = opened(folder)
    if rows is None:
        raise InputError(f"{folder}: was taken away while it was written; start again")
    return rows


def _write_folder(
    table: Table,
    validation: Table | None,
    columns: Columns,
    dtype: np.dtype,
    folder: pathlib.Path,
    progress: Progress,
    split: int | None,
) -> None:
    """Writes the folder of a table. A column of text that is a factor of a formula by its name is a category."""
    found = tuple[str, ...]()
    while True:
        try:
            with new_folder(folder) as new:
                return _write(table, validation, columns, dtype, new, progress, split, found)
        except NotNumericError as error:
            if columns.formula is None or not error.is_text or error.column not in columns.features:
                raise
            found = (*found, error.column)
            columns = dataclasses.replace(columns, categorical=(*columns.categorical, error.column))


def _write(
    table: Table,
    validation: Table | None,
    columns: Columns,
    dtype: np.dtype,
    folder: pathlib.Path,
    progress: Progress,
    split: int | None,
    texts: Sequence[str] = (),
) -> None:
    """Writes the files of a table.

    Args:
      split: the seed of the choice of the rows to hold out; None to hold out none of this table.
      texts: the categories in which a text was found, and no number may be.
    """
    reader = RawReader(columns, dtype=dtype)
    learned, read = ColumnStatistics(reader), 0
    with Shuffle(folder / "train") as train, Shuffle(folder / "val") as val:
        for rows in prefetch(reader.read(table), _AHEAD):
            valid, held_out = reader.valid(rows), _held_out(rows, columns, split)
            fitted = rows[valid & ~held_out]
            with prefix_errors(table.name):
                learned.add(fitted)
            train.add(fitted, reader.narrow)
            learned.add_held_out(others := rows[valid & held_out])
            val.add(others, reader.narrow)
            progress("reading", read := read + len(rows))
        without_weight = reader.without_weight
        with prefix_errors(table.name):
            learned.fix_labels()
        if validation is not None:
            for rows in reader.read(validation):
                val.add(rows[reader.valid(rows)], reader.narrow)
                progress("reading", read := read + len(rows))
        left_out = {"missing": read - train.rows - val.rows, "weight_0": reader.without_weight}
        reader.refuse_missing(table.name)
        refuse_numbers(table.name, reader.codes, texts)
        in_validation = reader.without_weight - without_weight
        _require_rows(table, validation, columns, (train.rows, val.rows), (without_weight, in_validation))
        if read > _MOST_ROWS:
            raise InputError(f"{table.name}: {read:,} rows are more than {_MOST_ROWS:,}; give fewer")
        if learned.largest_weight < float(np.finfo(dtype).tiny / np.finfo(dtype).eps ** 2):
            raise InputError(
                f"{table.name}: the weights in column {columns.weight_column!r} are {learned.largest_weight:.3g} at "
                f"most, and products with them vanish as {dtype}; multiply all by the same number"
            )
        with prefix_errors(table.name):
            schema, codes = learned.schema()
            if schema.terms:
                schema = learned.scaled_terms(schema, _batches(train.in_order(again=True), codes, schema, dtype))
        row_bytes = dtype.itemsize * (len(schema.features) + len(schema.targets) + 1) + np.dtype(np.int64).itemsize
        names = COLUMNS if columns.group_column is None else (*COLUMNS, "group")
        at_once = block_rows(row_bytes)
        written = {}
        for name, shuffled, of in (("train", train, table), ("val", val, validation or table)):
            with prefix_errors(of.name):
                batches = _batches(shuffled.in_order(), codes, schema, dtype)
                written[name] = _encode(batches, folder / name, schema, dtype, names, at_once, progress)
    write_manifest(folder, table.name, schema, dtype, names, at_once, written, left_out)


def _held_out(rows: np.ndarray, columns: Columns, split: int | None) -> np.ndarray:
    """[n] bool: which rows are held out, by the seed `split`; none without one. A group is held out whole."""
    if split is None:
        return np.zeros(len(rows), bool)
    numbers = rows[:, NUMBER if columns.group_column is None else GROUP]
    numbers = np.nan_to_num(numbers)  # where the group is missing, the row is not used
    held_out: np.ndarray = keyed_hash(numbers, _HELD_OUT, split) < np.uint32(columns.validation_fraction * 0xFFFFFFFF)
    return held_out


def _require_rows(
    table: Table, validation: Table | None, columns: Columns, rows: tuple[int, int], without_weight: tuple[int, int]
) -> None:
    """Raises InputError if there are no rows to fit, or none in the table of validation rows.

    Args:
      rows: how many there are to fit, and how many are held out.
      without_weight: how many rows of each table have no weight.
    """
    if not rows[0]:
        besides = " besides those held out" if rows[1] else ""
        if without_weight[0]:
            raise InputError(
                f"{table.name}: all weights in column {columns.weight_column!r} are 0{besides}; give one row at "
                "least a weight"
            )
        raise InputError(f"{table.name}: there are no rows to fit{besides}; give some")
    if validation is not None and not rows[1]:
        if without_weight[1]:
            raise InputError(
                f"{validation.name}: no row held out has a weight in column {columns.weight_column!r}; hold out "
                f"others, or none with {spell('validation_fraction', 0)}"
            )
        raise InputError(f"{validation.name}: there are no rows to hold out; give some")


def _batches(
    parts: Iterable[np.ndarray], codes: Sequence[np.ndarray | None], schema: Schema, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Yields rows in batches, in which codes are what the model reads for them: see `ColumnStatistics.schema`."""
    at_once = max(1, _ENCODED_BYTES // (dtype.itemsize * len(schema.features)))
    for raw in (part[i : i + at_once] for part in parts for i in range(0, len(part), at_once)):
        for at, place in enumerate(codes):
            if place is not None:  # the last one stands for a missing value
                raw[:, at] = place[np.where(np.isnan(raw[:, at]), len(place) - 1, raw[:, at]).astype(np.intp)]
        yield raw


def _encode(
    batches: Iterable[np.ndarray],
    prefix: pathlib.Path,
    schema: Schema,
    dtype: np.dtype,
    names: Sequence[str],
    rows_of_block: int,
    progress: Progress,
) -> Part:
    """Writes the columns of some names, of the encoded rows in their final order."""

    def encoded() -> Iterator[dict[str, np.ndarray]]:
        for raw in batches:
            found = schema.rows(raw, dtype)
            found |= {"row": raw[:, ROW].astype(np.int64), "group": raw[:, GROUP].astype(np.int32)}
            yield {name: found[name] for name in names}

    digests = {name: hashlib.blake2b(digest_size=32) for name in names if name != "row"}
    with contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context(ColumnWriter(prefix.with_name(f"{prefix.name}.{name}"), rows_of_block))
            for name in names
        }
        done = 0
        for rows in prefetch(encoded(), _AHEAD):
            progress("writing", done := done + len(rows["row"]))
            for name, values in rows.items():
                files[name].write(values)
                if name in digests:
                    digests[name].update(values.data)
    fingerprint = " ".join(digest.hexdigest() for digest in digests.values())
    return Part(done, fingerprint, {name: file.checksums for name, file in files.items()})
