"""Tables in files, as streams of record batches: CSV, Parquet and NumPy."""

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
from dpreg.tables.standalone import spelled, text_of
from dpreg.tables.values import TEXTS, parse

_READ_BYTES = 1 << 20

Kinds = Mapping[str, pa.DataType]  # what columns are read as: `NUMBERS`, `DATES` or `TEXTS` of `dpreg.tables.values`


@dataclasses.dataclass(frozen=True)
class Part:
    """A batch of consecutive rows of a table: where they are from, for messages.

    Attributes:
      file: the file.
      first: the number of its first row in that file, from 0.
      batch: the columns asked for, in that order.
      rows: [n] which rows these are, counted from `first`; None where they are consecutive.
    """

    file: str
    first: int
    batch: pa.RecordBatch
    rows: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> "Part":
        """Some rows of a part with consecutive ones, by their positions [n]."""
        return dataclasses.replace(self, batch=self.batch.take(pa.array(rows)), rows=rows)

    def column(self, at: int) -> pa.Array:
        """The values of a column by its position, not as a dictionary."""
        column = self.batch.column(at)
        return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column

    def where(self, row: int) -> str:
        """The place of a row of the batch, counted from 1."""
        return f"{self.file}, row {self.first + int(row if self.rows is None else self.rows[row]) + 1:,}"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table that is read in a stream.

    Attributes:
      name: as the user gave it.
      columns: the names of its columns in all its files, in order.
      groups: columns that one name stands for, such as those of a matrix.
      stream: the rows of some columns in order. What is text there, in CSV and in names of folders, becomes the kind
        asked for; other files have types of their own.
      sign: gives what identifies its files as they are now: it changes when the files do.
      index: the columns that pandas wrote as the index of a DataFrame: no features unless they are named.
    """

    name: str
    columns: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]]
    stream: Callable[[Kinds], Iterator[Part]]
    sign: Callable[[], Signature] = tuple
    index: frozenset[str] = frozenset()
    signature: Signature = dataclasses.field(init=False)  # when it was opened

    def __post_init__(self) -> None:
        object.__setattr__(self, "signature", self.sign())

    def require(self, columns: Iterable[str]) -> None:
        """Raises InputError for a column that is not there."""
        known = set(self.columns)
        for column in columns:
            if column not in known:
                raise InputError(f"{self.name}: column {column!r} is not there; use one of {quote_names(self.columns)}")

    def read(self, kinds: Kinds) -> Iterator[Part]:
        """The rows of some columns in order.

        Raises:
          InputError: for what cannot be read, and when a file has changed since the table was opened.
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
    """A table in a file, in the files that match a pattern, or in all files of a folder, in the order of their names.

    .csv (also .csv.gz, .csv.bz2 and .csv.zst) with a header, .parquet (also .parq and .pq), .npy, and .npz: of the
    latter two a vector is a column, and a matrix NAME (without a name: c) the columns NAME0, NAME1 and so on. Folders
    named KEY=VALUE give a column KEY. Files may order their columns otherwise; a CSV file of no bytes has no rows.

    Args:
      name: of the file or folder, or the pattern.
      setting: that named it, for messages.

    Raises:
      InputError: for what is not there, not readable, or has columns of the same name.
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

    def stream(kinds: Kinds) -> Iterator[Part]:
        for file in files:
            yield from _read_file(file, headers[file.path], kinds, files[0].path)

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
    """What a file says of its columns.

    Attributes:
      columns: by their names without blanks around them, as they are written.
      groups, index: as those of a Table.
    """

    columns: Mapping[str, str]
    groups: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    index: tuple[str, ...] = ()


def _read_header(file: File) -> _Header:
    groups, index, columns = dict[str, tuple[str, ...]](), tuple[str, ...](), dict[str, str]()
    with _Readable(file):
        if file.format == "csv":
            written = csv_files.read_header(file.path)
        elif file.format == "parquet":
            schema = pyarrow.parquet.read_schema(file.path)
            written, index = schema.names, _index_of(schema)
        else:
            written, groups = numpy_files.read_header(file.path)
        for name in written:
            if name.strip() in columns:
                raise InputError(f"{file.path}: there are two columns {name.strip()!r}; rename one")
            columns[name.strip()] = name
    return _Header(columns, groups, index)


def _index_of(schema: pa.Schema) -> tuple[str, ...]:
    """The columns of a Parquet file that were the index of a pandas DataFrame; one of consecutive numbers is none."""
    try:
        described = json.loads((schema.metadata or {}).get(b"pandas", b"{}"))
        return tuple(name for name in described.get("index_columns", ()) if isinstance(name, str))
    except (ValueError, AttributeError, TypeError):
        return ()  # another program's


def _read_file(file: File, header: _Header, kinds: Kinds, first_file: str) -> Iterator[Part]:
    own = {name: kind for name, kind in kinds.items() if name in header.columns}
    for column in kinds:
        if column not in own and column not in file.partition and header.columns:
            raise InputError(
                f"{file.path}: there is no column {column!r}, as there is in another file of that table; "
                "give all files the same columns"
            )
    read = {"csv": csv_files.read_csv, "parquet": _read_parquet}.get(file.format, numpy_files.read_numpy)
    first = 0
    with _Readable(file):
        for batch in read(file.path, {header.columns[name]: kind for name, kind in own.items()}):
            rows = batch.num_rows
            if rows:
                part = Part(file.path, first, batch)
                yield dataclasses.replace(part, batch=_with_partition(part, file, list(own), kinds))
            first += rows


def _with_partition(part: Part, file: File, own: Sequence[str], kinds: Kinds) -> pa.RecordBatch:
    """The columns of a batch, and those that the file's folders give, in the order asked for."""
    columns = dict(zip(own, part.batch.columns, strict=True))
    for name, text in file.partition.items():
        if name in columns:
            values = pc.unique(columns[name]).to_pylist()
            if {None if value is None else spelled(text_of(value)) for value in values} != {text and spelled(text)}:
                raise InputError(
                    f"{part.where(0)}: column {name!r} differs from that of its folder, {text}; remove one"
                )
        elif name in kinds:
            (value,) = parse(pa.array([text], TEXTS), kinds[name], name, part.where)
            columns[name] = pa.repeat(value, part.batch.num_rows)
    return pa.RecordBatch.from_arrays([columns[name] for name in kinds], list(kinds))


def _read_parquet(file: str, kinds: Kinds) -> Iterator[pa.RecordBatch]:
    # Buffered ahead, Arrow would keep all row groups until the end.
    with pyarrow.parquet.ParquetFile(file, buffer_size=_READ_BYTES, pre_buffer=False) as opened:
        for batch in opened.iter_batches(numpy_files.batch_rows(len(kinds)), columns=list(kinds)):
            yield batch.select(list(kinds))


class _Readable:
    """Makes one line of what goes wrong while a file is read."""

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
