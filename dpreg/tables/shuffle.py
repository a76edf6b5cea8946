"""An external shuffle: sorts rows by a keyed hash of their numbers, in memory or in files on disk."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import resource
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from dpreg.data.sampler import keyed_hash

_IN_MEMORY_BYTES = 256 << 20  # larger shuffles use buckets on disk
_BUCKET_BITS = 8  # with 6, a bucket exceeds the cache while it is sorted, which takes a third longer
_OPEN_FILES = 4 << _BUCKET_BITS  # for buckets of training and validation rows, and of a large bucket; and other files
_HASH_KEY = 2


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The layout of rows in a bucket: narrow columns, whose values float32 represents exactly, and float64 ones."""

    narrow: tuple[bool, ...]

    @functools.cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        narrow = np.array(self.narrow)
        return {"narrow": np.flatnonzero(narrow), "wide": np.flatnonzero(~narrow)}

    @functools.cached_property
    def dtype(self) -> np.dtype:
        """The structured dtype of a row."""
        kinds = {"narrow": np.float32, "wide": np.float64}
        return np.dtype([(name, kinds[name], len(columns)) for name, columns in self._columns.items()])

    def pack(self, rows: np.ndarray) -> np.ndarray:
        """Converts rows [n, c] float64 to [n] of `dtype`."""
        packed = np.empty(len(rows), self.dtype)
        for name, columns in self._columns.items():
            packed[name] = rows[:, columns]
        return packed

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        """Converts packed rows back to [n, c] float64."""
        rows = np.empty((len(packed), len(self.narrow)))
        for name, columns in self._columns.items():
            rows[:, columns] = packed[name]
        return rows


class Shuffle:
    """A context manager that collects numbered rows, and yields them in a fixed pseudo-random order.

    A small number of rows is kept in memory. Otherwise they are written to files, in buckets by the highest bits of
    their hash; a bucket that is too large for memory is shuffled in the same way by the next bits.

    Args:
      prefix: the prefix of the names of the files.
      level: 1, or more for the shuffle of a bucket.

    Attributes:
      rows: the number of rows that were added.
    """

    def __init__(self, prefix: pathlib.Path, level: int = 1):
        self.rows = 0
        self._prefix, self._shift = prefix, np.uint32(32 - _BUCKET_BITS * level)
        self._level = level
        self._kept: list[np.ndarray] = []
        self._kept_bytes = 0
        self._files: list[BinaryIO] = []
        self._layouts: list[tuple[_Layout, list[int]]] = []  # each with its start in each file
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Shuffle":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def add(self, rows: np.ndarray, narrow: tuple[bool, ...]) -> None:
        """Adds rows.

        Args:
          rows: [n, c] float64; the last column is the number of the row, from 0 and less than 2**32.
          narrow: for each column, whether float32 represents all its values so far exactly.
        """
        if not len(rows):
            return
        self.rows += len(rows)
        self._kept.append(rows)
        self._kept_bytes += rows.nbytes
        if self._files or self._kept_bytes > _IN_MEMORY_BYTES:
            self._spill(_Layout(narrow))

    def _spill(self, layout: _Layout) -> None:
        if not self._files:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            if soft < _OPEN_FILES:  # the default of some systems
                resource.setrlimit(resource.RLIMIT_NOFILE, (min(_OPEN_FILES, hard), hard))
            for bucket in range(1 << _BUCKET_BITS):
                path = f"{self._prefix}.{bucket}"
                self._files.append(self._open.enter_context(open(path, "w+b")))  # noqa: SIM115 (the stack closes it)
        if not self._layouts or self._layouts[-1][0] != layout:
            self._layouts.append((layout, [file.tell() for file in self._files]))
        for rows in self._kept:
            buckets = _hash_rows(rows) >> self._shift & np.uint32((1 << _BUCKET_BITS) - 1)
            order = np.argsort(buckets.astype(np.uint8), kind="stable")  # a radix sort
            bounds = np.searchsorted(buckets[order], np.arange(len(self._files) + 1))
            by_bucket = np.take(layout.pack(rows), order)
            for number, file in enumerate(self._files):
                file.write(by_bucket[bounds[number] : bounds[number + 1]].data)
        self._kept, self._kept_bytes = [], 0

    def in_order(self, again: bool = False) -> Iterator[np.ndarray]:
        """Yields all rows in their order, in arrays [n, c]. It can be called again only after calls with `again`."""
        if not self._files:
            kept, self._kept = self._kept, self._kept if again else []
            yield from (_sort_rows(np.concatenate(kept)),) if kept else ()
        for bucket, file in enumerate(self._files):
            if file.tell() <= _IN_MEMORY_BYTES or self._shift < _BUCKET_BITS:
                chunks = [rows for rows, _ in self._read_bucket(bucket)]
                yield from (_sort_rows(np.concatenate(chunks)),) if chunks else ()
            else:
                with Shuffle(pathlib.Path(file.name), self._level + 1) as inner:
                    for rows, narrow in self._read_bucket(bucket):
                        inner.add(rows, narrow)
                    yield from inner.in_order()
            if not again:
                file.close()
                os.unlink(file.name)

    def _read_bucket(self, bucket: int) -> Iterator[tuple[np.ndarray, tuple[bool, ...]]]:
        """Yields the rows of a bucket in chunks, each with the narrow columns of its layout."""
        file = self._files[bucket]
        ends = [starts[bucket] for _, starts in self._layouts[1:]] + [file.tell()]
        file.seek(0)
        for (layout, _), end in zip(self._layouts, ends, strict=True):
            while (unread := end - file.tell()) > 0:
                content = file.read(min(unread, layout.dtype.itemsize << 16))
                yield layout.unpack(np.frombuffer(content, layout.dtype)), layout.narrow


def _hash_rows(rows: np.ndarray) -> np.ndarray:
    hashes: np.ndarray = keyed_hash(rows[:, -1].astype(np.uint32), _HASH_KEY)
    return hashes


def _sort_rows(rows: np.ndarray) -> np.ndarray:
    """Sorts rows by their hash, and those with equal hashes by their number."""
    return rows[np.argsort(_hash_rows(rows).astype(np.uint64) << np.uint64(32) | rows[:, -1].astype(np.uint64))]
