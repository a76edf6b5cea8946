"""Generalised linear models, on the host in float64, by iteratively reweighted least squares.

With the information that was observed this is Newton's method, and with that expected Fisher's scoring; where the link
is canonical, they are the same (McCullagh and Nelder 1989, section 2.5).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy

from dpreg.config import Config
from dpreg.data.sources import Rows

FAR = 1e4  # a weight in place of an infinite one: it gives 0 and 1 exactly, in float32 and float64
_LEAST_VARIANCE = 1e-20  # of a target, so that what is predicted for certain has a working response
_FEW = 64  # rows


class Terms(NamedTuple):
    """What rows add to a loss and to its derivatives by their predictions, for a dispersion of 1: [n, 1] each.

    Attributes:
      loss: half the deviance, as the loss of that name in `dpreg.models.losses`.
      score: the derivative of the log-likelihood by the prediction.
      information: the expected square of the score.
      curvature: the derivative of the score by the prediction, times -1: that square on average, and always for the
        canonical link.
    """

    loss: np.ndarray
    score: np.ndarray
    information: np.ndarray
    curvature: np.ndarray


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of distributions.

    Attributes:
      start: target -> prediction near it, on the link's scale, from which to begin (as R has it).
      terms: (prediction, target) -> the `Terms` of rows.
      constant: (target, dispersion) -> the logarithm of the probability, or of its density, plus the loss over the
        dispersion: no prediction changes it. The dispersion is a number, or [n, 1].
      link: mean -> prediction.
      dispersed: whether the dispersion is a parameter to estimate; else it is 1.
      canonical: whether the link is, so that the curvature is the information.
      limits: target -> the sign of the infinite prediction at which the loss of such targets tends to its least value.
    """

    start: Callable[[np.ndarray], np.ndarray]
    terms: Callable[[np.ndarray, np.ndarray], Terms]
    constant: Callable[[np.ndarray, np.ndarray | float], np.ndarray]
    link: Callable[[float], float]
    dispersed: bool = False
    canonical: bool = True
    limits: Mapping[float, int] = dataclasses.field(default_factory=dict)

    def separates(self, prediction: np.ndarray, target: np.ndarray) -> bool:
        """Whether the loss of each row tends to its least value, as the predictions grow by a factor."""
        for rows in (slice(0, _FEW), slice(_FEW, None)):  # The first ones tell, as a rule.
            z, y = prediction[rows], target[rows]
            found = np.zeros(y.shape, bool)
            for limit, sign in self.limits.items():
                found |= (y == limit) & (sign * z > 0)
            if not found.all():
                return False
        return True

    def working(
        self, y: np.ndarray, weight: np.ndarray, prediction: np.ndarray, observed: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The problem of least squares that gives the next step: (its targets [n, 1], its weights [n], sums [4]).

        The sums over rows are those of the weighted losses, of the weights, of Pearson's chi-squared statistic and of
        the weighted targets. If the first is not finite, the last step was too long, and no next one is to be taken.

        Args:
          y, weight: [n, 1], [n], the targets and weights of rows.
          prediction: [n, 1], on the link's scale, from which the step is taken.
          observed: whether the weights are the observed information, as in Newton's method, not the expected one: the
            steps converge faster where the model fits badly.
        """
        with np.errstate(all="ignore"):  # a step that was too long is taken back
            terms = self.terms(prediction, y)
            loss = float(weight @ terms.loss[:, 0])
            pearson = float(weight @ (np.square(terms.score) / terms.information)[:, 0])
            information = terms.curvature if observed else terms.information
            response = prediction + terms.score / information
            finite = np.isfinite(loss + pearson + response.sum() + information.sum())  # then all values are
        if not finite:
            response, information, loss = np.zeros_like(y), np.ones_like(y), np.inf
        return response, weight * information[:, 0], np.array([loss, weight.sum(), pearson, weight @ y[:, 0]])


def _terms_of_labels(z: np.ndarray, y: np.ndarray) -> Terms:
    """By NumPy's exponential function, which is several times as fast as SciPy's `expit`."""
    small = np.exp(-np.abs(z))
    share = 1 / (1 + small)  # the larger one of both probabilities
    loss = np.maximum(z, 0) + np.log1p(small) - y * z
    information = np.maximum(small * np.square(share), _LEAST_VARIANCE)
    return Terms(loss, y - np.where(z < 0, small * share, share), information, information)


def _terms_of_counts(z: np.ndarray, y: np.ndarray) -> Terms:
    """With the loss as `dpreg.models.losses.poisson_loss`."""
    mean, ratio = np.exp(z), z - np.log(np.where(y > 0, y, 1))
    loss = np.where(y > 0, y * (np.expm1(ratio) - ratio), mean)
    information = np.maximum(mean, _LEAST_VARIANCE)
    return Terms(loss, y - mean, information, information)


def _terms_of_positives(z: np.ndarray, y: np.ndarray) -> Terms:
    """With the loss as `dpreg.models.losses.gamma_loss`: without the target's unit, of any size."""
    ratio = np.log(y) - z
    score = np.expm1(ratio)
    return Terms(score - ratio, score, np.ones_like(z), np.exp(ratio))


def _constant_of_counts(y: np.ndarray, _: np.ndarray | float) -> np.ndarray:
    return np.asarray(scipy.special.xlogy(y, y) - y - scipy.special.gammaln(y + 1))


def _constant_of_positives(y: np.ndarray, dispersion: np.ndarray | float) -> np.ndarray:
    shape = 1 / dispersion
    return np.asarray(shape * (np.log(shape) - 1) - scipy.special.gammaln(shape) - np.log(y))


def _tweedie(power: float) -> Family:
    """Sums of a Poisson number of gamma variables: 0 or more, with a variance of mean^power (Jorgensen 1987)."""
    of_mean, of_ratio = 2 - power, 1 - power

    def terms(z: np.ndarray, y: np.ndarray) -> Terms:
        """With the loss as `dpreg.models.losses.tweedie_loss`."""
        above = np.where(y > 0, y, 1)
        ratio = z - np.log(above)
        of_some = above**of_mean * (np.expm1(of_mean * ratio) / of_mean - np.expm1(of_ratio * ratio) / of_ratio)
        information, observed = np.exp(of_mean * z), y * np.exp(of_ratio * z)
        loss = np.where(y > 0, of_some, information / of_mean)
        return Terms(loss, observed - information, information, of_mean * information - of_ratio * observed)

    def constant(y: np.ndarray, dispersion: np.ndarray | float) -> np.ndarray:
        """Dunn and Smyth (2005), equation 6, whose series is Wright's generalised Bessel function."""
        above, shape = np.where(y > 0, y, 1), of_mean / -of_ratio
        exponent = above**of_mean * (1 / of_ratio - 1 / of_mean) / dispersion
        series = (above / -of_ratio) ** shape / (np.power(dispersion, 1 + shape) * of_mean)
        density = scipy.special.log_wright_bessel(shape, 0, series) - np.log(above) + exponent
        return np.asarray(np.where(y > 0, density, 0.0))

    return Family(
        start=lambda y: np.log(np.maximum((y + y.mean()) / 2, np.finfo(np.float64).tiny)),
        terms=terms,
        constant=constant,
        link=lambda mean: float(np.log(mean)),
        dispersed=True,
        canonical=False,
        limits={0.0: -1},
    )


def _negative_binomial(alpha: float) -> Family:
    """Counts with a variance of mean + alpha mean^2: Poisson counts whose means vary (Hilbe 2011)."""

    def terms(z: np.ndarray, y: np.ndarray) -> Terms:
        """With the loss as `dpreg.models.losses.negative_binomial_loss`."""
        above, mean = np.where(y > 0, y, 1), np.exp(z)
        ratio, share = z - np.log(above), alpha * above / (1 + alpha * above)
        of_some = above * (np.log1p(share * np.expm1(ratio)) / share - ratio)
        loss = np.where(y > 0, of_some, np.logaddexp(0, z + np.log(alpha)) / alpha)
        score, information = (y - mean) / (1 + alpha * mean), np.maximum(mean, _LEAST_VARIANCE) / (1 + alpha * mean)
        return Terms(loss, score, information, mean * (1 + alpha * y) / np.square(1 + alpha * mean))

    def constant(y: np.ndarray, _: np.ndarray | float) -> np.ndarray:
        of_counts = scipy.special.gammaln(y + 1 / alpha) - scipy.special.gammaln(1 / alpha)
        of_mean = scipy.special.xlogy(y, alpha * y) - (y + 1 / alpha) * np.log1p(alpha * y)
        return np.asarray(of_counts - scipy.special.gammaln(y + 1) + of_mean)

    return Family(
        start=lambda y: np.log(y + 0.1),
        terms=terms,
        constant=constant,
        link=lambda mean: float(np.log(mean)),
        canonical=False,
        limits={0.0: -1},
    )


def slopes_of_shape(z: np.ndarray, y: np.ndarray, alpha: float) -> np.ndarray:
    """[n, 2] the first and second derivative of the negative binomial log-likelihood by log(1 / alpha)."""
    shape, mean, digamma, trigamma = 1 / alpha, np.exp(z), scipy.special.psi, functools.partial(scipy.special.zeta, 2)
    # zeta(2, x) is the trigamma function.
    first = digamma(y + shape) - digamma(shape) + (mean - y) / (shape + mean) - np.log1p(mean / shape)
    second = trigamma(y + shape) - trigamma(shape) + 1 / shape - 2 / (shape + mean) + (y + shape) / (shape + mean) ** 2
    return np.concatenate([shape * first, shape * first + shape**2 * second], axis=1)


def family_of(config: Config) -> Family:
    """The family of the loss of a config."""
    if config.loss == "tweedie":
        return _tweedie(config.tweedie_power)
    if config.loss == "negative_binomial":
        return _negative_binomial(config.negative_binomial_alpha or 1.0)
    return FAMILIES[config.loss]


FAMILIES = {
    "logistic": Family(
        start=lambda y: np.log((y + 0.5) / (1.5 - y)),
        terms=_terms_of_labels,
        constant=lambda y, _: np.zeros_like(y),
        link=lambda mean: float(scipy.special.logit(mean)),
        limits={0.0: -1, 1.0: 1},
    ),
    "poisson": Family(
        start=lambda y: np.log(y + 0.1),
        terms=_terms_of_counts,
        constant=_constant_of_counts,
        link=lambda mean: float(np.log(mean)),
        limits={0.0: -1},
    ),
    "gamma": Family(
        start=np.log,
        terms=_terms_of_positives,
        constant=_constant_of_positives,
        link=lambda mean: float(np.log(mean)),
        dispersed=True,
        canonical=False,
    ),
}


def infinite_levels(
    family: Family,
    levels: Sequence[int],
    target: int,
    reduce: Callable[[int, Callable[[Rows], np.ndarray]], np.ndarray],
) -> dict[int, int]:
    """The levels whose targets all have one value of `Family.limits`, each with the sign of its infinite weight.

    Args:
      levels: the features that are 1 in the rows of a level, and 0 in others.
      target: the number of the target, from 0.
      reduce: (size, function of a block of rows) -> the sums [size] of its results over all rows.
    """
    if not (len(levels) and family.limits):
        return {}

    def sums(rows: Rows) -> np.ndarray:
        x, y, weight = (rows[name].astype(np.float64) for name in ("x", "y", "weight"))
        columns = [weight, *(weight * np.abs(y[:, target] - limit) for limit in family.limits)]
        return (np.stack(columns) @ x[:, levels]).ravel()

    size = 1 + len(family.limits)
    weight, *distances = reduce(size * len(levels), sums).reshape(size, len(levels))
    # Sums of numbers that are not negative: 0 only where each is.
    return {
        level: sign
        for sign, distance in zip(family.limits.values(), distances, strict=True)
        for level, of_level, of_targets in zip(levels, weight, distance, strict=True)
        if of_level > 0 and of_targets == 0
    }
