"""Checks of the rows that estimators are given, and their folds."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from sklearn.model_selection import check_cv
from sklearn.utils.validation import _check_sample_weight

from dpreg.config import Config
from dpreg.config.model import L1_LOSSES
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


def split_rows(
    cv: Any, x: np.ndarray, y: np.ndarray, weight: np.ndarray, l1_ratio: float, groups: np.ndarray | None = None
) -> Folds:
    """The folds of rows x [n, d], y [n, t] and weight [n].

    Args:
      cv: the number of folds, a splitter of scikit-learn, or pairs of (numbers of rows to fit, of rows held out).
      l1_ratio: from 0 to 1.
      groups: [n] for a splitter that needs them.

    Raises:
      InputError: unless every row is held out once, and otherwise fitted; for a fold without weight; and for another
        l1_ratio.
    """
    if not 0 <= l1_ratio <= 1:
        raise InputError(f"l1_ratio={l1_ratio!r}: use a number from 0 to 1")
    try:
        pairs = [(np.asarray(fitted), np.asarray(own)) for fitted, own in check_cv(cv).split(x, y, groups)]
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


def check_groups(groups: ArrayLike | None, x: np.ndarray, covariance: str | None, cv: Any = None) -> np.ndarray | None:
    """Returns the numbers of the groups of rows x [n, d], [n] int32, from 0; None for none.

    Raises:
      InputError: unless there is a label for each row; for groups that cannot be used with the covariance, and for the
        covariance "cluster" without groups.
    """
    if groups is None:
        if covariance == "cluster":
            raise InputError(f"covariance={covariance!r}: give fit the groups of the rows")
        return None
    if covariance not in (None, "cluster") and cv is None:
        raise InputError(f"groups: they are not used with covariance={covariance!r}; leave one out")
    labels = np.asarray(groups)
    if labels.shape != (len(x),):
        raise InputError(f"groups: the shape is {list(labels.shape)}; give a label for each of {len(x):,} rows")
    missing = np.array([label is None or label != label for label in labels.tolist()])
    if missing.any():
        raise InputError(f"groups: row {missing.argmax() + 1:,} has none; give it one, or leave out the row")
    try:
        return np.unique(labels, return_inverse=True)[1].astype(np.int32)
    except TypeError as error:
        raise InputError("groups: the labels are of several types; give numbers alone, or texts alone") from error


def require_errors(config: Config, exact: bool, num_targets: int, groups: np.ndarray | None) -> None:
    """Raises InputError unless a fit has standard errors, which a covariance or groups are given for.

    Args:
      config: its settings; exact: whether it is an exact solution; num_targets: of its rows; groups: as given.
    """
    several = num_targets > 1 and config.loss != "squared"
    if not exact or several or config.is_penalized or config.loss not in L1_LOSSES:
        name = f"covariance={config.covariance!r}" if groups is None else "groups"
        raise InputError(
            f"{name}: only for standard errors, which fit computes for exact solutions of {', '.join(L1_LOSSES)}, "
            "without a penalty, of one target unless the loss is squared; leave it out"
        )
