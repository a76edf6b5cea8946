"""Huber, absolute and quantile regression on the host in float64, by Newton's method.

All three are max(lower e, upper e) of the error e = target - prediction, with a parabola between the two slopes: of a
fixed width for Huber's loss, and for the others of one that goes to 0 (Madsen and Nielsen 1993; Chen 2007). Where the
gradient of a smoothed loss is 0, the slopes of its rows are a feasible point of the dual problem: that bounds how far
the loss is from its least value.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy

from dpreg.errors import NoOptimumError
from dpreg.spelling import spell

_MOST_STEPS = 200
_NARROWER = 0.25  # from one width to the next
_MOST_WIDTHS = 30
_GAP = 1e-10  # of the loss, to its lower bound
_AT_REST = 1e-10  # of the gradient, as a share of the range of slopes
_EPSILON = float(np.finfo(np.float64).eps)
_ROUNDING = 64 * _EPSILON  # of targets


class Slopes(NamedTuple):
    """The slopes of a loss below and above 0, and the width of its parabola; None where it has none."""

    lower: float
    upper: float
    width: float | None


def slopes_of(loss: str, huber_delta: float, quantile: float) -> Slopes:
    """The slopes of the loss of that name in `dpreg.models.losses`."""
    if loss == "huber":
        return Slopes(-huber_delta, huber_delta, 1.0)
    return Slopes(-1.0, 1.0, None) if loss == "absolute" else Slopes(quantile - 1, quantile, None)


def sums(
    x: np.ndarray, y: np.ndarray, weight: np.ndarray, theta: np.ndarray, slopes: Slopes, width: float
) -> np.ndarray:
    """The sums over rows [n, d], [n, 1], [n] at theta [1 + d], the intercept first.

    Returns:
      [4 + m + m m] float64 with m = 1 + d: the weighted sums of 1, of the smoothed loss, of the loss itself, of what
      that is above its lower bound, and of the smoothed loss's gradient and curvature by theta.
    """
    a = np.concatenate([np.ones((len(x), 1)), x], axis=1)
    error = y[:, 0] - a @ theta
    slope = np.clip(error / width, slopes.lower, slopes.upper)
    loss = np.maximum(slopes.lower * error, slopes.upper * error)
    curved = weight * ((slope > slopes.lower) & (slope < slopes.upper)) / width
    values = (np.ones(len(x)), slope * error - width * np.square(slope) / 2, loss, loss - slope * error)
    curvature = a.T @ (curved[:, None] * a)
    return np.concatenate([[weight @ v for v in values], -(a.T @ (weight * slope)), curvature.ravel()])


def minimum(
    sums_at: Callable[[np.ndarray, float], np.ndarray], theta: np.ndarray, slopes: Slopes, l2: float, size: float
) -> np.ndarray:
    """The theta [1 + d] of the least mean loss + l2 / 2 sum w^2, the intercept not counted.

    Args:
      sums_at: (theta, width) -> what `sums` gives for all rows, whose features have mean squares of about 1.
      theta: where to start.
      size: of the targets, by which errors are distinguished from rounding.

    Raises:
      InputError: when no optimum was found.
    """
    penalty = np.where(np.arange(len(theta)) > 0, l2, 0.0)
    weight, _, loss, *_ = sums_at(theta, 1.0)
    width = loss / weight / max(slopes.upper, -slopes.lower)
    if slopes.width is not None:
        while width > slopes.width:  # from a wide parabola to its own: where targets are large, few rows are within it
            theta, width = _minimum(sums_at, theta, slopes, penalty, width)[0], width * _NARROWER
        return _minimum(sums_at, theta, slopes, penalty, slopes.width)[0]
    before: tuple[np.ndarray, float] | None = None
    for _ in range(_MOST_WIDTHS):
        if width <= _ROUNDING * size:  # all errors are 0 to rounding
            return theta
        found, (weight, _, loss, gap) = _minimum(sums_at, theta, slopes, penalty, width)
        objective = loss / weight + (penalty * found**2).sum() / 2
        least, best, following = objective - gap / weight, found, found
        if before is not None:
            # While the rows within the parabola stay the same, the optimum is linear in the width: extrapolate to 0.
            toward = (found - before[0]) / (before[1] - width)
            limit, following = found + toward * width, found + toward * width * (1 - _NARROWER)
            at_limit = sums_at(limit, width)[2] / weight + (penalty * limit**2).sum() / 2
            if at_limit <= objective:
                objective, best = at_limit, limit
        if objective - least <= _GAP * objective:
            return best
        before, theta, width = (found, width), following, width * _NARROWER
    raise NoOptimumError(f"no optimum was found; use {spell('solver', 'sgd')}")


def _minimum(
    sums_at: Callable[[np.ndarray, float], np.ndarray],
    theta: np.ndarray,
    slopes: Slopes,
    penalty: np.ndarray,
    width: float,
) -> tuple[np.ndarray, np.ndarray]:
    """(the theta of the least smoothed loss, the first four sums there), by damped steps of Newton's method."""
    size = len(theta)

    def evaluated(theta: np.ndarray) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        at = sums_at(theta, width)
        mean, flat = at[4:] / at[0], penalty * theta
        value = float(at[1] / at[0] + flat @ theta / 2)
        return value, mean[:size] + flat, mean[size:].reshape(size, size) + np.diag(penalty), at[:4]

    value, gradient, curvature, found = evaluated(theta)
    damping, least = 0.0, 1e-14
    for _ in range(_MOST_STEPS):
        if np.abs(gradient).max() <= _AT_REST * (slopes.upper - slopes.lower):
            return theta, found
        damped = curvature + max(damping, least) / width * np.eye(size)
        step = -scipy.linalg.solve(damped, gradient, assume_a="pos", check_finite=False)
        trial = evaluated(theta + step)
        if trial[0] <= value + 1e-4 * float(gradient @ step):
            theta, (value, gradient, curvature, found) = theta + step, trial
            damping = damping / 10 if damping > 1e-9 else 0.0
        elif -float(gradient @ step) <= 64 * _EPSILON * value:  # to rounding
            return theta, found
        else:
            damping = max(10 * damping, 1e-4)
    raise NoOptimumError(f"no optimum was found; use {spell('solver', 'sgd')}")
