"""Rows in groups: sums over the rows of each group, and folds of whole groups."""

import dataclasses

import numpy as np

from dpreg.data.sources import Rows, Source


@dataclasses.dataclass(frozen=True)
class WithGroups:
    """Rows that also have "group" [n], the number of their group.

    Attributes:
      source: the rows; groups: the numbers of the groups of all of them.
    """

    source: Source
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: np.ndarray) -> Rows:
        return self.source[indices] | {"group": self.groups[indices]}

    def fingerprint(self) -> str:
        """That of the source."""
        return self.source.fingerprint()


def sum_groups(values: np.ndarray, group: np.ndarray, num_groups: int) -> np.ndarray:
    """The sums [num_groups, m] of the values [n, m] of the n > 0 rows of each group; `group` [n] has its numbers."""
    sums, order = np.zeros((num_groups, values.shape[1])), np.argsort(group, kind="stable")
    numbers, starts = np.unique(group[order], return_index=True)
    sums[numbers] = np.add.reduceat(values[order], starts, axis=0)
    return sums


def assign_folds(groups: np.ndarray, folds: int) -> np.ndarray:
    """The fold of each group, so that folds have about equally many rows.

    Each group, those with most rows first, goes to the fold with the fewest rows, as in scikit-learn's `GroupKFold`.

    Args:
      groups: [n] the numbers of the groups of all rows.
      folds: their number; there are so many groups at least.
    """
    sizes = np.bincount(groups)
    rows, found = np.zeros(folds, np.int64), np.zeros(len(sizes), np.int32)
    for group in np.argsort(-sizes, kind="stable"):
        found[group] = fold = int(np.argmin(rows))
        rows[fold] += sizes[group]
    return found
