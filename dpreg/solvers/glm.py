"""Generalised linear models whose link is canonical, on the host in float64: what Newton's method asks of them.

With such a link the observed curvature is the expected one, so Newton's method is Fisher's scoring, which is
iteratively reweighted least squares (McCullagh and Nelder 1989, section 2.5).
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy

from dpreg.solvers.tsqr import RFactor

_LEAST_VARIANCE = 1e-20  # of a target, so that what is predicted for certain has a working response

Elementwise = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of distributions.

    Attributes:
      start: target -> prediction near it, on the link's scale, from which to begin (as R has it).
      mean, variance: prediction -> mean and variance of the target.
      loss: (prediction, target) -> half the deviance, as the loss of that name in `dpreg.models.losses`.
    """

    start: Elementwise
    mean: Elementwise
    variance: Elementwise
    loss: Callable[[np.ndarray, np.ndarray], np.ndarray]

    def working(
        self, x: np.ndarray, y: np.ndarray, weight: np.ndarray, prediction: np.ndarray
    ) -> tuple[RFactor, float]:
        """(the problem of least squares that gives the next step, the weighted sum of the losses).

        Where that is not finite, the step to here was too far, and no next one is to be taken.

        Args:
          x, y, weight: rows [n, d], [n, 1], [n].
          prediction: [n, 1], on the link's scale, from which the step is taken.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # a step too far, which is taken back
            variance = np.maximum(self.variance(prediction), _LEAST_VARIANCE)
            response = prediction + (y - self.mean(prediction)) / variance
            loss = float(weight @ self.loss(prediction, y)[:, 0])
        if not np.isfinite(loss):
            response, variance = np.zeros_like(y), np.ones_like(y)
        return RFactor.of(x, response, weight * variance[:, 0]), loss


def _half_deviance_of_counts(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """As `dpreg.models.losses.poisson_loss`."""
    ratio = z - np.log(np.where(y > 0, y, 1))
    half: np.ndarray = np.where(y > 0, y * (np.expm1(ratio) - ratio), np.exp(z))
    return half


FAMILIES = {
    "logistic": Family(
        lambda y: np.log((y + 0.5) / (1.5 - y)),
        lambda z: scipy.special.expit(z),
        lambda z: scipy.special.expit(z) * scipy.special.expit(-z),
        lambda z, y: np.logaddexp(0, z) - y * z,
    ),
    "poisson": Family(
        lambda y: np.log(y + 0.1),
        np.exp,
        np.exp,
        _half_deviance_of_counts,
    ),
}
