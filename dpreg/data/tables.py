"""Tables in files, as streams of record batches: CSV, Parquet and NumPy."""

import contextlib
import dataclasses
import glob
import itertools
import math
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from dpreg.errors import InputError

_BATCH_ROWS, _BATCH_BYTES = 1 << 16, 32 << 20  # read at once: what is reached first
_CSV_BLOCK_BYTES, _READ_BYTES = 8 << 20, 1 << 20


@dataclasses.dataclass(frozen=True)
class Part:
    """A batch of consecutive rows of a table: where they are from, for messages.

    Attributes:
      file: the file.
      first: the number of its first row in that file, from 0.
      batch: the columns asked for.
      rows: [n] which rows these are, counted from `first`; None where they are consecutive.
    """

    file: str
    first: int
    batch: pa.RecordBatch
    rows: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> "Part":
        """Some rows of a part with consecutive ones, by their positions [n]."""
        return dataclasses.replace(self, batch=self.batch.take(pa.array(rows)), rows=rows)

    def where(self, row: int) -> str:
        """The place of a row of the batch, counted from 1."""
        return f"{self.file}, row {self.first + int(row if self.rows is None else self.rows[row]) + 1:,}"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table that is read in a stream.

    Attributes:
      name: as the user gave it.
      columns: its column names, in order, with their types as far as the beginning of the table tells.
      groups: columns that one name stands for, such as those of a matrix.
      signature: of each file its absolute path, its size and its times: it changes when the files do.
      read: the rows of some columns in order, the text columns among them as strings.
    """

    name: str
    columns: dict[str, pa.DataType]
    groups: dict[str, tuple[str, ...]]
    signature: tuple[tuple[str, int, int, int], ...]
    read: Callable[[Sequence[str], Sequence[str]], Iterator[Part]]

    def require(self, columns: Iterable[str]) -> None:
        """Raises InputError for a column that is not there."""
        for column in columns:
            if column not in self.columns:
                there = ", ".join(map(repr, self.columns))
                raise InputError(f"{self.name}: column {column!r} is not there; use one of {there}")


def open_table(name: str, flag: str = "dataset") -> Table:
    """A table in a file, in the files that match a pattern, or in the files of a folder, in the order of their names.

    .csv (also .csv.gz) with a header, .parquet, .npy, and .npz: of the latter two a vector is a column, and a
    matrix NAME (without a name: c) the columns NAME0, NAME1 and so on.

    Args:
      name: of the file or folder, or the pattern.
      flag: that named it, for messages.

    Raises:
      InputError: for what is not there, not readable, or has columns of the same name.
    """
    files = _files(name, flag)
    kinds = {_kind(file).removesuffix(".gz") for file in files}
    if len(kinds) > 1:
        raise InputError(
            f"--{flag}={name}: the files are of different kinds, {' and '.join(sorted(kinds))}; "
            "name those of one, by a pattern"
        )
    _, read = _READERS[kinds.pop()]
    columns, groups = _header_of(files[0])

    def parts(asked: Sequence[str], texts: Sequence[str]) -> Iterator[Part]:
        for file in files:
            # A later file may order its columns otherwise, or write them with blanks.
            own = columns if file == files[0] else _header_of(file)[0]
            for column in asked:
                if column not in own:
                    raise InputError(
                        f"{file}: there is no column {column!r}, as there is in {files[0]}; "
                        "give all files the same columns"
                    )
            kinds = {own[c].name: pa.string() if c in texts else columns[c].type for c in asked}
            first = 0
            with _Readable(file):
                for batch in read(file, kinds):
                    if batch.num_rows:
                        yield Part(file, first, batch.rename_columns(list(asked)))
                    first += batch.num_rows

    types = {column: field.type for column, field in columns.items()}
    return Table(name, types, groups, tuple(map(signature_of, files)), parts)


def signature_of(file: str) -> tuple[str, int, int, int]:
    """(absolute path, size, time of its bytes, time of its name) of a file."""
    stat = os.stat(file)
    return os.path.abspath(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _header_of(file: str) -> tuple[dict[str, pa.Field], dict[str, tuple[str, ...]]]:
    """The columns of a file by their names without blanks around them, and the groups of columns."""
    columns = dict[str, pa.Field]()
    with _Readable(file):
        fields, groups = _READERS[_kind(file)][0](file)
        for field in fields:
            if columns.setdefault(field.name.strip(), field) is not field:
                raise InputError(f"{file}: there are two columns {field.name.strip()!r}; rename one")
    return columns, groups


def _files(name: str, flag: str) -> list[str]:
    if not name:
        raise InputError(f"--{flag}=: it is empty; name a file, a pattern or a folder")
    path = pathlib.Path(name)
    if path.is_dir():
        files = sorted(
            str(file) for file in path.iterdir() if _kind(str(file)) and not file.name.startswith((".", "_"))
        )
    elif path.exists():
        files = [name]
    else:
        files = sorted(glob.glob(name))
    if not files:
        found = "no readable file in that folder" if path.is_dir() else "no such file"
        raise InputError(
            f"--{flag}={name}: there is {found}; name one, or a folder with some, of {', '.join(_READERS)}"
        )
    for file in files:
        if not _kind(file):
            kinds = ", ".join(_READERS)
            raise InputError(f"--{flag}={name}: unknown kind; use {kinds} (or tfds:NAME, with --dataset)")
    return files


def _kind(file: str) -> str:
    return next((kind for kind in _READERS if file.lower().endswith(kind)), "")


class _Readable:
    """Makes one line of what goes wrong while a file is read."""

    def __init__(self, file: str):
        self._file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (pa.ArrowException, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile)) and (
            not isinstance(error, InputError)
        ):
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"{self._file}: not a readable {_kind(self._file)[1:]} file: {reason[:200]}; mend it, or leave it out"
            ) from error


Header = tuple[list[pa.Field], dict[str, tuple[str, ...]]]  # columns, and those that one name stands for
Kinds = dict[str, pa.DataType]


def _open_csv(file: str, kinds: Kinds | None = None, quoted_missing: bool = True) -> pa.csv.CSVStreamingReader:
    return pyarrow.csv.open_csv(
        pa.input_stream(file, compression="gzip" if file.lower().endswith(".gz") else None),
        read_options=pyarrow.csv.ReadOptions(block_size=_CSV_BLOCK_BYTES, use_threads=False),  # messages name the row
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=kinds,
            include_columns=list(kinds or ()),
            strings_can_be_null=True,
            quoted_strings_can_be_null=quoted_missing,
        ),
    )


def _is_numeric(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind))


def _inspect_csv(file: str) -> Header:
    try:
        return list(_open_csv(file).schema), {}
    except pa.ArrowInvalid as error:
        raise _with_row(error) from error


def _read_csv(file: str, kinds: Kinds) -> Iterator[pa.RecordBatch]:
    """In quotes, what is written for a missing value is text to a category, but never a number or a date."""
    kinds = {name: pa.float64() if _is_numeric(kind) else kind for name, kind in kinds.items()}
    texts = {name: kind for name, kind in kinds.items() if pa.types.is_string(kind)}
    others = {name: kind for name, kind in kinds.items() if name not in texts}
    done = 0
    try:
        try:
            for batch in _open_csv(file, kinds, quoted_missing=not texts):
                yield batch
                done += 1
        except pa.ArrowInvalid:
            if not (texts and others):
                raise
            # There may be such a value among numbers: all are read again, apart, in the same batches.
            apart = zip(_open_csv(file, texts, quoted_missing=False), _open_csv(file, others), strict=True)
            for batches in itertools.islice(apart, done, None):
                columns = {name: batch.column(name) for batch in batches for name in batch.schema.names}
                yield pa.RecordBatch.from_pydict({name: columns[name] for name in kinds})
    except pa.ArrowInvalid as error:
        with contextlib.suppress(pa.ArrowInvalid):  # it is no text either
            _refuse_text(file, others)
        raise _with_row(error) from error


def _with_row(error: pa.ArrowInvalid) -> Exception:
    """Arrow counts rows from the header on; we from 1, after it."""
    return ValueError(re.sub(r"Row #(\d+):", lambda found: f"row {int(found[1]) - 1}:", str(error)))


def _refuse_text(file: str, kinds: Kinds) -> None:
    """Raises InputError for the first value that is not of the type that the beginning of the file has shown."""
    first = 0
    for batch in _open_csv(file, dict.fromkeys(kinds, pa.string())):
        for name, kind in kinds.items():
            column = pc.utf8_trim_whitespace(batch.column(name))  # as the parser does
            try:
                column.cast(kind)
            except pa.ArrowInvalid as error:
                row = first_wrong(column, kind)
                what = "number" if pa.types.is_floating(kind) else f"{kind}, as the values before it"
                remedy = "choose columns with --features or --exclude, or --categorical"
                if column[row].as_py() == "":
                    remedy = "leave no blanks where a value is missing"
                raise InputError(
                    f"{file}, row {first + row + 1:,}: column {name.strip()!r} has {column[row].as_py()!r}, "
                    f"which is no {what}; {remedy}"
                ) from error
        first += batch.num_rows


def first_wrong(column: pa.Array, kind: pa.DataType) -> int:
    """The first row that cannot be cast, of a column that cannot."""
    low, high = 0, len(column)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            column.slice(low, middle - low).cast(kind)
            low = middle
        except pa.ArrowInvalid:
            high = middle
    return low


def _inspect_parquet(file: str) -> Header:
    return list(pyarrow.parquet.read_schema(file)), {}


def _read_parquet(file: str, kinds: Kinds) -> Iterator[pa.RecordBatch]:
    # Buffered ahead, Arrow would keep all row groups until the end.
    with pyarrow.parquet.ParquetFile(file, buffer_size=_READ_BYTES, pre_buffer=False) as opened:
        for batch in opened.iter_batches(_batch_rows(len(kinds)), columns=list(kinds)):
            yield batch.select(list(kinds))


def _batch_rows(columns: int) -> int:
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // (8 * columns)))


def _open_arrays(file: str, stack: contextlib.ExitStack) -> dict[str, IO[bytes]]:
    """The arrays of a NumPy file by name, each as a stream that begins with its header."""
    if file.lower().endswith(".npy"):
        return {"c": stack.enter_context(open(file, "rb"))}
    members = stack.enter_context(zipfile.ZipFile(file))
    return {name.removesuffix(".npy"): stack.enter_context(members.open(name)) for name in members.namelist()}


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    try:
        shape, by_columns, dtype = read(stream)
    except Exception as error:  # NumPy parses it as Python
        raise ValueError(f"its header cannot be read: {error}") from error
    if min(shape, default=0) < 0:
        raise ValueError(f"an array has shape {shape}")
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not unpickled")
    if len(shape) not in (1, 2) or (by_columns and len(shape) == 2 and shape[1] > 1):
        raise ValueError(f"an array has shape {shape}: give vectors, and matrices whose rows are contiguous")
    return shape, dtype


def _columns_of(name: str, shape: tuple[int, ...], dtype: np.dtype) -> list[tuple[str, Any, pa.DataType]]:
    """(column, index into a chunk of the array, type) of each column of an array."""

    def kind(of: np.dtype) -> pa.DataType:
        return pa.string() if of.kind in "US" else pa.from_numpy_dtype(of.newbyteorder("="))

    if dtype.names:
        return [(field, field, kind(dtype[field])) for field in dtype.names]
    if len(shape) == 1:
        return [(name, (), kind(dtype))]
    return [(f"{name}{j}", (slice(None), j), kind(dtype)) for j in range(shape[1])]


def _inspect_numpy(file: str) -> Header:
    with contextlib.ExitStack() as stack:
        columns = {name: _columns_of(name, *_header(stream)) for name, stream in _open_arrays(file, stack).items()}
    fields = [pa.field(column, kind) for of_one in columns.values() for column, _, kind in of_one]
    return fields, {name: tuple(column for column, _, _ in of_one) for name, of_one in columns.items()}


def _read_numpy(file: str, kinds: Kinds) -> Iterator[pa.RecordBatch]:
    with contextlib.ExitStack() as stack:
        arrays = {name: (stream, *_header(stream)) for name, stream in _open_arrays(file, stack).items()}
        rows = {shape[0] for _, shape, _ in arrays.values()}
        if len(rows) > 1:
            raise ValueError(f"its arrays have {' and '.join(map(str, sorted(rows)))} rows")
        found = {
            column: (name, index)
            for name, (_, shape, dtype) in arrays.items()
            for column, index, _ in _columns_of(name, shape, dtype)
        }
        needed = {found[column][0] for column in kinds}
        count, at_once = rows.pop(), _batch_rows(sum(math.prod(arrays[name][1][1:]) for name in needed))
        for first in range(0, count, at_once):
            chunks = {name: _chunk(*arrays[name], min(at_once, count - first)) for name in needed}
            columns = [np.ascontiguousarray(chunks[found[c][0]][found[c][1]]) for c in kinds]
            yield pa.RecordBatch.from_arrays([pa.array(column) for column in columns], list(kinds))


def _chunk(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype, rows: int) -> np.ndarray:
    """The next rows of an array, in this machine's byte order."""
    content = stream.read(rows * dtype.itemsize * math.prod(shape[1:]))
    if len(content) != rows * dtype.itemsize * math.prod(shape[1:]):
        raise ValueError("it is cut off")
    return np.frombuffer(content, dtype).reshape(rows, *shape[1:]).astype(dtype.newbyteorder("="), copy=False)


_READERS: dict[str, tuple[Callable[[str], Header], Callable[[str, Kinds], Iterator[pa.RecordBatch]]]] = {
    ".csv": (_inspect_csv, _read_csv),
    ".csv.gz": (_inspect_csv, _read_csv),
    ".parquet": (_inspect_parquet, _read_parquet),
    ".npz": (_inspect_numpy, _read_numpy),
    ".npy": (_inspect_numpy, _read_numpy),
}
