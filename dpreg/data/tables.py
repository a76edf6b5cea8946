"""Tables in files, as streams of record batches: CSV, Parquet and NumPy."""

import contextlib
import dataclasses
import glob
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from dpreg.errors import InputError

_BATCH_ROWS = 1 << 16
_CSV_BLOCK_BYTES = 8 << 20


@dataclasses.dataclass(frozen=True)
class Part:
    """A batch of consecutive rows of a table: where they are from, for messages.

    Attributes:
      file: the file.
      first: the number of its first row in that file, from 0.
      batch: the columns asked for.
    """

    file: str
    first: int
    batch: pa.RecordBatch

    def where(self, row: int) -> str:
        """The place of a row of the batch, counted from 1."""
        return f"{self.file}, row {self.first + row + 1}"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table that is read in a stream.

    Attributes:
      name: as the user gave it.
      columns: its column names, in order, with their types as far as the beginning of the table tells.
      groups: columns that one name stands for, such as those of a matrix.
      signature: changes when the files do.
      read: the rows of some columns in order, the text columns among them as strings.
    """

    name: str
    columns: dict[str, pa.DataType]
    groups: dict[str, tuple[str, ...]]
    signature: tuple[str, ...]
    read: Callable[[Sequence[str], Sequence[str]], Iterator[Part]]


def open_table(name: str) -> Table:
    """A table in a file, in the files that match a pattern, or in the files of a folder, in the order of their names.

    .csv (also .csv.gz) with a header, .parquet, .npy, and .npz: of the latter two a vector is a column, and a
    matrix NAME (without a name: c) the columns NAME0, NAME1 and so on.

    Raises:
      InputError: for what is not there, not readable, or has columns of the same name.
    """
    files = _files(name)
    kinds = {_kind(file).removesuffix(".gz") for file in files}
    if len(kinds) > 1:
        raise InputError(f"--dataset={name}: the files are of different kinds: {', '.join(sorted(kinds))}")
    inspect, read = _READERS[kinds.pop()]
    with _Readable(files[0]):
        names, types = inspect(files[0])
        groups = _groups(files[0]) if _kind(files[0]) in (".npy", ".npz") else {}
    stripped = [column.strip() for column in names]
    for column in stripped:
        if stripped.count(column) > 1:
            raise InputError(f"{files[0]}: there are two columns {column!r}: rename one")
    own = dict(zip(stripped, names, strict=True))

    def parts(columns: Sequence[str], texts: Sequence[str]) -> Iterator[Part]:
        for column in columns:
            if column not in own:
                there = ", ".join(map(repr, own))
                raise InputError(f"{name}: column {column!r} is not there; the columns are {there}")
        kinds = {own[c]: pa.string() if c in texts else types[names.index(own[c])] for c in columns}
        for file in files:
            first = 0
            with _Readable(file):
                for batch in read(file, kinds):
                    if batch.num_rows:
                        yield Part(file, first, batch.rename_columns(list(columns)))
                    first += batch.num_rows

    stats = [os.stat(file) for file in files]
    signature = tuple(
        f"{f} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}"
        for f, s in zip(map(os.path.abspath, files), stats, strict=True)
    )
    return Table(name, dict(zip(stripped, types, strict=True)), groups, signature, parts)


def _files(name: str) -> list[str]:
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
        raise InputError(f"--dataset={name}: there is {found}")
    for file in files:
        if not _kind(file):
            raise InputError(f"--dataset={name}: unknown kind; use synthetic, tfds:NAME, or {', '.join(_READERS)}")
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
            raise InputError(f"{self._file}: not a readable {_kind(self._file)[1:]} file: {reason[:200]}") from error


Inspected = tuple[list[str], list[pa.DataType]]
Kinds = dict[str, pa.DataType]


def _open_csv(file: str, kinds: Kinds | None = None) -> pa.csv.CSVStreamingReader:
    numbers = {n: pa.float64() if _is_number(k) else k for n, k in (kinds or {}).items()}
    return pyarrow.csv.open_csv(
        pa.input_stream(file, compression="gzip" if file.lower().endswith(".gz") else None),
        read_options=pyarrow.csv.ReadOptions(block_size=_CSV_BLOCK_BYTES, use_threads=False),  # messages name the row
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=numbers,
            include_columns=list(numbers),
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)


def _inspect_csv(file: str) -> Inspected:
    schema = _open_csv(file).schema
    return schema.names, schema.types


def _read_csv(file: str, kinds: Kinds) -> Iterator[pa.RecordBatch]:
    yield from _open_csv(file, kinds)


def _inspect_parquet(file: str) -> Inspected:
    schema = pyarrow.parquet.ParquetFile(file).schema_arrow
    return schema.names, schema.types


def _read_parquet(file: str, kinds: Kinds) -> Iterator[pa.RecordBatch]:
    with pyarrow.parquet.ParquetFile(file) as opened:
        there = set(opened.schema_arrow.names)
        for name in kinds:
            if name not in there:
                raise InputError(f"{file}: there is no column {name!r}, as there is in the first part")
        for batch in opened.iter_batches(_BATCH_ROWS, columns=list(kinds)):
            yield batch.select(list(kinds))


def _open_arrays(file: str, stack: contextlib.ExitStack) -> dict[str, IO[bytes]]:
    """The arrays of a NumPy file by name, each as a stream that begins with its header."""
    if file.lower().endswith(".npy"):
        return {"c": stack.enter_context(open(file, "rb"))}
    members = stack.enter_context(zipfile.ZipFile(file))
    return {name.removesuffix(".npy"): stack.enter_context(members.open(name)) for name in members.namelist()}


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, by_columns, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not unpickled")
    if len(shape) not in (1, 2) or (by_columns and len(shape) == 2 and shape[1] > 1):
        raise ValueError(f"an array has shape {shape}: give vectors, and matrices whose rows are contiguous")
    return shape, dtype


def _columns_of(name: str, shape: tuple[int, ...], dtype: np.dtype) -> list[tuple[str, Any, pa.DataType]]:
    """(column, index into a chunk of the array, type) of each column of an array."""

    def kind(of: np.dtype) -> pa.DataType:
        return pa.string() if of.kind in "US" else pa.from_numpy_dtype(of)

    if dtype.names:
        return [(field, field, kind(dtype[field])) for field in dtype.names]
    if len(shape) == 1:
        return [(name, (), kind(dtype))]
    return [(f"{name}{j}", (slice(None), j), kind(dtype)) for j in range(shape[1])]


def _groups(file: str) -> dict[str, tuple[str, ...]]:
    """The columns of each matrix."""
    with contextlib.ExitStack() as stack:
        streams = _open_arrays(file, stack).items()
        return {name: tuple(c for c, _, _ in _columns_of(name, *_header(stream))) for name, stream in streams}


def _inspect_numpy(file: str) -> Inspected:
    with contextlib.ExitStack() as stack:
        columns = [
            column
            for name, stream in _open_arrays(file, stack).items()
            for column in _columns_of(name, *_header(stream))
        ]
    return [name for name, _, _ in columns], [kind for _, _, kind in columns]


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
        for first in range(0, rows.pop(), _BATCH_ROWS):
            chunks = {name: _chunk(*arrays[name], first) for name in needed}
            columns = [np.ascontiguousarray(chunks[found[c][0]][found[c][1]]) for c in kinds]
            yield pa.RecordBatch.from_arrays([pa.array(column) for column in columns], list(kinds))


def _chunk(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype, first: int) -> np.ndarray:
    count = min(_BATCH_ROWS, shape[0] - first)
    row = dtype.itemsize * (shape[1] if len(shape) == 2 else 1)
    content = stream.read(count * row)
    if len(content) != count * row:
        raise ValueError("it is cut off")
    return np.frombuffer(content, dtype).reshape(count, *shape[1:])


_READERS: dict[str, tuple[Callable[[str], Inspected], Callable[[str, Kinds], Iterator[pa.RecordBatch]]]] = {
    ".csv": (_inspect_csv, _read_csv),
    ".csv.gz": (_inspect_csv, _read_csv),
    ".parquet": (_inspect_parquet, _read_parquet),
    ".npz": (_inspect_numpy, _read_numpy),
    ".npy": (_inspect_numpy, _read_numpy),
}
