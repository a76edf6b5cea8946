"""Memory-mapped rows in files, which are either complete or absent, even with several readers and writers."""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import pathlib
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from dpreg.data.schema import Schema
from dpreg.data.sources import Rows, gathered
from dpreg.errors import InputError
from dpreg.files import publish
from dpreg.tables.standalone import add_checksum

_MANIFEST, _CHECKSUMS = "manifest.json", "checksums"
COLUMNS = ("x", "y", "weight", "row")  # of each table; "group" is another where the rows have groups
_BLOCK_BYTES = 1 << 17  # of a block with a checksum, over all columns
_READ_AT_ONCE_BYTES = 1 << 28  # checked when a table is opened, which takes about 0.1 s


class DamagedCacheError(InputError):
    """The files of a cached table differ from those that were written.

    Attributes:
      damage: a description of the difference.
    """

    def __init__(self, folder: pathlib.Path, damage: object):
        super().__init__(
            f"{folder}: the cached table is damaged ({damage}) and was deleted; start again to read the table anew"
        )
        self.damage = damage


def _discard(file: pathlib.Path, inode: int, damage: object) -> DamagedCacheError:
    """Deletes a cached table unless another process has replaced it, and returns the error to raise.

    Args:
      file: one of its files.
      inode: the inode of that file when the table was opened.
    """
    with contextlib.suppress(OSError):
        if file.stat().st_ino == inode:
            shutil.rmtree(file.parent, ignore_errors=True)
    return DamagedCacheError(file.parent, damage)


class Column:
    """A memory-mapped column in a file. Each block is compared with its checksum when it is first read.

    Args:
      file: the values [n, ...], row by row.
      checksums: [blocks] uint32, the CRC-32 of each block.
      block_rows: the number of rows of a block.
    """

    def __init__(
        self, file: pathlib.Path, dtype: DTypeLike, shape: tuple[int, ...], checksums: np.ndarray, block_rows: int
    ):
        self._file, self._inode, self._checksums, self._block_rows = file, file.stat().st_ino, checksums, block_rows
        self._values = np.asarray(np.memmap(file, dtype, "r", shape=shape))
        self._unread = np.ones(len(checksums), bool)
        self._whole = False

    @property
    def nbytes(self) -> int:
        """The size of the file in bytes."""
        return self._values.nbytes

    def __len__(self) -> int:
        return len(self._values)

    def values(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The values of all rows, after a check of those at `rows`, their numbers or a range (all by default).

        Raises:
          DamagedCacheError: when a value that is checked differs from what was written.
        """
        if not self._whole:
            if isinstance(rows, slice):
                start, stop, _ = rows.indices(len(self))
                blocks = np.arange(start // self._block_rows, -(-stop // self._block_rows))
            else:
                blocks = rows // self._block_rows
            for block in np.unique(blocks[self._unread[blocks]]).tolist():
                self._check(block)
            self._whole = not self._unread.any()
        return self._values

    def _check(self, block: int) -> None:
        first = block * self._block_rows
        if zlib.crc32(self._values[first : first + self._block_rows].data) != self._checksums[block]:
            damage = f"{self._file.name} has other bytes than were written, from row {first + 1:,} on"
            raise _discard(self._file, self._inode, damage)
        self._unread[block] = False


class ColumnWriter:
    """A context manager that writes a column to a file and computes the checksums of its blocks.

    Attributes:
      checksums: the checksums of the blocks written so far.
    """

    def __init__(self, file: pathlib.Path, block_rows: int):
        self._file, self._block_rows = file, block_rows
        self.checksums, self._room = list[int](), 0

    def __enter__(self) -> "ColumnWriter":
        self._open = self._file.open("wb")
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def write(self, values: np.ndarray) -> None:
        """Writes the next rows, which are contiguous in memory."""
        start = 0
        while start < len(values):
            if not self._room:
                self.checksums.append(0)
                self._room = self._block_rows
            part = values[start : start + self._room]
            self.checksums[-1] = zlib.crc32(part.data, self.checksums[-1])
            self._room -= len(part)
            start += len(part)
        self._open.write(values.data)


def block_rows(row_bytes: int) -> int:
    """The number of rows of a block: small enough to read one row fast, and large enough to have few checksums."""
    return max(1, _BLOCK_BYTES // row_bytes)


@dataclasses.dataclass(frozen=True)
class MappedSource:
    """A source of memory-mapped rows.

    Attributes:
      columns: "x", "y" and "weight" in the units of training, as for `dpreg.data.sources.Source`; "row", the number
        of each row in the table, from 0; and "group", the number of the row's group, from 0, where rows have groups.
      digest: the fingerprint of the rows.
      schema: the schema by which the columns of the table were encoded.
      left_out: the numbers of rows of the table, and of one of validation rows, that are in no source: "missing", those
        dropped since values are missing; "weight_0".
    """

    columns: Mapping[str, Column]
    digest: str
    schema: Schema
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.columns["weight"])

    def __getitem__(self, indices: np.ndarray) -> Rows:
        return gathered(indices, **{name: self.columns[name].values(indices) for name in ("x", "y", "weight")})

    def view(self, rows: slice) -> Rows:
        """Some consecutive rows, without a copy; they are not to be changed."""
        return {name: self.columns[name].values(rows)[rows] for name in ("x", "y", "weight")}

    @property
    def x(self) -> np.ndarray:
        """All features [n, d], read into memory."""
        return self.columns["x"].values()

    @property
    def y(self) -> np.ndarray:
        """All targets [n, t], read into memory."""
        return self.columns["y"].values()

    @property
    def weight(self) -> np.ndarray:
        """All weights [n], read into memory."""
        return self.columns["weight"].values()

    @property
    def row(self) -> np.ndarray:
        """The numbers of all rows in the table, [n] int64, read into memory."""
        return self.columns["row"].values()

    @property
    def group(self) -> np.ndarray:
        """The numbers of the groups of all rows, [n] int32, read into memory."""
        return self.columns["group"].values()

    def fingerprint(self) -> str:
        """A fingerprint of all values in their order, computed when they were written."""
        return self.digest


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder that is renamed to its final name when it is complete, and deleted if that fails.

    It also deletes what an interrupted ingest has left: folders that are older than a minute, and not locked.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
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
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield new
            (new / "lock").unlink()
            if folder.exists() and not (folder / _MANIFEST).exists():
                shutil.rmtree(folder, ignore_errors=True)  # damaged
            try:
                publish(new, folder)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise  # otherwise another process has written the same rows first
    finally:
        shutil.rmtree(new, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class Part:
    """Describes the written rows to fit ("train") or validation rows ("val").

    Attributes:
      rows: the number of rows.
      fingerprint: the fingerprint of their values.
      checksums: the checksums of the blocks of each column.
    """

    rows: int
    fingerprint: str
    checksums: Mapping[str, Sequence[int]]


def write_manifest(
    folder: pathlib.Path,
    table: str,
    schema: Schema,
    dtype: np.dtype,
    columns: Sequence[str],
    block_rows: int,
    parts: Mapping[str, Part],
    left_out: Mapping[str, int],
) -> None:
    """Writes the description of the folder, as the last file: a folder without it is not opened.

    Args:
      dtype: the dtype of the rows.
      columns: the names of the columns.
      block_rows: the number of rows of a block with a checksum.
      parts: descriptions of "train" and "val".
      left_out: as `MappedSource` has it.
    """
    checksums = [part.checksums.get(name, ()) for part in parts.values() for name in columns]
    text = np.array([number for numbers in checksums for number in numbers], np.uint32).tobytes()
    (folder / _CHECKSUMS).write_bytes(text)
    manifest = {
        "table": table,
        "dtype": str(dtype),
        "columns": [*columns],
        "rows": {name: part.rows for name, part in parts.items()},
        "left_out": {**left_out},
        "digests": {name: part.fingerprint for name, part in parts.items()},
        "block_rows": block_rows,
        "checksums": hashlib.sha256(text).hexdigest(),
        "schema": schema.to_json(),
    }
    (folder / _MANIFEST).write_text(json.dumps(add_checksum(manifest), indent=2) + "\n", encoding="utf-8")


def opened(folder: pathlib.Path) -> tuple[MappedSource, MappedSource | None, Schema] | None:
    """The rows to fit, the validation rows, and their schema; None if there is no such folder.

    Small tables are compared with their checksums here, and larger ones when they are read.

    Raises:
      DamagedCacheError: when they differ from what was written.
    """
    file = folder / _MANIFEST
    if not file.exists():
        return None
    inode = file.stat().st_ino
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        checksums = (folder / _CHECKSUMS).read_bytes()
        if manifest != add_checksum(manifest) or manifest["checksums"] != hashlib.sha256(checksums).hexdigest():
            raise ValueError(f"{_MANIFEST} or {_CHECKSUMS} has other bytes than were written")
        schema = Schema.from_json(manifest["schema"])
        found = _mapped(folder, manifest, schema, np.frombuffer(checksums, np.uint32))
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _discard(file, inode, error) from error
    columns = [column for source in found.values() for column in source.columns.values()]
    if sum(column.nbytes for column in columns) <= _READ_AT_ONCE_BYTES:
        for column in columns:
            column.values()
    return found["train"], found.get("val"), schema


def _mapped(
    folder: pathlib.Path, manifest: Mapping[str, Any], schema: Schema, checksums: np.ndarray
) -> dict[str, MappedSource]:
    """The sources of the parts that have rows."""
    dtype, block_rows = np.dtype(manifest["dtype"]), manifest["block_rows"]
    of_column: dict[str, tuple[Any, ...]] = {"x": (dtype, len(schema.features)), "y": (dtype, len(schema.targets))}
    of_column |= {"weight": (dtype,), "row": (np.int64,), "group": (np.int32,)}
    found, start = {}, 0
    for part, rows in manifest["rows"].items():
        columns, blocks = {}, -(-rows // block_rows)
        for name in manifest["columns"] if rows else ():
            kind, *width = of_column[name]
            file, of_blocks = folder / f"{part}.{name}", checksums[start : start + blocks]
            columns[name] = Column(file, kind, (rows, *width), of_blocks, block_rows)
            start += blocks
        if rows:
            found[part] = MappedSource(columns, manifest["digests"][part], schema, manifest["left_out"])
    return found
