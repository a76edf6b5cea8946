"""Reads plain and compressed CSV files as batches of columns of chosen types."""

import codecs
import contextlib
import csv
import io
import re
from collections.abc import Iterator, Mapping

import pyarrow as pa
import pyarrow.csv

from dpreg.tables.values import NUMBERS, TEXTS, parse

_BLOCK_BYTES = 8 << 20  # read at a time
_HEADER_BYTES = 1 << 16  # read first, for the names of the columns
_BLOCK_ROWS = 100  # the least number of rows of a block, for rows as long as the header
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}

Kinds = Mapping[str, pa.DataType]


def read_header(file: str) -> list[str]:
    """The names of the columns as they are written; none for an empty file.

    Raises:
      ValueError, OSError: when there is no header in UTF-8.
    """
    size = _HEADER_BYTES
    while True:
        with _stream(file) as stream:
            content: bytes = stream.read(size)
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError("it is written in UTF-16; save it in UTF-8")
        # Arrow would create a column for each name, which takes seconds for the largest number of names.
        text = content.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape")
        rows = (row for row in csv.reader(io.StringIO(text, newline="")) if row)
        try:
            names = next(rows, [])
            if len(content) < size or next(rows, None) is not None:
                "".join(names).encode()  # raises for unpaired surrogates
                return names
        except csv.Error as error:
            raise ValueError(f"its header cannot be read: {error}") from error
        if size >= _BLOCK_BYTES:
            raise _too_long(size)
        size = min(16 * size, _BLOCK_BYTES)


def read_csv(file: str, kinds: Kinds) -> Iterator[pa.RecordBatch]:
    """The rows in batches.

    A spelling of a missing value in quotes is text in a category, but never a number or a date.

    Args:
      kinds: by the name of the column: `NUMBERS`, `DATES` or `TEXTS` of `dpreg.tables.values`.

    Yields:
      Batches of these columns. A numeric column has the type bool in batches where it holds booleans.

    Raises:
      InputError: for a value that does not have its column's kind; names the row.
      ValueError, OSError: for a file that is not CSV.
    """
    if _is_empty(file):
        return
    texts = {name: kind for name, kind in kinds.items() if kind == TEXTS}
    others = {name: kind for name, kind in kinds.items() if kind != TEXTS}
    block_bytes = max(_BLOCK_BYTES, _BLOCK_ROWS * sum(len(name) + 1 for name in kinds))
    done = rows = 0
    try:
        with contextlib.suppress(pa.ArrowInvalid):
            for batch in _open_with_booleans(file, kinds, not texts, block_bytes):
                yield batch
                done, rows = done + 1, rows + batch.num_rows
            return
        # Arrow cannot parse some value: all are read again as text, in the same batches, and parsed here.
        streams = [
            _open(file, dict.fromkeys(names, TEXTS), quoted_missing, block_bytes)
            for names, quoted_missing in ((texts, False), (others, True))
            if names
        ]
        for number, batches in enumerate(zip(*streams, strict=True)):
            if number < done:
                continue
            columns = {
                name: column for batch in batches for name, column in zip(batch.schema.names, batch, strict=True)
            }

            def where(row: int, first: int = rows) -> str:
                return f"{file}, row {first + row + 1:,}"

            parsed = [parse(columns[name], kind, name.strip(), where) for name, kind in kinds.items()]
            yield pa.RecordBatch.from_arrays(parsed, list(kinds))
            rows += len(parsed[0])
    except pa.ArrowInvalid as error:
        raise _with_row(error) from error


def _open_with_booleans(file: str, kinds: Kinds, quoted_missing: bool, block_bytes: int) -> pa.csv.CSVStreamingReader:
    """A reader, for which numeric columns with true and false in the first block are bool."""
    try:
        return _open(file, kinds, quoted_missing, block_bytes)
    except pa.ArrowInvalid:
        numbers = [name for name, kind in kinds.items() if kind == NUMBERS]
        inferred = _open(file, dict.fromkeys(numbers), True, block_bytes).schema if numbers else ()
        flags = {field.name: field.type for field in inferred if pa.types.is_boolean(field.type)}
        if not flags:
            raise
        return _open(file, {**kinds, **flags}, quoted_missing, block_bytes)


def _open(
    file: str,
    types: Mapping[str, pa.DataType | None],
    quoted_missing: bool,
    block_bytes: int,
) -> pa.csv.CSVStreamingReader:
    """A reader of some columns, which infers the types of those without one."""
    return pyarrow.csv.open_csv(
        _stream(file),
        read_options=pyarrow.csv.ReadOptions(block_size=block_bytes, use_threads=False),  # messages name the row
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: kind for name, kind in types.items() if kind is not None},
            include_columns=list(types),
            strings_can_be_null=True,
            quoted_strings_can_be_null=quoted_missing,
        ),
    )


def _stream(file: str) -> pa.NativeFile:
    compression = next((c for suffix, c in _COMPRESSIONS.items() if file.lower().endswith(suffix)), None)
    return pa.input_stream(file, compression=compression)


def _is_empty(file: str) -> bool:
    with _stream(file) as stream:
        return not stream.read(1)


def _with_row(error: pa.ArrowInvalid) -> ValueError:
    """Arrow counts the header as a row; dpreg counts from 1 after it."""
    if "straddling" in str(error):
        return _too_long(_BLOCK_BYTES)
    return ValueError(re.sub(r"Row #(\d+):", lambda found: f"row {int(found[1]) - 1}:", str(error)))


def _too_long(size: int) -> ValueError:
    return ValueError(f"a row has more than {size:,} bytes, or a quote is not closed")
