"""Rows in files, mapped into memory: whole or not there at all, whoever else reads or writes them."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from dpreg.data.schema import Schema
from dpreg.data.sources import Rows, gathered
from dpreg.errors import InputError

_MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class MappedSource:
    """Rows in files, mapped into memory.

    Attributes:
      x, y, weight: what the model sees, as `dpreg.data.sources.Source` gives it.
      row: [n] int64, the number of each row in the table, from 0.
      digest: its fingerprint.
    """

    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    row: np.ndarray
    digest: str

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, indices: np.ndarray) -> Rows:
        return gathered(indices, x=self.x, y=self.y, weight=self.weight)

    def fingerprint(self) -> str:
        """Of all values, in their order; taken when they were written."""
        return self.digest


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder that gets its name when it is complete, and goes away when that fails.

    What an interrupted ingest has left is taken away, too: it is not of this minute, and nobody holds its lock.
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
            with contextlib.suppress(OSError):  # of some network file systems, which lock nothing
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield new
            (new / "lock").unlink()
            if folder.exists() and not (folder / _MANIFEST).exists():
                shutil.rmtree(folder, ignore_errors=True)  # damaged
            try:
                new.rename(folder)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise  # else another process was faster, with the same rows
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_manifest(
    folder: pathlib.Path, table: str, schema: Schema, dtype: np.dtype, parts: Mapping[str, tuple[int, str]]
) -> None:
    """Says what lies in the folder: last, since nothing without it is opened.

    Args:
      dtype: of the rows.
      parts: of "train" and "val" the number of rows and the fingerprint.
    """
    manifest = {
        "table": table,
        "dtype": str(dtype),
        "rows": {name: rows for name, (rows, _) in parts.items()},
        "digests": {name: digest for name, (_, digest) in parts.items()},
        "schema": schema.to_json(),
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def opened(folder: pathlib.Path) -> tuple[MappedSource, MappedSource | None, Schema] | None:
    """The rows to fit, those held out, and what their columns are; None where there is no such folder.

    Raises:
      InputError: when it is damaged.
    """
    if not (folder / _MANIFEST).exists():
        return None
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        schema, rows, digests = Schema.from_json(manifest["schema"]), manifest["rows"], manifest["digests"]
        dtype = np.dtype(manifest["dtype"])
        train = _mapped(folder / "train", rows["train"], schema, dtype, digests["train"])
        val = _mapped(folder / "val", rows["val"], schema, dtype, digests["val"]) if rows["val"] else None
        return train, val, schema
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: the cache is damaged ({error}); delete that folder") from error


def _mapped(prefix: pathlib.Path, rows: int, schema: Schema, dtype: np.dtype, digest: str) -> MappedSource:
    def column(name: str, dtype: DTypeLike, *width: int) -> np.ndarray:
        return np.asarray(np.memmap(f"{prefix}.{name}", dtype, "r", shape=(rows, *width)))

    x = column("x", dtype, len(schema.features))
    y = column("y", dtype, len(schema.targets))
    return MappedSource(x, y, column("weight", dtype), column("row", np.int64), digest)
