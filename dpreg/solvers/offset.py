"""Rows with an offset: a known part of each prediction, such as the logarithm of an exposure."""

import dataclasses

import numpy as np

from dpreg.data.sources import Rows, Source


@dataclasses.dataclass(frozen=True)
class WithOffset:
    """Rows in which one column of x is "offset" [n], a part of each prediction that is not fitted.

    Attributes:
      source: the rows; column: the number of the column.
      with_features: whether x has the other columns; else it has none.
      skipped: those of the other columns whose rows, in which they are not 0, have no weight.
    """

    source: Source
    column: int
    with_features: bool = True
    skipped: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: np.ndarray) -> Rows:
        rows = self.source[indices]
        x = np.delete(rows["x"], self.column, axis=1)
        if self.skipped:
            rows["weight"] = np.where(x[:, self.skipped].any(axis=1), 0, rows["weight"])
        return rows | {"x": x if self.with_features else x[:, :0], "offset": rows["x"][:, self.column]}

    def fingerprint(self) -> str:
        """That of the source."""
        return self.source.fingerprint()


def values(rows: Rows, target: int | slice = slice(None)) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(x [n, d], y [n, t], weight [n] and offset [n, 1]) of rows, in float64; y of one target is [n, 1].

    Where there is no offset, a single 0 [1, 1] stands for it.
    """
    x, y, weight = (rows[name].astype(np.float64, copy=False) for name in ("x", "y", "weight"))
    offset = rows["offset"].astype(np.float64) if "offset" in rows else np.zeros(1)
    return x, y[:, target] if isinstance(target, slice) else y[:, target, None], weight, offset[:, None]
