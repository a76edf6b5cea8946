"""Two reductions of the rows of a problem of least squares to an R factor: a fast one, and a careful one."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dpreg.data.sources import Rows
from dpreg.solvers import gram
from dpreg.solvers.tsqr import RFactor

_MULTIPLIED_VALUES = 1 << 19  # of a block whose products are summed at once: few enough for a cache, and few calls

# Of a block of rows, whose x [n, d] are float64: the targets [n, t] and the weights [n] of a problem of least squares
# with these x, and sums [k] of something else.
Problem = Callable[[Rows], tuple[np.ndarray, np.ndarray, np.ndarray]]


class Reduction(NamedTuple):
    """The arguments of `Passes.reduce` for a problem of least squares.

    Attributes:
      size, of, add, rows_at_once: the arguments. A result begins with the sums [k] of something else.
      factor: a result without these sums -> its RFactor; None where it does not hold enough digits.
    """

    size: int
    of: Callable[[Rows], np.ndarray]
    add: Callable[[np.ndarray, np.ndarray], np.ndarray]
    rows_at_once: int | None
    factor: Callable[[np.ndarray], RFactor | None]


def sum_products(problem: Problem, num_inputs: int, num_targets: int, others: int, epsilon: float) -> Reduction:
    """Sums of products, see `dpreg.solvers.gram`.

    Args:
      num_inputs, num_targets: d and t of the problem; others: k.
      epsilon: as in `RFactor`.
    """
    columns = 1 + num_inputs + num_targets

    def of(rows: Rows) -> np.ndarray:
        values = gram.columns_of(rows["x"], num_targets)
        values[:, 1 + num_inputs :], weight, also = problem(rows | {"x": values[:, 1 : 1 + num_inputs]})
        return gram.products(values, weight, also)

    def factor(sums: np.ndarray) -> RFactor | None:
        return gram.factor(sums, num_inputs, num_targets, epsilon)

    return Reduction(others + gram.size(columns), of, np.add, max(1024, _MULTIPLIED_VALUES // columns), factor)


def decompose(problem: Problem, num_inputs: int, num_targets: int, others: int, epsilon: float) -> Reduction:
    """A QR decomposition, see `dpreg.solvers.tsqr`; the arguments are those of `sum_products`."""
    columns = 1 + num_inputs + num_targets

    def of(rows: Rows) -> np.ndarray:
        x = rows["x"].astype(np.float64, copy=False)
        y, weight, also = problem(rows | {"x": x})
        return np.concatenate([also, RFactor.of(x, y, weight).packed()])

    def factor(packed: np.ndarray) -> RFactor:
        return RFactor.unpacked(packed, num_inputs, num_targets, epsilon)

    def add(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        both = factor(one[others:]) + factor(other[others:])
        return np.concatenate([one[:others] + other[:others], both.packed()])

    return Reduction(others + columns**2 + columns + 1, of, add, None, factor)


def split_folds(reduction: Reduction, fold_of: np.ndarray) -> Reduction:
    """The reduction whose result is one of each fold, after each other, without sums of something else.

    Args:
      reduction: without sums of something else.
      fold_of: the number of the fold of each group, from 0; rows have "group" [n].
    """
    folds = int(fold_of.max()) + 1

    def of(rows: Rows) -> np.ndarray:
        fold = fold_of[rows["group"]]
        each = ({name: column[fold == number] for name, column in rows.items()} for number in range(folds))
        return np.concatenate([reduction.of(own) for own in each])

    def add(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        pairs = zip(np.split(one, folds), np.split(other, folds), strict=True)
        return np.concatenate([reduction.add(*pair) for pair in pairs])

    add_all = reduction.add if reduction.add is np.add else add
    return reduction._replace(size=folds * reduction.size, of=of, add=add_all)


def factor_folds(reduction: Reduction, folds: Sequence[np.ndarray]) -> list[RFactor] | None:
    """The RFactor of all rows; then, for each fold, that of the rows of all others and that of the fold.

    The rows of all others are those before the fold and those after it. The sums over both are added, since differences
    from the sum over all rows would lose digits.

    Args:
      folds: the results of two folds or more, without sums of something else.

    Returns:
      the RFactors; None where a result does not hold enough digits.
    """
    factor, add = reduction.factor, reduction.add
    after = [*itertools.accumulate(folds[:0:-1], add)][::-1]
    before, factors = folds[0], [factor(after[0]), factor(folds[0])]
    for own, rest in zip(folds[1:], [*after[1:], None], strict=True):
        factors += [factor(before if rest is None else add(before, rest)), factor(own)]
        before = add(before, own)
    found = [each for each in (factor(before), *factors) if each is not None]
    return found if len(found) == 1 + len(factors) else None
