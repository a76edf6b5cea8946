"""Generalised linear models, on the host in float64, by iteratively reweighted least squares.

This is Fisher's scoring, and where the link is canonical, Newton's method (McCullagh and Nelder 1989, section 2.5).
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy

_LEAST_SLOPE = 1e-20  # so that what is predicted for certain has a working response

Elementwise = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of distributions.

    Attributes:
      start: target -> prediction near it, on the link's scale, from which to begin (as R has it).
      mean: prediction -> mean of the target; slope: its derivative.
      variance: prediction -> variance of the target, over the dispersion.
      loss: (prediction, target) -> half the deviance, as the loss of that name in `dpreg.models.losses`.
      log_likelihood: (prediction, target, dispersion) -> logarithm of the probability, or of its density.
      link: mean -> prediction.
      dispersed: whether the dispersion is a parameter to estimate; else it is 1.
    """

    start: Elementwise
    mean: Elementwise
    slope: Elementwise
    variance: Elementwise
    loss: Callable[[np.ndarray, np.ndarray], np.ndarray]
    log_likelihood: Callable[[np.ndarray, np.ndarray, float], np.ndarray]
    link: Callable[[float], float]
    dispersed: bool = False

    def working(
        self, y: np.ndarray, weight: np.ndarray, prediction: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The problem of least squares that gives the next step: (its targets [n, 1], its weights [n], sums [4]).

        The sums over rows are those of the weighted losses, of the weights, of Pearson's chi-squared statistic and of
        the weighted targets. If the losses are not finite, the last step was too long, and no next one is to be taken.

        Args:
          y, weight: [n, 1], [n], the targets and weights of rows.
          prediction: [n, 1], on the link's scale, from which the step is taken.
        """
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # a step that was too long is taken back
            slope, residual = np.maximum(self.slope(prediction), _LEAST_SLOPE), y - self.mean(prediction)
            variance = np.maximum(self.variance(prediction), np.square(_LEAST_SLOPE))
            response, information = prediction + residual / slope, np.square(slope) / variance
            loss = float(weight @ self.loss(prediction, y)[:, 0])
            pearson = float(weight @ (np.square(residual) / variance)[:, 0])
        if not np.isfinite(loss):
            response, information = np.zeros_like(y), np.ones_like(y)
        return response, weight * information[:, 0], np.array([loss, weight.sum(), pearson, weight @ y[:, 0]])


def _half_deviance_of_counts(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """As `dpreg.models.losses.poisson_loss`."""
    ratio = z - np.log(np.where(y > 0, y, 1))
    half: np.ndarray = np.where(y > 0, y * (np.expm1(ratio) - ratio), np.exp(z))
    return half


def _half_deviance_of_positives(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """As `dpreg.models.losses.gamma_loss`."""
    ratio = np.log(y) - z
    half: np.ndarray = np.expm1(ratio) - ratio
    return half


def _log_likelihood_of_positives(z: np.ndarray, y: np.ndarray, dispersion: float) -> np.ndarray:
    shape, ratio = 1 / dispersion, np.log(y) - z
    log_likelihood: np.ndarray = (
        shape * (np.log(shape) + ratio - np.exp(ratio)) - scipy.special.gammaln(shape) - np.log(y)
    )
    return log_likelihood


def _variance_of_labels(z: np.ndarray) -> np.ndarray:
    variance: np.ndarray = scipy.special.expit(z) * scipy.special.expit(-z)
    return variance


FAMILIES = {
    "logistic": Family(
        start=lambda y: np.log((y + 0.5) / (1.5 - y)),
        mean=lambda z: scipy.special.expit(z),  # scipy imports it when it is first used
        slope=_variance_of_labels,
        variance=_variance_of_labels,
        loss=lambda z, y: np.logaddexp(0, z) - y * z,
        log_likelihood=lambda z, y, _: y * z - np.logaddexp(0, z),
        link=lambda mean: float(np.log(mean / (1 - mean))),
    ),
    "poisson": Family(
        start=lambda y: np.log(y + 0.1),
        mean=np.exp,
        slope=np.exp,
        variance=np.exp,
        loss=_half_deviance_of_counts,
        log_likelihood=lambda z, y, _: y * z - np.exp(z) - scipy.special.gammaln(y + 1),
        link=lambda mean: float(np.log(mean)),
    ),
    "gamma": Family(
        start=np.log,
        mean=np.exp,
        slope=np.exp,
        variance=lambda z: np.exp(2 * z),
        loss=_half_deviance_of_positives,
        log_likelihood=_log_likelihood_of_positives,
        link=lambda mean: float(np.log(mean)),
        dispersed=True,
    ),
}
