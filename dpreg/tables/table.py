"""Reads tables in CSV, Parquet and NumPy files as streams of record batches."""

import collections
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from dpreg.errors import InputError, quote_names
from dpreg.tables import csv_files, numpy_files
from dpreg.tables.files import File, Signature, list_files, sign
from dpreg.tables.standalone import normalize_category, to_text
from dpreg.tables.values import TEXTS, parse

_READ_BYTES = 1 << 20

Kinds = Mapping[str, pa.DataType]  # column -> the type to read it as, `NUMBERS`, `DATES` or `TEXTS` of `values.py`


@dataclasses.dataclass(frozen=True)
class TableChunk:
    """A batch of rows of a table, with their place in a file for messages.

    Attributes:
      file: the file.
      first: the number of the first row in that file, from 0.
      batch: the requested columns, in the requested order.
      rows: [n] the numbers of the rows, relative to `first`; None if the rows are consecutive.
    """

    file: str
    first: int
    batch: pa.RecordBatch
    rows: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> "TableChunk":
        """Selects rows by their positions [n], from a chunk of consecutive rows."""
        return dataclasses.replace(self, batch=self.batch.take(pa.array(rows)), rows=rows)

    def column(self, at: int) -> pa.Array:
        """The values of a column by its position, without dictionary encoding."""
        column = self.batch.column(at)
        return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column

    def where(self, row: int) -> str:
        """The place of a row, as `FILE, row NUMBER`, with numbers from 1; the file if the chunk has no such row."""
        if row >= len(self.batch):
            return self.file
        return f"{self.file}, row {self.first + int(row if self.rows is None else self.rows[row]) + 1:,}"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table that is read as a stream.

    Attributes:
      name: the name that the user gave.
      columns: the names of the columns of all its files, in order.
      groups: maps a name to the columns that it stands for, such as those of a matrix.
      stream: yields the rows of some columns in order. Text in CSV files and names of folders is converted to the
        requested types; other files keep their types.
      sign: returns the current signature of its files, which changes when the files do.
      index: the columns that pandas wrote as the index of a DataFrame; they are features only if they are named.
      signature: the signature when the table was opened.
    """

    name: str
    columns: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]]
    stream: Callable[[Kinds], Iterator[TableChunk]]
    sign: Callable[[], Signature] = tuple
    index: frozenset[str] = frozenset()
    signature: Signature = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "signature", self.sign())

    def require(self, columns: Iterable[str]) -> None:
        """Raises InputError for a missing column."""
        known = set(self.columns)
        for column in columns:
            if column not in known:
                raise InputError(f"{self.name}: column {column!r} is not there; use one of {quote_names(self.columns)}")

    def read(self, kinds: Kinds) -> Iterator[TableChunk]:
        """Yields the rows of some columns in order.

        Raises:
          InputError: for values that cannot be read, and if a file has changed since the table was opened.
        """
        try:
            yield from self.stream(kinds)
        except InputError:
            self._refuse_changes()
            raise
        self._refuse_changes()

    def _refuse_changes(self) -> None:
        try:
            changed = set(self.sign()) ^ set(self.signature)
        except (OSError, InputError) as error:
            raise InputError(f"{self.name}: files changed while they were read ({error}); start again") from error
        if changed:
            files = quote_names(sorted({file for file, *_ in changed}), 3)
            raise InputError(f"{self.name}: {files} changed while the table was read; start again")


def open_table(name: str, setting: str = "dataset") -> Table:
    """Opens a table in a file, in the files that match a pattern, or in all files of a folder, sorted by name.

    It reads .csv with a header (also .csv.gz, .csv.bz2 and .csv.zst), .parquet (also .parq and .pq), .npy and .npz. In
    the last two, a vector is a column, and a matrix NAME (c in .npy) is the columns NAME0, NAME1 and so on. Folders
    named KEY=VALUE give a column KEY. The order of columns may differ between files. An empty CSV file has no rows.

    Args:
      name: the file, folder or pattern.
      setting: the setting with that name, for messages.

    Raises:
      InputError: for files that are missing or unreadable, or have two columns of the same name.
    """
    files = list_files(name, setting)
    headers = {file.path: _read_header(file) for file in files}
    if not any(header.columns for header in headers.values()):
        raise InputError(f"{files[0].path}: Empty CSV file: there are no columns; give a header and rows")
    columns = dict.fromkeys(column for header in headers.values() for column in header.columns)
    columns |= dict.fromkeys(key for file in files for key in file.partition)
    groups = collections.defaultdict[str, dict[str, None]](dict)
    for header in headers.values():
        for group, members in header.groups.items():
            groups[group] |= dict.fromkeys(members)

    def stream(kinds: Kinds) -> Iterator[TableChunk]:
        for file in files:
            yield from _read_file(file, headers[file.path], kinds)

    return Table(
        name,
        tuple(columns),
        {group: tuple(members) for group, members in groups.items()},
        stream,
        lambda: sign(list_files(name, setting)),
        frozenset(column for header in headers.values() for column in header.index),
    )


@dataclasses.dataclass(frozen=True)
class _Header:
    """The columns of a file.

    Attributes:
      columns: maps the names without surrounding blanks to the names in the file.
      groups, index: see `Table`.
    """

    columns: Mapping[str, str]
    groups: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    index: tuple[str, ...] = ()


def _read_header(file: File) -> _Header:
    groups, index, columns = dict[str, tuple[str, ...]](), tuple[str, ...](), dict[str, str]()
    with _Readable(file):
        if file.format == "csv":
            names = csv_files.read_header(file.path)
        elif file.format == "parquet":
            schema = pyarrow.parquet.read_schema(file.path)
            names, index = schema.names, _find_index_columns(schema)
        else:
            names, groups = numpy_files.read_header(file.path)
        for name in names:
            if name.strip() in columns:
                raise InputError(f"{file.path}: there are two columns {name.strip()!r}; rename one")
            columns[name.strip()] = name
    return _Header(columns, groups, index)


def _find_index_columns(schema: pa.Schema) -> tuple[str, ...]:
    """The columns of a Parquet file that were the index of a pandas DataFrame. A RangeIndex is not a column."""
    try:
        metadata = json.loads((schema.metadata or {}).get(b"pandas", b"{}"))
        return tuple(name for name in metadata.get("index_columns", ()) if isinstance(name, str))
    except (ValueError, AttributeError, TypeError):
        return ()  # metadata that pandas did not write


def _read_file(file: File, header: _Header, kinds: Kinds) -> Iterator[TableChunk]:
    own = {name: kind for name, kind in kinds.items() if name in header.columns}
    for column in kinds:
        if column not in own and column not in file.partition and header.columns:
            raise InputError(
                f"{file.path}: there is no column {column!r}, which another file of the table has; "
                "give all files the same columns"
            )
    read = {"csv": csv_files.read_csv, "parquet": _read_parquet}.get(file.format, numpy_files.read_numpy)
    first = 0
    with _Readable(file):
        for batch in read(file.path, {header.columns[name]: kind for name, kind in own.items()}):
            rows = batch.num_rows
            if rows:
                chunk = TableChunk(file.path, first, batch)
                yield dataclasses.replace(chunk, batch=_add_partition(chunk, file, list(own), kinds))
            first += rows


def _add_partition(chunk: TableChunk, file: File, own: Sequence[str], kinds: Kinds) -> pa.RecordBatch:
    """Adds the columns in the names of the file's folders, and returns the columns in the requested order."""
    columns = dict(zip(own, chunk.batch.columns, strict=True))
    for name, text in file.partition.items():
        if name in columns:
            values = pc.unique(columns[name]).to_pylist()
            if {None if value is None else normalize_category(to_text(value)) for value in values} != {
                text and normalize_category(text)
            }:
                raise InputError(
                    f"{chunk.where(0)}: column {name!r} differs from the name of its folder, {text}; remove one"
                )
        elif name in kinds:
            (value,) = parse(pa.array([text], TEXTS), kinds[name], name, chunk.where)
            columns[name] = pa.repeat(value, chunk.batch.num_rows)
    return pa.RecordBatch.from_arrays([columns[name] for name in kinds], list(kinds))


def _read_parquet(file: str, kinds: Kinds) -> Iterator[pa.RecordBatch]:
    # With pre_buffer, Arrow keeps all row groups in memory until the end.
    with pyarrow.parquet.ParquetFile(file, buffer_size=_READ_BYTES, pre_buffer=False) as opened:
        for batch in opened.iter_batches(numpy_files.batch_rows(len(kinds)), columns=list(kinds)):
            yield batch.select(list(kinds))


class _Readable:
    """A context manager that converts errors from reading a file to an InputError of one line."""

    _ERRORS = (pa.ArrowException, OSError, EOFError, ValueError, KeyError, *numpy_files.ERRORS)

    def __init__(self, file: File):
        self._file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, self._ERRORS) and not isinstance(error, InputError):
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"{self._file.path}: not a readable {self._file.format} file: {reason[:200]}; repair or remove it"
            ) from error
