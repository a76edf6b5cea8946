"""Checks of the rows that estimators are given, and their folds."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from sklearn.model_selection import check_cv
from sklearn.utils.validation import _check_sample_weight

from dpreg.errors import InputError
from dpreg.tables.columns import LARGEST


class Folds(NamedTuple):
    """Folds of rows, by which the strength of a penalty is chosen.

    Attributes:
      numbers: [n] the number of the fold that holds out each row, from 0.
      l1_ratio: the share of l1 in the penalty.
    """

    numbers: np.ndarray
    l1_ratio: float

    @property
    def order(self) -> np.ndarray:
        """The numbers of the rows [n], those of one fold after those of another."""
        return np.argsort(self.numbers, kind="stable")

    @property
    def starts(self) -> list[int]:
        """The first row of each fold in that order."""
        starts: list[int] = np.flatnonzero(np.diff(self.numbers[self.order], prepend=-1)).tolist()
        return starts


def split_rows(cv: Any, x: np.ndarray, y: np.ndarray, weight: np.ndarray, l1_ratio: float) -> Folds:
    """The folds of rows x [n, d], y [n, t] and weight [n].

    Args:
      cv: the number of folds, a splitter of scikit-learn, or pairs of (numbers of rows to fit, of rows held out).
      l1_ratio: from 0 to 1.

    Raises:
      InputError: unless every row is held out once, and otherwise fitted; for a fold without weight; and for another
        l1_ratio.
    """
    if not 0 <= l1_ratio <= 1:
        raise InputError(f"l1_ratio={l1_ratio!r}: use a number from 0 to 1")
    try:
        pairs = [(np.asarray(fitted), np.asarray(own)) for fitted, own in check_cv(cv).split(x, y)]
    except (TypeError, ValueError) as error:
        raise InputError(f"cv={cv!r}: {error}; give a number of folds, or a splitter such as KFold") from error
    numbers = np.full(len(x), -1)
    for number, (_, own) in enumerate(pairs):
        numbers[own] = number
    times = np.bincount(np.concatenate([own for _, own in pairs]), minlength=len(x))
    others = all(np.array_equal(np.sort(fitted), np.flatnonzero(numbers != n)) for n, (fitted, _) in enumerate(pairs))
    if (times != 1).any() or not others:
        raise InputError("cv: it has to hold out every row once, and to fit all others then; use KFold or GroupKFold")
    if (empty := np.bincount(numbers, weight) == 0).any():
        raise InputError(f"cv: all rows of fold {empty.argmax()} have the weight 0; use other folds")
    return Folds(numbers, l1_ratio)


def require_squares(x: np.ndarray, y: np.ndarray, weight: np.ndarray, row: np.ndarray) -> None:
    """Raises InputError for a value of x or y whose weighted square is not finite in float64.

    Args:
      x, y, weight: the rows, [n, d], [n, t] and [n].
      row: [n] the numbers of the rows for the message, from 0.
    """
    limit = LARGEST / max(1.0, float(np.sqrt(weight.max())))
    for name, values in (("X", x), ("y", y)):
        if len(large := np.argwhere(np.abs(values) > limit)):
            at, column = large[0]
            raise InputError(
                f"{name}: column {column + 1} has {values[at, column]:g} in row {row[at] + 1:,}; "
                f"scale it to {limit:g} at most" + (", or use smaller weights" if limit < LARGEST else "")
            )


def check_sample_weight(sample_weight: ArrayLike | None, x: np.ndarray) -> np.ndarray:
    """Validates the weights of rows, and returns them as [n] float64; None stands for weights of 1.

    Raises:
      InputError: for a negative weight, or if all are 0.
    """
    weight: np.ndarray = _check_sample_weight(sample_weight, x, dtype=np.float64)
    if (weight < 0).any():
        raise InputError(f"sample_weight: it is negative in row {(weight < 0).argmax() + 1:,}; use 0 or more")
    if not weight.any():
        raise InputError("sample_weight: it is zero in every row; give at least one row a weight above 0")
    return weight
