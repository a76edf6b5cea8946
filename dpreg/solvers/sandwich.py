"""The covariance of parameters where errors have unequal variances, or are correlated within groups.

It is that of their scores between two inverses of the curvature: White (1980) for HC0, MacKinnon and White (1985) for
HC1 to HC3, Liang and Zeger (1986) for errors that are correlated within groups of rows. Parameters are uncorrelated
ones, whose curvature is the identity: see `dpreg.solvers.fit.Fit.along`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dpreg.data.sources import Rows
from dpreg.errors import InputError
from dpreg.solvers.groups import sum_groups
from dpreg.solvers.offset import values
from dpreg.spelling import spell

if TYPE_CHECKING:
    from dpreg.solvers.fit import Fit
    from dpreg.solvers.glm import Family

Reduce = Callable[[int, Callable[[Rows], np.ndarray]], np.ndarray]


_POWERS = {"HC2": 1, "HC3": 2}  # of 1 - leverage, which squared residuals are divided by
_ALL = 1e-10  # a row with a leverage of 1 less this is fitted without an error, which then says nothing


class Sandwich(NamedTuple):
    """The covariance of the scores of the m uncorrelated parameters of a fit.

    Attributes:
      kind: "HC0" to "HC3", or "cluster".
      scores: [t, m, m] for each target.
      degrees_of_freedom: of the t distribution of the statistics.
    """

    kind: str
    scores: np.ndarray
    degrees_of_freedom: float


def estimate(kind: str, fit: "Fit", family: "Family | None", counts: bool, num_groups: int, reduce: Reduce) -> Sandwich:
    """The covariance of the scores of a fit, by another pass over its rows.

    Args:
      kind: see `Sandwich`; for "cluster", rows have "group" [n].
      family: of a generalised linear model; None for least squares.
      counts: whether a weight is a number of equal rows.
      num_groups: G, above all numbers of groups.
      reduce: (size, function of a block of rows) -> the sums [size] of its results over all rows.

    Raises:
      InputError: for "cluster" with a single group.
    """
    size, targets, clustered = len(fit.along), fit.w.shape[1], kind == "cluster"
    of_scores = num_groups * (1 + targets * size) if clustered else targets * size**2
    observed = family is not None and not family.canonical

    def sums(rows: Rows) -> np.ndarray:
        x, y, weight, offset = values(rows)
        prediction = x @ fit.w + fit.b + offset
        directions, slope, information = fit.directions(x), y - prediction, np.ones_like(y)
        if family is not None:
            _, slope, information, curvature = family.terms(prediction, y)
        if clustered:
            each = [weight[:, None], *(directions * (weight * of)[:, None] for of in slope.T)]
            found = sum_groups(np.concatenate(each, axis=1), rows["group"], num_groups).ravel()
        else:
            found = _products(kind, directions, slope, information, weight, counts)
        if not observed:
            return found
        return np.concatenate([found, (directions.T @ (weight[:, None] * curvature * directions)).ravel()])

    found, curvature = np.split(reduce(of_scores + observed * size**2, sums), [of_scores])
    factor, rows, of_test = 1.0, fit.triangle.rows, fit.degrees_of_freedom
    left = of_test if of_test > 0 else np.nan
    if kind == "HC1":
        factor = rows / left
    elif clustered:
        weight, scores = np.split(found.reshape(num_groups, -1), [1], axis=1)
        found, of_test = np.stack([of.T @ of for of in np.split(scores, targets, axis=1)]), _groups(weight) - 1
        factor = (of_test + 1) / of_test * (rows - 1) / left
    found = found.reshape(targets, size, size) * factor
    if observed:  # the information that was observed, in place of that expected
        inverse = np.linalg.inv(curvature.reshape(size, size))
        found = inverse @ found @ inverse
    return Sandwich(kind, found, of_test)


def _groups(weight: np.ndarray) -> int:
    """The number of groups with a weight."""
    groups = int(np.count_nonzero(weight))
    if groups < 2:
        raise InputError(f"{spell('covariance', 'cluster')}: all rows are in one group; name a column of more groups")
    return groups


def _products(
    kind: str,
    directions: np.ndarray,
    slope: np.ndarray,
    information: np.ndarray,
    weight: np.ndarray,
    counts: bool,
) -> np.ndarray:
    """The sums over rows of the products of their scores, [t m m] float64.

    Args:
      kind: "HC0" to "HC3".
      directions: [n, m] the features of the uncorrelated parameters.
      slope: [n, t] the derivative of the log-likelihood by the prediction, for a dispersion of 1.
      information: [n, t] its expected second derivative, times -1.
      weight: [n].
      counts: whether a weight is a number of equal rows.
    """
    squares = np.square(slope) * (weight if counts else np.square(weight))[:, None]
    if kind in _POWERS:
        of_row = np.square(directions).sum(axis=1) * (1 if counts else weight)
        left = 1 - information * of_row[:, None]
        squares = squares / np.where(left > _ALL, left, np.nan) ** _POWERS[kind]
    return np.concatenate([(directions.T @ (directions * of[:, None])).ravel() for of in squares.T])
