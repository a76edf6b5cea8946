"""The covariance of parameters where errors have unequal variances.

It is that of their scores between two inverses of the curvature: White (1980) for HC0, MacKinnon and White (1985) for
HC1 to HC3. Parameters are uncorrelated ones, whose curvature is the identity: see
`dpreg.solvers.fit.Fit.along`.
"""

from typing import NamedTuple

import numpy as np

_POWERS = {"HC2": 1, "HC3": 2}  # of 1 - leverage, which squared residuals are divided by
_ALL = 1e-10  # a row with a leverage of 1 less this is fitted without an error, which then says nothing


class Sandwich(NamedTuple):
    """The covariance of the scores of the m uncorrelated parameters of a fit.

    Attributes:
      kind: "HC0" to "HC3".
      scores: [t, m, m] for each target.
      degrees_of_freedom: of the t distribution of the statistics.
    """

    kind: str
    scores: np.ndarray
    degrees_of_freedom: float


def products(
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


def correction(kind: str, rows: float, degrees_of_freedom: float) -> float:
    """The factor of the covariance for a finite number of rows."""
    if kind != "HC1":
        return 1.0
    return rows / degrees_of_freedom if degrees_of_freedom > 0 else np.nan
