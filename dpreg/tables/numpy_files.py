"""Reads the NumPy files .npy and .npz as a stream of record batches; never unpickles objects."""

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

# Further errors for a damaged archive, an unknown compression, and an encrypted member.
ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError)

_MAX_COLUMNS = 1 << 20  # of an array
_BATCH_ROWS, _BATCH_BYTES = 1 << 16, 32 << 20  # both limit a batch


def batch_rows(columns: int) -> int:
    """The number of rows of a batch with that number of columns."""
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // (8 * max(1, columns))))


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array in a file.

    Attributes:
      name: its name; c in a file .npy.
      stream: the file, at the next value to read.
      shape, dtype: those in its header.
    """

    name: str
    stream: IO[bytes]
    shape: tuple[int, ...]
    dtype: np.dtype

    def columns(self) -> dict[str, Any]:
        """The names of its columns, each with its index into the array."""
        if self.dtype.names:
            return {field: field for field in self.dtype.names}
        if len(self.shape) == 1:
            return {self.name: ()}
        return {f"{self.name}{j}": (slice(None), j) for j in range(self.shape[1])}

    def read(self, rows: int) -> np.ndarray:
        """Reads the next rows, in native byte order."""
        size = rows * self.dtype.itemsize * math.prod(self.shape[1:])
        content = self.stream.read(size)
        if len(content) != size:
            raise ValueError("it is truncated")
        values = np.frombuffer(content, self.dtype).reshape(rows, *self.shape[1:])
        return values.astype(self.dtype.newbyteorder("="), copy=False)


def read_header(file: str) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """The names of all columns, and those of the columns of each array: NAME0, NAME1 and so on for a matrix NAME."""
    with contextlib.ExitStack() as stack:
        groups = {array.name: tuple(array.columns()) for array in _open_arrays(file, stack)}
    return [column for columns in groups.values() for column in columns], groups


def read_numpy(file: str, kinds: Mapping[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
    """Reads some columns in batches, with the types of the arrays.

    Args:
      file: the path.
      kinds: the columns, in the order of the batches; their types are ignored.

    Raises:
      ValueError, OSError, and `ERRORS`: for a file that cannot be read.
    """
    with contextlib.ExitStack() as stack:
        arrays = _open_arrays(file, stack)
        lengths = {array.shape[0] for array in arrays}
        if len(lengths) > 1:
            raise ValueError(f"its arrays have {' and '.join(map(str, sorted(lengths)))} rows")
        places = {column: (array, index) for array in arrays for column, index in array.columns().items()}
        used = {array.name: array for array, _ in (places[column] for column in kinds)}
        rows = lengths.pop()
        size = batch_rows(sum(math.prod(array.shape[1:]) for array in used.values()))
        for first in range(0, rows, size):
            values = {name: array.read(min(size, rows - first)) for name, array in used.items()}
            columns = [np.ascontiguousarray(values[array.name][index]) for array, index in (places[c] for c in kinds)]
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
    """Reads the header of the array in a stream of `size` bytes.

    Raises:
      ValueError: for an array that cannot be read, or does not fill the stream.
    """
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"array {name!r} has version {version} of the format; save it with ASCII column names")
    try:
        shape, fortran_order, dtype = readers[version](stream)
    except Exception as error:  # NumPy parses the header as Python, with many kinds of errors
        raise ValueError(f"the header of array {name!r} cannot be read: {error}") from error
    if dtype.hasobject:
        raise ValueError(f"array {name!r} holds Python objects, which are not unpickled")
    if len(shape) not in (1, 2) or min(shape) < 0 or (fortran_order and len(shape) == 2 and shape[1] > 1):
        raise ValueError(f"array {name!r} has shape {shape}: give vectors, and matrices whose rows are contiguous")
    if len(shape) == 2 and shape[1] > _MAX_COLUMNS:
        raise ValueError(f"array {name!r} has shape {shape}, with more than {_MAX_COLUMNS:,} columns")
    if not dtype.itemsize:
        raise ValueError(f"array {name!r} has values of 0 bytes")
    expected, actual = dtype.itemsize * math.prod(shape), size - stream.tell()
    if expected != actual:
        raise ValueError(f"array {name!r} has shape {shape}, which takes {expected:,} bytes, and it has {actual:,}")
    return _Array(name, stream, shape, dtype)
