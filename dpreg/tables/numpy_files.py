"""NumPy files, .npy and .npz, as batches of columns: streamed, and never unpickled."""

import collections
import contextlib
import dataclasses
import lzma
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np
import pyarrow as pa

# What else is raised for a damaged archive, an unknown compression and an encrypted member.
ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError)

_MOST_COLUMNS = 1 << 20  # of an array
_BATCH_ROWS, _BATCH_BYTES = 1 << 16, 32 << 20  # read at once: what is reached first


def batch_rows(columns: int) -> int:
    """How many rows of so many numbers are read at once."""
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // (8 * max(1, columns))))


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array in a file.

    Attributes:
      name: of the array; c in a file of one.
      stream: at its first value.
      shape, dtype: as its header has them.
    """

    name: str
    stream: IO[bytes]
    shape: tuple[int, ...]
    dtype: np.dtype

    def columns(self) -> dict[str, Any]:
        """The names of its columns, each with its index into rows of the array."""
        if self.dtype.names:
            return {field: field for field in self.dtype.names}
        if len(self.shape) == 1:
            return {self.name: ()}
        return {f"{self.name}{j}": (slice(None), j) for j in range(self.shape[1])}

    def read(self, rows: int) -> np.ndarray:
        """The next rows, in this machine's byte order."""
        size = rows * self.dtype.itemsize * math.prod(self.shape[1:])
        content = self.stream.read(size)
        if len(content) != size:
            raise ValueError("it is cut off")
        values = np.frombuffer(content, self.dtype).reshape(rows, *self.shape[1:])
        return values.astype(self.dtype.newbyteorder("="), copy=False)


def read_header(file: str) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """The names of the columns, and those of each array: of a matrix NAME they are NAME0, NAME1 and so on."""
    with contextlib.ExitStack() as stack:
        groups = {array.name: tuple(array.columns()) for array in _open_arrays(file, stack)}
    return [column for columns in groups.values() for column in columns], groups


def read_numpy(file: str, kinds: Mapping[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
    """The rows of some columns in batches, of the types that the arrays have.

    Raises:
      ValueError, OSError, and `ERRORS`: for what cannot be read.
    """
    with contextlib.ExitStack() as stack:
        arrays = _open_arrays(file, stack)
        lengths = {array.shape[0] for array in arrays}
        if len(lengths) > 1:
            raise ValueError(f"its arrays have {' and '.join(map(str, sorted(lengths)))} rows")
        found = {column: (array, index) for array in arrays for column, index in array.columns().items()}
        needed = {array.name: array for array, _ in (found[column] for column in kinds)}
        rows = lengths.pop()
        at_once = batch_rows(sum(math.prod(array.shape[1:]) for array in needed.values()))
        for first in range(0, rows, at_once):
            chunks = {name: array.read(min(at_once, rows - first)) for name, array in needed.items()}
            columns = [np.ascontiguousarray(chunks[found[c][0].name][found[c][1]]) for c in kinds]
            yield pa.RecordBatch.from_arrays([pa.array(column) for column in columns], list(kinds))


def _open_arrays(file: str, stack: contextlib.ExitStack) -> list[_Array]:
    if file.lower().endswith(".npy"):
        return [_open_array("c", stack.enter_context(open(file, "rb")), os.path.getsize(file))]
    archive = stack.enter_context(zipfile.ZipFile(file))
    twice = [name for name, count in collections.Counter(archive.namelist()).items() if count > 1]
    if twice:
        raise ValueError(f"there are two arrays {twice[0]!r}")
    if not archive.namelist():
        raise ValueError("there are no arrays in it")
    return [
        _open_array(member.filename.removesuffix(".npy"), stack.enter_context(archive.open(member)), member.file_size)
        for member in archive.infolist()
    ]


def _open_array(name: str, stream: IO[bytes], size: int) -> _Array:
    """The array that a stream of so many bytes holds, all of it."""
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"array {name!r} has version {version} of the format; save it with plainer column names")
    try:
        shape, by_columns, dtype = readers[version](stream)
    except Exception as error:  # NumPy parses it as Python
        raise ValueError(f"the header of array {name!r} cannot be read: {error}") from error
    if dtype.hasobject:
        raise ValueError(f"array {name!r} holds Python objects, which are not unpickled")
    if len(shape) not in (1, 2) or min(shape) < 0 or (by_columns and len(shape) == 2 and shape[1] > 1):
        raise ValueError(f"array {name!r} has shape {shape}: give vectors, and matrices whose rows are contiguous")
    if len(shape) == 2 and shape[1] > _MOST_COLUMNS:
        raise ValueError(f"array {name!r} has shape {shape}: that are more than {_MOST_COLUMNS:,} columns")
    if not dtype.itemsize:
        raise ValueError(f"array {name!r} has values of no bytes")
    expected, there = dtype.itemsize * math.prod(shape), size - stream.tell()
    if expected != there:
        raise ValueError(f"array {name!r} has shape {shape}, which takes {expected:,} bytes, and {there:,} are there")
    return _Array(name, stream, shape, dtype)
