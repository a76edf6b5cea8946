"""Ingest: a table becomes memory-mapped rows, read once, checked once and shuffled once.

Two passes keep memory bounded whatever the table's size. The first reads the table in a stream, finds what is
missing or wrong, learns moments and vocabularies from the training rows, and drops the rows into buckets by the
high bits of a keyed hash of their number. The second takes one bucket after another, sorts it by that hash, and
writes what the model sees. So the order is that of the hash, whatever the buckets, the parts or the memory.
"""

import collections
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpreg.config import Columns
from dpreg.data.order import keyed_hash
from dpreg.data.schema import Category, Moments, Number, Schema, vocabulary
from dpreg.data.sources import RegressionData, Rows
from dpreg.data.tables import Part, Table, open_table
from dpreg.data.tfds import open_tfds
from dpreg.errors import InputError

_FORMAT = 1  # of the cache; another one is another key
_IN_MEMORY_BYTES = 256 << 20  # raw rows up to this size need no buckets on disk
_BUCKETS = 256
_BATCH_ROWS = 1 << 16
_ENCODED_BYTES = 16 << 20  # written at once
_HELD_OUT, _ORDER = 1, 2  # keys of the hashes of row numbers
_LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class MappedSource:
    """Rows in files, mapped into memory.

    Attributes:
      x, y, weight: what the model sees, as `dpreg.data.sources.Source` gives it.
      row: [n] int64, the number of each row in the table, from 0.
      digest: its fingerprint.
    """

    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    row: np.ndarray
    digest: str

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, indices: np.ndarray) -> Rows:
        return {"x": self.x[indices], "y": self.y[indices], "weight": self.weight[indices]}

    def fingerprint(self) -> str:
        """Of all values, in their order; taken when they were written."""
        return self.digest


@dataclasses.dataclass(frozen=True)
class Ingested:
    """A table as a model sees it: rows to fit, rows held out, and what its columns are."""

    train: MappedSource
    val: MappedSource | None
    schema: Schema


Progress = Callable[[int], None]  # told how many rows are read


def read_table(
    name: str,
    columns: Columns,
    *,
    batch_size: int = 32,
    validation_dataset: str | None = None,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    progress: Progress = lambda rows: None,
) -> RegressionData:
    """The rows of a table, held out, scaled and shuffled as asked for; read from its files the first time only.

    Args:
      name: a file, a pattern or a folder, as for `dpreg.data.tables.open_table`; or tfds:NAME.
      columns: what to take from it.
      batch_size: rows of a global batch.
      validation_dataset: another table, all of whose rows are held out.
      data_dir: where TFDS datasets are prepared.
      cache_dir: where tables lie once they are read; ~/.cache/dpreg/tables by default.
      progress: told now and then how many rows are read.

    Raises:
      InputError: as `ingest`.
    """
    validation = None
    if name.startswith("tfds:"):
        table, validation, target, inputs = open_tfds(name.removeprefix("tfds:"), data_dir)
        if not columns.target:
            columns = dataclasses.replace(columns, target=target)
            if not columns.features and not columns.exclude:
                columns = dataclasses.replace(columns, features=inputs)
    else:
        table = open_table(name)
    if not columns.target:
        raise InputError(f"{table.name}: say what to predict with --target; it has {', '.join(table.columns)}")
    if validation_dataset is not None:
        validation = open_table(validation_dataset)
    cache = pathlib.Path(cache_dir or "~/.cache/dpreg/tables").expanduser()
    rows = ingest(table, columns, cache, validation, progress)
    return RegressionData(rows.train, rows.val, batch_size, rows.schema)


def ingest(
    table: Table,
    columns: Columns,
    cache: pathlib.Path,
    validation: Table | None = None,
    progress: Progress = lambda rows: None,
) -> Ingested:
    """The rows of a table, from the cache where they are there already.

    Args:
      table: what to fit.
      columns: what to take from it.
      cache: the folder of all caches. Processes may share it: what is not complete is not seen.
      validation: rows to hold out; a share of the table's own by default.
      progress: told now and then how many rows are read.

    Raises:
      InputError: for columns that are not there or not numbers, values that are missing or not finite (names the
        file, the column and the row), no rows, and a full disk.
    """
    columns = _of_table(columns, table)
    what = [_FORMAT, table.signature, validation.signature if validation else None, dataclasses.asdict(columns)]
    folder = cache / hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
    if not (folder / "manifest.json").exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with _new_folder(folder) as new:
                _write(table, validation, columns, new, progress)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise InputError(f"--cache_dir={cache}: the disk is full; free some of it, or name another") from error
            if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
                raise InputError(f"--cache_dir={cache}: cannot be written: {error.strerror}; name another") from error
            raise
    return _opened(folder)


@contextlib.contextmanager
def _new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder that gets its name when it is complete, and goes away when that fails.

    What an interrupted ingest has left is taken away, too: it is not of this minute, and nobody holds its lock.
    """
    for left in folder.parent.glob("*.new-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime < 60:
                continue
            with (left / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
    new = pathlib.Path(tempfile.mkdtemp(prefix=f"{folder.name}.new-", dir=folder.parent))
    try:
        with (new / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield new
            (new / "lock").unlink()
            with contextlib.suppress(OSError):  # another process was faster, with the same rows
                new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write(table: Table, validation: Table | None, columns: Columns, folder: pathlib.Path, progress: Progress) -> None:
    learned = _Learned(columns)
    with _Buckets(folder / "train") as train, _Buckets(folder / "val") as val:
        read = 0
        for number, raw in _numbered(map(learned.raw, table.read(learned.asked, columns.categorical))):
            held_out = np.zeros(len(raw), bool)
            if validation is None:
                held_out = keyed_hash(number, _HELD_OUT) < np.uint32(columns.validation_fraction * 0xFFFFFFFF)
            there = learned.there(raw)
            learned.learn(raw[there & ~held_out])
            train.add(raw, number, there & ~held_out)
            val.add(raw, number, there & held_out)
            progress(read := read + len(raw))
        more = validation.read(learned.asked, columns.categorical) if validation else ()
        for number, raw in _numbered(map(learned.raw, more)):
            val.add(raw, number, learned.there(raw))
            progress(read := read + len(raw))
        learned.refuse_missing(table.name)
        if not train.rows:
            besides = " besides those held out" if val.rows else ""
            raise InputError(f"{table.name}: there are no rows to fit{besides}")
        if validation is not None and not val.rows:
            raise InputError(f"{validation.name}: there are no rows to hold out")
        if not learned.weight > 0:
            raise InputError(f"{table.name}: all weights in column {columns.weight_column!r} are 0")
        schema, codes = learned.schema(train.rows)
        digests = {name: _encode(kept, folder / name, schema, codes) for name, kept in (("train", train), ("val", val))}
    manifest = {
        "format": _FORMAT,
        "table": table.name,
        "rows": {"train": train.rows, "val": val.rows},
        "digests": digests,
        "schema": schema.to_json(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _numbered(parts: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(numbers [n], rows [n, c]) in even batches, so that sums over them do not depend on how the parts are cut."""
    first, waiting = 0, list[np.ndarray]()
    for part in itertools.chain(parts, (None,)):
        if part is not None:
            waiting.append(part)
            if sum(map(len, waiting)) < _BATCH_ROWS:
                continue
        rows = np.concatenate(waiting) if waiting else np.empty((0, 1))
        while len(rows) >= _BATCH_ROWS or (part is None and len(rows)):
            yield np.arange(first, first + min(len(rows), _BATCH_ROWS), dtype=np.int64), rows[:_BATCH_ROWS]
            first, rows = first + _BATCH_ROWS, rows[_BATCH_ROWS:]
        waiting = [rows] if len(rows) else []


def _of_table(columns: Columns, table: Table) -> Columns:
    """With the features named, and groups of columns by their members.

    Raises:
      InputError: for a column that is not there, or that is asked for twice.
    """

    def named(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(column for name in names for column in table.groups.get(name, (name,)))

    weight = (columns.weight_column,) if columns.weight_column else ()
    taken = {*named(columns.target), *named(columns.exclude), *weight}
    features = named(columns.features) or tuple(name for name in table.columns if name not in taken)
    full = dataclasses.replace(
        columns,
        target=named(columns.target),
        features=features,
        exclude=named(columns.exclude),
        categorical=named(columns.categorical),
    )
    asked = (*features, *full.target, *weight)
    for name in (*asked, *full.exclude, *full.categorical):
        if name not in table.columns:
            there = ", ".join(map(repr, table.columns))
            raise InputError(f"{table.name}: column {name!r} is not there; the columns are {there}")
    for name in asked:
        if asked.count(name) > 1:
            raise InputError(f"{table.name}: column {name!r} is asked for twice; name it once")
    for name in full.categorical:
        if name not in features:
            raise InputError(f"{table.name}: --categorical={name} is no feature")
    if not features:
        raise InputError(f"{table.name}: there is no column to fit on besides the target")
    return full


class _Learned:
    """What the first pass learns of the columns."""

    def __init__(self, columns: Columns):
        self.columns = columns
        weight = (columns.weight_column,) if columns.weight_column else ()
        self.asked = (*columns.features, *columns.target, *weight)
        self._codes = {name: dict[str, int]() for name in columns.categorical}
        self._counts = {name: collections.Counter[int]() for name in columns.categorical}
        self._moments = Moments.none(len(columns.features) + len(columns.target))
        self._missing: dict[str, tuple[int, str]] = {}  # column -> how many values, and where the first is
        self.weight = 0.0  # of all rows that are fitted

    def raw(self, part: Part) -> np.ndarray:
        """Rows [n, columns asked for + 1] float64: numbers, codes of categories, NaN where missing; a weight last."""
        raw = np.ones((part.batch.num_rows, len(self.columns.features) + len(self.columns.target) + 1))
        for at, name in enumerate(self.asked):
            column = part.batch.column(name)
            if name in self._codes:
                try:
                    raw[:, at] = self._coded(name, column)
                except pa.ArrowException as error:
                    reason = f"has no categories but {column.type}: {' '.join(str(error).split())[:100]}"
                    raise InputError(f"{part.where(0)}: column {name!r} {reason}") from error
            else:
                raw[:, at] = _numbers(part, name, column)
            gone = np.isnan(raw[:, at])
            if gone.any():
                count, where = self._missing.get(name, (0, part.where(int(gone.argmax()))))
                self._missing[name] = count + int(gone.sum()), where
        if self.columns.weight_column and (raw[:, -1] < 0).any():
            where = part.where(int((raw[:, -1] < 0).argmax()))
            raise InputError(f"{where}: the weight is negative; weights are 0 or more")
        for at, name in enumerate(self.columns.target, len(self.columns.features)):
            if self.columns.target_transform != "log":
                continue
            if (bad := raw[:, at] <= 0).any():
                raise InputError(f"{part.where(int(bad.argmax()))}: {name!r} is not above 0: it has no logarithm")
            raw[:, at] = np.log(raw[:, at])
        return raw

    def _coded(self, name: str, column: pa.Array) -> np.ndarray:
        """Categories as numbers, in the order of their first appearance; NaN where missing: null, NaN or empty."""
        if pa.types.is_floating(column.type):
            column = pa.array(column.to_numpy(zero_copy_only=False) + 0.0, from_pandas=True)  # and no -0
        text = column.cast(pa.string())
        encoded = pc.dictionary_encode(pc.if_else(pc.equal(text, ""), None, text))
        codes = self._codes[name]
        own = np.array([codes.setdefault(value, len(codes)) for value in encoded.dictionary.to_pylist()], np.float64)
        indices = encoded.indices.to_numpy(zero_copy_only=False).astype(np.float64)  # NaN where missing
        return np.where(np.isnan(indices), np.nan, own[np.nan_to_num(indices).astype(np.intp)] if len(own) else np.nan)

    def there(self, raw: np.ndarray) -> np.ndarray:
        """Which rows are used: with --missing=drop those without missing values."""
        if self.columns.missing != "drop":
            return np.ones(len(raw), bool)
        return ~np.isnan(raw).any(axis=1)

    def learn(self, raw: np.ndarray) -> None:
        """Takes in rows that are fitted."""
        self._moments.add(raw[:, :-1])
        self.weight += float(raw[:, -1].astype(np.float32).sum(dtype=np.float64))
        for name in self._codes:
            values = raw[:, self.columns.features.index(name)]
            self._counts[name].update(dict(zip(*np.unique(values[~np.isnan(values)], return_counts=True), strict=True)))

    def refuse_missing(self, table: str) -> None:
        """Raises InputError where values are missing that may not be."""
        columns = self.columns
        filled = columns.features if columns.missing == "mean" else ()
        wrong = {name: m for name, m in self._missing.items() if columns.missing != "drop" and name not in filled}
        if wrong:
            each = "; ".join(f"column {name!r} has {n:,}, the first in {where}" for name, (n, where) in wrong.items())
            remedy = "drop" if columns.missing == "mean" else "drop or --missing=mean"
            raise InputError(f"{table}: values are missing: {each}; mend them, or use --missing={remedy}")

    def schema(self, rows: int) -> tuple[Schema, list[np.ndarray | None]]:
        """The schema, and for each input the positions of its codes among the schema's categories."""
        columns, inputs, codes = self.columns, list[Number | Category](), list[np.ndarray | None]()
        scales = self._moments.scale(rows, columns.standardize is not False)
        for at, name in enumerate(columns.features):
            if name in self._codes:
                names = list(self._codes[name])
                counted = {names[int(code)]: int(count) for code, count in self._counts[name].items()}
                values, counts = vocabulary(counted, columns.max_categories)
                inputs.append(Category(name, values, counts))
                place = {value: position for position, value in enumerate(values)}
                codes.append(np.array([*(place.get(value, len(values)) for value in names), len(values)], np.float64))
            else:
                mean, scale = scales[at]
                if not self._moments.count[at]:
                    raise InputError(f"column {name!r} has no value in the rows to fit: leave it out with --exclude")
                fill = float(self._moments.mean[at]) if columns.missing == "mean" else None
                inputs.append(Number(name, mean, scale, fill))
                codes.append(None)
        scaled = columns.target_transform == "standardize"
        moments = self._moments.scale(rows, True)[len(columns.features) :]
        targets = [Number(t, *(m if scaled else (0.0, 1.0))) for t, m in zip(columns.target, moments, strict=True)]
        schema = Schema(tuple(inputs), tuple(targets))
        for feature, count in collections.Counter(schema.features).items():
            if count > 1:
                raise InputError(f"two features would be called {feature!r}: rename a column or a category")
        return schema, codes


def _numbers(part: Part, name: str, column: pa.Array) -> np.ndarray:
    """A column as float64 [n], NaN where missing.

    Raises:
      InputError: for what is no number, or not finite as float32.
    """
    kind = column.type
    if pa.types.is_boolean(kind):
        column = column.cast(pa.uint8())
    elif pa.types.is_decimal(kind):
        column = column.cast(pa.float64())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise InputError(_not_numeric(part, name, column))
    values = column.to_numpy(zero_copy_only=False).astype(np.float64)
    bad = np.abs(values) > _LARGEST  # False for NaN
    if bad.any():
        raise InputError(f"{part.where(int(bad.argmax()))}: column {name!r} has a value that is not finite as float32")
    return values


def _not_numeric(part: Part, name: str, column: pa.Array) -> str:
    hint = "choose columns with --features or --exclude"
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return f"{part.where(0)}: column {name!r} is not numeric but {column.type}; {hint}"
    row = next((i for i, value in enumerate(column.to_pylist()) if value is not None and not _is_number(value)), 0)
    value = column[row].as_py()
    return f"{part.where(row)}: column {name!r} has {value!r}, which is no number; {hint}, or --categorical"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class _Buckets:
    """Rows put in the order of a hash of their numbers: in memory while they are few, on disk by its high bits."""

    def __init__(self, prefix: pathlib.Path):
        self.rows = 0
        self._prefix = prefix
        self._kept: list[np.ndarray] = []
        self._bytes = 0
        self._files: list[BinaryIO] = []
        self._open = contextlib.ExitStack()
        self._width = 0

    def __enter__(self) -> "_Buckets":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def add(self, raw: np.ndarray, number: np.ndarray, which: np.ndarray) -> None:
        """Takes in those rows [n, c] of a batch, with their numbers [n]."""
        # float64 holds every number below 2**53.
        rows = np.concatenate([raw[which], number[which, None].astype(np.float64)], axis=1)
        self.rows, self._width = self.rows + len(rows), rows.shape[1]
        self._kept.append(rows)
        self._bytes += rows.nbytes
        if self._files or self._bytes > _IN_MEMORY_BYTES:
            self._spill()

    def _spill(self) -> None:
        if not self._files:
            for bucket in range(_BUCKETS):
                path = f"{self._prefix}.{bucket}"
                self._files.append(self._open.enter_context(open(path, "w+b")))  # noqa: SIM115 (the stack closes it)
        for rows in self._kept:
            buckets = (_order(rows) >> np.uint32(24)).astype(np.intp)
            inside = np.argsort(buckets, kind="stable")
            ends = np.searchsorted(buckets[inside], np.arange(_BUCKETS + 1))
            sorted_rows = rows[inside]
            for number, file in enumerate(self._files):
                file.write(sorted_rows[ends[number] : ends[number + 1]].data)
        self._kept, self._bytes = [], 0

    def in_order(self) -> Iterator[np.ndarray]:
        """All rows [n, c + 1], the row's number last, in parts. They can be had once."""
        if not self._files:
            yield from (_sorted(np.concatenate(self._kept)),) if self._kept else ()
            self._kept = []
            return
        for file in self._files:
            file.seek(0)
            yield _sorted(np.frombuffer(file.read(), np.float64).reshape(-1, self._width))
            file.close()
            os.unlink(file.name)


def _order(rows: np.ndarray) -> np.ndarray:
    return keyed_hash(rows[:, -1].astype(np.uint32), _ORDER)


def _sorted(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort((rows[:, -1], _order(rows)))]


def _encode(buckets: _Buckets, prefix: pathlib.Path, schema: Schema, codes: Sequence[np.ndarray | None]) -> str:
    """Writes what the model sees of the rows, in their final order; gives its fingerprint."""
    digests = {name: hashlib.blake2b(digest_size=32) for name in ("x", "y", "weight")}
    inputs, targets = len(schema.inputs), len(schema.targets)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(f"{prefix}.{name}", "wb")) for name in ("x", "y", "weight", "row")}
        at_once = max(1, _ENCODED_BYTES // (4 * len(schema.features)))
        ordered = (part[i : i + at_once] for part in buckets.in_order() for i in range(0, len(part), at_once))
        for rows in ordered:
            for at, place in enumerate(codes):
                if place is not None:  # the last stands for a missing value
                    rows[:, at] = place[np.where(np.isnan(rows[:, at]), len(place) - 1, rows[:, at]).astype(np.intp)]
            written = {
                "x": schema.x(rows[:, :inputs]),
                "y": schema.y(rows[:, inputs : inputs + targets]),
                "weight": rows[:, -2].astype(np.float32),
                "row": rows[:, -1].astype(np.int64),
            }
            for name, names in (("x", schema.features), ("y", [target.name for target in schema.targets])):
                bad = ~np.isfinite(written[name])
                if bad.any():
                    row, column = np.unravel_index(bad.argmax(), bad.shape)
                    number = int(rows[row, -1]) + 1
                    raise InputError(
                        f"row {number}: {names[column]!r} is not finite once it is scaled; mend that value"
                    )
            for name, values in written.items():
                values = np.ascontiguousarray(values)
                files[name].write(values.data)
                if name in digests:
                    digests[name].update(values.data)
    return " ".join(digest.hexdigest() for digest in digests.values())


def _opened(folder: pathlib.Path) -> Ingested:
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        schema = Schema.from_json(manifest["schema"])
        sources = {
            name: _mapped(folder / name, manifest["rows"][name], schema, manifest["digests"][name])
            for name in ("train", "val")
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: the cache is damaged ({error}); delete that folder") from error
    train = sources["train"]
    assert train is not None
    return Ingested(train, sources["val"], schema)


def _mapped(prefix: pathlib.Path, rows: int, schema: Schema, digest: str) -> MappedSource | None:
    if not rows:
        return None

    def column(name: str, dtype: type, *width: int) -> np.ndarray:
        return np.asarray(np.memmap(f"{prefix}.{name}", dtype, "r", shape=(rows, *width)))

    x = column("x", np.float32, len(schema.features))
    y = column("y", np.float32, len(schema.targets))
    return MappedSource(x, y, column("weight", np.float32), column("row", np.int64), digest)
