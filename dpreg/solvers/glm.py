"""Generalised linear models, on the host in float64, by iteratively reweighted least squares.

This is Fisher's scoring, and where the link is canonical, Newton's method (McCullagh and Nelder 1989, section 2.5).
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy

_LEAST_VARIANCE = 1e-20  # of a target, so that what is predicted for certain has a working response

Elementwise = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of distributions.

    Attributes:
      start: target -> prediction near it, on the link's scale, from which to begin (as R has it).
      residual: (prediction, target) -> working residual, target less mean over the mean's derivative.
      information: prediction -> weight of a row in the next least squares, that derivative squared over the variance.
      pearson: (prediction, target) -> square of target less mean, over the variance.
      loss: (prediction, target) -> half the deviance, as the loss of that name in `dpreg.models.losses`.
      log_likelihood: (prediction, target, dispersion) -> logarithm of the probability, or of its density.
      link: mean -> prediction.
      dispersed: whether the dispersion is a parameter to estimate; else it is 1.
    """

    start: Elementwise
    residual: Callable[[np.ndarray, np.ndarray], np.ndarray]
    information: Elementwise
    pearson: Callable[[np.ndarray, np.ndarray], np.ndarray]
    loss: Callable[[np.ndarray, np.ndarray], np.ndarray]
    log_likelihood: Callable[[np.ndarray, np.ndarray, float], np.ndarray]
    link: Callable[[float], float]
    dispersed: bool = False

    def working(
        self, y: np.ndarray, weight: np.ndarray, prediction: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The problem of least squares that gives the next step: (its targets [n, 1], its weights [n], sums [4]).

        The sums over rows are those of the weighted losses, of the weights, of Pearson's chi-squared statistic and of
        the weighted targets. If the first is not finite, the last step was too long, and no next one is to be taken.

        Args:
          y, weight: [n, 1], [n], the targets and weights of rows.
          prediction: [n, 1], on the link's scale, from which the step is taken.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # a step that was too long is taken back
            response, information = prediction + self.residual(prediction, y), self.information(prediction)
            loss, pearson = (float(weight @ of(prediction, y)[:, 0]) for of in (self.loss, self.pearson))
        if not (np.isfinite(loss + pearson) and np.isfinite(response).all() and np.isfinite(information).all()):
            response, information, loss = np.zeros_like(y), np.ones_like(y), np.inf
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
    return np.asarray(np.maximum(scipy.special.expit(z) * scipy.special.expit(-z), _LEAST_VARIANCE))


def _mean_of_counts(z: np.ndarray) -> np.ndarray:
    return np.asarray(np.maximum(np.exp(z), _LEAST_VARIANCE))


FAMILIES = {
    "logistic": Family(
        start=lambda y: np.log((y + 0.5) / (1.5 - y)),
        residual=lambda z, y: (y - scipy.special.expit(z)) / _variance_of_labels(z),
        information=_variance_of_labels,
        pearson=lambda z, y: np.square(y - scipy.special.expit(z)) / _variance_of_labels(z),
        loss=lambda z, y: np.logaddexp(0, z) - y * z,
        log_likelihood=lambda z, y, _: y * z - np.logaddexp(0, z),
        link=lambda mean: float(scipy.special.logit(mean)),
    ),
    "poisson": Family(
        start=lambda y: np.log(y + 0.1),
        residual=lambda z, y: (y - np.exp(z)) / _mean_of_counts(z),
        information=_mean_of_counts,
        pearson=lambda z, y: np.square(y - np.exp(z)) / _mean_of_counts(z),
        loss=_half_deviance_of_counts,
        log_likelihood=lambda z, y, _: y * z - np.exp(z) - scipy.special.gammaln(y + 1),
        link=lambda mean: float(np.log(mean)),
    ),
    "gamma": Family(  # without the target's unit, of any size
        start=np.log,
        residual=lambda z, y: np.expm1(np.log(y) - z),
        information=np.ones_like,
        pearson=lambda z, y: np.square(np.expm1(np.log(y) - z)),
        loss=_half_deviance_of_positives,
        log_likelihood=_log_likelihood_of_positives,
        link=lambda mean: float(np.log(mean)),
        dispersed=True,
    ),
}
