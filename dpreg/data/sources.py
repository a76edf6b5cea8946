"""Rows: what a source is, and those that are arrays in memory."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from dpreg.config import Columns, Config, check_settings
from dpreg.data.parts import PartedRows, put_together
from dpreg.data.sampler import permute
from dpreg.data.schema import Schema
from dpreg.distributed.processes import together
from dpreg.errors import InputError

Rows = dict[str, np.ndarray]

_CHECKED_ROWS = 1 << 18  # at once


class Source(Protocol):
    """Rows by index. `source[indices]` gathers them in one vectorised call, in the order asked.

    Its result is `{"x": [n, d], "y": [n, t], "weight": [n]}`, float32 (or float64) and freshly allocated.

    >>> class Line:
    ...     __len__ = lambda self: 100
    ...     fingerprint = lambda self: "y = x / 100"
    ...     def __getitem__(self, indices):
    ...         x = indices[:, None].astype(np.float32)
    ...         return {"x": x, "y": x / 100, "weight": np.ones(len(x), np.float32)}
    >>> data = RegressionData(Line())
    """

    def __len__(self) -> int: ...

    def __getitem__(self, indices: np.ndarray) -> Rows: ...

    def fingerprint(self) -> str:
        """A text that is equal for equal rows in the same order, and different for others.

        A source that changes the rows of another by a rule without settings may return the fingerprint of that source:
        `PermutedSource` does, and `CastSource`, whose precision is a setting of the run. Runs on the source itself and
        on the changed one then have the same identity.
        """


def gathered(indices: np.ndarray, **columns: np.ndarray) -> Rows:
    """The rows at some indices of each column, in new arrays."""
    return {name: np.take(column, indices, axis=0) for name, column in columns.items()}  # 4x as fast as column[indices]


def read_range(source: Source, start: int, stop: int) -> Rows:
    """The rows from `start` to `stop`, which are not to be changed: not copied where a source has a method `view`."""
    view = getattr(source, "view", None)
    found: Rows = source[np.arange(start, stop)] if view is None else view(slice(start, stop))
    return found


def unmasked(name: str, values: Any) -> Any:
    """The values, which NumPy would take without their mask.

    Raises:
      InputError: for a masked array that masks some.
    """
    if np.ma.is_masked(values):
        raise InputError(f"{name} is a masked array, whose missing values would be lost; fill them, or leave them out")
    return values


def _first_not_finite(array: np.ndarray) -> int | None:
    """The first row with a value that is not finite, or None."""
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(array.sum()):  # then all values are, which this finds several times as fast
            return None
    bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
    return int(bad.argmax()) if bad.any() else None


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """A source over arrays, also memory-mapped ones.

    Args:
      x: [n, d] features, or [n] for a single one.
      y: [n, t] targets, or [n] for a single one.
      weight: [n] non-negative sample weights; 1 by default. A row of weight 0 counts for nothing.
      dtype: what they are kept as: float32, or float64 for runs of that precision.

    Raises:
      InputError: when shapes disagree, or a value is masked, not finite or a weight negative (names the row).

    >>> source = ArraySource(x=[[1, 0], [0, 1], [1, 1]], y=[2, 3, 5])
    >>> source[np.array([2, 0])]["y"]
    array([[5.],
           [2.]], dtype=float32)
    """

    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray

    def __init__(self, x: ArrayLike, y: ArrayLike, weight: ArrayLike | None = None, dtype: DTypeLike = np.float32):
        columns = {
            "x": np.asarray(unmasked("x", x), dtype),
            "y": np.asarray(unmasked("y", y), dtype),
            "weight": np.asarray(np.ones(len(np.asarray(y))) if weight is None else unmasked("weight", weight), dtype),
        }
        if not len(columns["y"]):
            raise InputError("x has no rows; give at least one")
        for name, array in columns.items():
            if name != "weight" and array.ndim == 1:
                columns[name] = array = array[:, None]
            if array.ndim != (1 if name == "weight" else 2):
                raise InputError(
                    f"{name} has shape {list(array.shape)}; give rows in the first axis, columns in the second"
                )
            if len(array) != len(columns["x"]):
                counts = f"{len(columns['x']):,} and {len(array):,} rows"
                raise InputError(f"x and {name} have {counts}; they must have the same number")
            if (bad := _first_not_finite(array)) is not None:
                raise InputError(f"{name} has a value that is not finite in row {bad + 1:,}; correct or remove it")
            object.__setattr__(self, name, array)
        if (self.weight < 0).any():
            raise InputError(f"weight is negative in row {(self.weight < 0).argmax() + 1:,}; use 0 or more")

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, indices: np.ndarray) -> Rows:
        return gathered(indices, x=self.x, y=self.y, weight=self.weight)

    def view(self, rows: slice) -> Rows:
        """Some consecutive rows, without a copy; they are not to be changed."""
        return {"x": self.x[rows], "y": self.y[rows], "weight": self.weight[rows]}

    def fingerprint(self) -> str:
        """SHA-256 of all values."""
        digest = hashlib.sha256(repr((self.x.shape, self.y.shape)).encode())
        for column in (self.x, self.y, self.weight):
            digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()


def describe_rows(rows: Any) -> tuple[str, str]:
    """(how many rows there are, a digest of them), to compare what processes have: a source, an array or columns."""
    if hasattr(rows, "fingerprint"):
        return f"{len(rows):,} rows", rows.fingerprint()
    names = getattr(rows, "column_names", None)  # of an Arrow table
    if names is None:
        names = rows.keys() if isinstance(rows, Mapping) else getattr(rows, "columns", None)  # of a data frame
    columns = [rows] if names is None else [np.asarray([str(name) for name in names]), *(rows[name] for name in names)]
    digest, shape = hashlib.sha256(), [0]
    for array in map(np.asarray, columns):
        shape = [*array.shape]
        if not shape:
            raise InputError(f"{type(rows).__name__} has no fingerprint(); among several processes a source needs one")
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(repr(array.tolist()).encode() if array.dtype.hasobject else np.ascontiguousarray(array).data)
    return (f"shape {shape}" if names is None else f"{shape[0]:,} rows"), digest.hexdigest()


def first_outside(source: Source, allowed: Callable[[np.ndarray], np.ndarray]) -> tuple[int, tuple[float, ...]] | None:
    """The first row, as the user numbers them from 1, with a target that is not allowed, and its targets.

    Rows of weight 0 count for nothing here, too.

    Args:
      allowed: targets [n, t] -> [n, t], which of them are.
    """
    found: tuple[int, tuple[float, ...]] | None = None
    own: range = getattr(source, "own", range(len(source)))  # of rows in parts
    for start in range(own.start, own.stop, _CHECKED_ROWS):
        indices = np.arange(start, min(start + _CHECKED_ROWS, own.stop))
        columns: Any = [getattr(source, name, None) for name in ("y", "weight")]  # so that x is not read
        if [np.ndim(column) for column in columns] == [2, 1]:
            y, weight = (column[indices] for column in columns)
        else:
            rows = source[indices]
            y, weight = rows["y"], rows["weight"]
        for at in np.flatnonzero(~allowed(y).all(axis=1) & (weight > 0)):
            number = _number_of(indices[at], source)
            found = min(found or (number, tuple(y[at])), (number, tuple(y[at])))
    return found


def _number_of(index: np.ndarray, source: Source) -> int:
    """As the user numbers the row at an index."""
    while isinstance(source, PermutedSource):
        index, source = permute(index, len(source)), source.source
    return int(source.row[index] if hasattr(source, "row") else index) + 1


@dataclasses.dataclass(frozen=True)
class PermutedSource:
    """A source in a fixed pseudo-random order, so that contiguous shards of it are random samples.

    Attributes:
      source: the rows, in an order of their own.

    >>> source = PermutedSource(ArraySource(x=np.arange(5), y=np.arange(5)))
    >>> source[np.arange(5)]["y"].ravel().tolist()
    [2.0, 1.0, 3.0, 0.0, 4.0]
    """

    source: Source

    def __post_init__(self) -> None:
        if isinstance(self.source, PartedRows):
            raise InputError(
                "rows in parts cannot be shuffled over processes; give from_parts a PermutedSource of each part"
            )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: np.ndarray) -> Rows:
        return self.source[permute(indices, len(self))]

    def fingerprint(self) -> str:
        """The fingerprint of the source's rows, which the permutation depends on by their number alone."""
        return self.source.fingerprint()


class RegressionData:
    """Training and validation rows with what is known of them: the data module that `Trainer.fit` takes.

    Args:
      train: the rows to fit.
      val: rows held out, or None.
      batch_size: rows of one global batch.
      schema: what the columns of a table are to the model; None where the rows are no table's.
      columns: what was taken from the table: its weights and missing values are treated so in evaluation, too.
      left_out: the numbers of rows of the table that are not used: "missing", those dropped since values are missing;
        and "weight_0".

    Attributes:
      train, val, batch_size, schema, columns, left_out: as given.
      num_inputs, num_targets: columns of x and of y.

    >>> data = RegressionData(ArraySource([[0, 1], [2, 3]], [4, 5]), batch_size=2)
    >>> data.num_inputs, data.num_targets
    (2, 1)
    """

    def __init__(
        self,
        train: Source,
        val: Source | None = None,
        batch_size: int = Config.batch_size,
        schema: Schema | None = None,
        columns: Columns | None = None,
        left_out: Mapping[str, int] | None = None,
    ):
        if len(train) < 1:
            raise InputError("there are no training rows; give at least one")
        check_settings(batch_size=batch_size)
        self.train, self.val, self.batch_size, self.schema, self.columns = train, val, batch_size, schema, columns
        self.left_out = {"missing": 0, "weight_0": 0} | dict(left_out or {})
        first = train[np.zeros(1, np.int32)]
        self.num_inputs, self.num_targets = first["x"].shape[1], first["y"].shape[1]

    @staticmethod
    @together("putting rows together")
    def from_parts(
        train: Source | None, val: Source | None = None, batch_size: int = Config.batch_size
    ) -> "RegressionData":
        """Rows of which each of several processes holds its own part; in a single process, the rows as they are.

        The whole is the parts in the order of the processes' ids: training on it gives what one process with all of
        the rows gives. All processes have to call this, as they have to call `Trainer.fit` with its result. Rows that
        the devices of another process need are sent there once; so parts of about equal size are best.

        Args:
          train: the rows to fit that this process holds, an `ArraySource` or any other source; None for no rows.
          val: the rows held out that this process holds; None for no rows.
          batch_size: rows of one global batch, over all processes.

        Returns:
          The data of all processes. Its `train` and `val` may also be given to `Trainer.evaluate`; and to
          `Trainer.predict`, which then gives each process the predictions of its own rows.

        Raises:
          InputError: in all processes, when parts have different columns or dtypes, or no process has rows to fit.

        >>> data = RegressionData.from_parts(ArraySource([[0, 1], [2, 3]], [4, 5]), batch_size=2)
        >>> len(data.train)
        2
        """
        whole, held_out = put_together(train, "training"), put_together(val, "validation")
        if whole is None:
            raise InputError("there are no training rows; give at least one")
        return RegressionData(whole, held_out, batch_size)

    def fingerprint(self) -> str:
        """Of the rows, training and validation, and of the labels of their target."""
        parts = [source.fingerprint() for source in (self.train, self.val) if source]
        if self.schema is not None and self.schema.labels:
            parts.append(repr(self.schema.labels))
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()
