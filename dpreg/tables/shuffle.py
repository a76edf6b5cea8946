"""An external shuffle: rows in the order of a keyed hash of their numbers, whatever memory and parts there are."""

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

_IN_MEMORY_BYTES = 256 << 20  # rows up to this size need no buckets on disk
_BUCKET_BITS = 8  # with 6, a bucket no longer stays in cache while it is sorted: 3/4 of the speed
_OPEN_FILES = 4 << _BUCKET_BITS  # of rows to fit, of rows held out, of a bucket that is too large; and all else
_ORDER = 2  # the key of the hash


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How rows lie in a bucket: some columns as float32, which holds all their values, the others as float64."""

    narrow: tuple[bool, ...]

    @functools.cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        narrow = np.array(self.narrow)
        return {"narrow": np.flatnonzero(narrow), "wide": np.flatnonzero(~narrow)}

    @functools.cached_property
    def dtype(self) -> np.dtype:
        """Of a row."""
        kinds = {"narrow": np.float32, "wide": np.float64}
        return np.dtype([(name, kinds[name], len(columns)) for name, columns in self._columns.items()])

    def packed(self, rows: np.ndarray) -> np.ndarray:
        """[n, c] float64 -> [n] of `dtype`."""
        packed = np.empty(len(rows), self.dtype)
        for name, columns in self._columns.items():
            packed[name] = rows[:, columns]
        return packed

    def unpacked(self, packed: np.ndarray) -> np.ndarray:
        """The rows that were packed."""
        rows = np.empty((len(packed), len(self.narrow)))
        for name, columns in self._columns.items():
            rows[:, columns] = packed[name]
        return rows


class Shuffle:
    """Takes in numbered rows, and gives them back in their fixed pseudo-random order.

    They wait in memory while they are few, else on disk in buckets by the high bits of the hash; a bucket that is
    too large for memory is shuffled likewise, by the next bits. A context manager: the files go with it.

    Args:
      prefix: of the files.
    """

    def __init__(self, prefix: pathlib.Path, level: int = 1):
        self.rows = 0
        self._prefix, self._shift = prefix, np.uint32(32 - _BUCKET_BITS * level)
        self._level = level
        self._kept: list[np.ndarray] = []
        self._kept_bytes = 0
        self._files: list[BinaryIO] = []
        self._layouts: list[tuple[_Layout, list[int]]] = []  # with where each begins in each file
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Shuffle":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def add(self, rows: np.ndarray, narrow: tuple[bool, ...]) -> None:
        """Takes in rows [n, c] float64, whose last column is their number, from 0, less than 2**32.

        Args:
          narrow: for each column whether float32 holds all values of it that were taken in so far.
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
            allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            if allowed < _OPEN_FILES:  # as some systems have it
                resource.setrlimit(resource.RLIMIT_NOFILE, (min(_OPEN_FILES, most), most))
            for bucket in range(1 << _BUCKET_BITS):
                path = f"{self._prefix}.{bucket}"
                self._files.append(self._open.enter_context(open(path, "w+b")))  # noqa: SIM115 (the stack closes it)
        if not self._layouts or self._layouts[-1][0] != layout:
            self._layouts.append((layout, [file.tell() for file in self._files]))
        for rows in self._kept:
            buckets = _order(rows) >> self._shift & np.uint32((1 << _BUCKET_BITS) - 1)
            inside = np.argsort(buckets.astype(np.uint8), kind="stable")  # a radix sort
            ends = np.searchsorted(buckets[inside], np.arange(len(self._files) + 1))
            by_bucket = np.take(layout.packed(rows), inside)
            for number, file in enumerate(self._files):
                file.write(by_bucket[ends[number] : ends[number + 1]].data)
        self._kept, self._kept_bytes = [], 0

    def in_order(self) -> Iterator[np.ndarray]:
        """All rows [n, c], in parts. They can be had once."""
        if not self._files:
            kept, self._kept = self._kept, []
            yield from (_sorted(np.concatenate(kept)),) if kept else ()
        for bucket, file in enumerate(self._files):
            if file.tell() <= _IN_MEMORY_BYTES or self._shift < _BUCKET_BITS:
                parts = [rows for rows, _ in self._of_bucket(bucket)]
                yield from (_sorted(np.concatenate(parts)),) if parts else ()
            else:
                with Shuffle(pathlib.Path(file.name), self._level + 1) as again:
                    for rows, narrow in self._of_bucket(bucket):
                        again.add(rows, narrow)
                    yield from again.in_order()
            file.close()
            os.unlink(file.name)

    def _of_bucket(self, bucket: int) -> Iterator[tuple[np.ndarray, tuple[bool, ...]]]:
        """The rows of a bucket in parts, and which of their columns are narrow."""
        file = self._files[bucket]
        ends = [starts[bucket] for _, starts in self._layouts[1:]] + [file.tell()]
        file.seek(0)
        for (layout, _), end in zip(self._layouts, ends, strict=True):
            while (left := end - file.tell()) > 0:
                part = file.read(min(left, layout.dtype.itemsize << 16))
                yield layout.unpacked(np.frombuffer(part, layout.dtype)), layout.narrow


def _order(rows: np.ndarray) -> np.ndarray:
    keys: np.ndarray = keyed_hash(rows[:, -1].astype(np.uint32), _ORDER)
    return keys


def _sorted(rows: np.ndarray) -> np.ndarray:
    return rows[np.argsort(_order(rows).astype(np.uint64) << np.uint64(32) | rows[:, -1].astype(np.uint64))]
