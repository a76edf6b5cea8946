"""Softmax regression on the host in float64: what Newton's method asks of rows, and its steps.

The classes share their curvature, so a step is no problem of least squares as for the families of `dpreg.solvers.glm`;
of rows are kept the sums of the loss, of its gradient and of its curvature (Boehning 1992).
"""

from collections.abc import Callable

import numpy as np
import scipy

from dpreg.errors import InputError

_EPSILON = float(np.finfo(np.float64).eps)
_MOST_PASSES = 100


def sums(x: np.ndarray, y: np.ndarray, weight: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """What rows [n, d] with labels [n, 1] and weights [n] come to at theta [1 + d, C], the intercepts first.

    Returns:
      [2 + m + m m] float64 with m = (1 + d) C: the weighted sums of 1, of the loss (that of this name in
      `dpreg.models.losses`), of its gradient and of its curvature by theta.
    """
    a, (size, classes) = np.concatenate([np.ones((len(x), 1)), x], axis=1), theta.shape
    z = a @ theta
    m, picked = scipy.special.softmax(z, axis=1), y == np.arange(classes)
    value = scipy.special.logsumexp(z, axis=1) - np.where(picked, z, 0).sum(axis=1)
    curvature = np.zeros((size, classes, size, classes))
    for j in range(classes):
        for k in range(j + 1):
            of_rows = weight * m[:, j] * ((j == k) - m[:, k])
            curvature[:, j, :, k] = curvature[:, k, :, j] = a.T @ (of_rows[:, None] * a)
    gradient = a.T @ ((m - picked) * weight[:, None])
    return np.concatenate([[weight.sum(), weight @ value], gradient.ravel(), curvature.ravel()])


def minimum(sums_at: Callable[[np.ndarray], np.ndarray], theta: np.ndarray, l2: float) -> np.ndarray:
    """The theta [1 + d, C] of the least mean loss + l2 / 2 sum w^2, intercepts not counted, by Newton's method.

    Args:
      sums_at: theta -> what `sums` gives for all rows.
      theta: where to start.

    Raises:
      InputError: when there is no row with a weight, or no optimum was found.
    """
    size, classes = theta.size, theta.shape[1]
    penalty = np.repeat(np.where(np.arange(len(theta)) > 0, l2, 0.0), classes)
    # What all classes have in common changes no probability: no step goes there.
    common = np.kron(np.eye(len(theta)), np.ones((classes, classes)))

    def evaluated(theta: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        weight, *of_rows = sums_at(theta)
        if not weight > 0:
            raise InputError("there is no row with a weight to fit; give one row at least a weight")
        at, flat = np.array(of_rows) / weight, theta.ravel()
        curvature = at[1 + size :].reshape(size, size) + np.diag(penalty)
        return float(at[0] + (penalty * flat**2).sum() / 2), at[1 : 1 + size] + penalty * flat, curvature

    at, length, last = evaluated(theta), 1.0, False
    value, step, descent = np.inf, np.zeros(size), 0.0
    for _ in range(_MOST_PASSES):
        if not last and at[0] > value - 1e-4 * length * descent + 16 * _EPSILON * value:
            length /= 2
        else:
            if last:  # a step is as long as the square of the one before it: this one was to rounding
                return theta
            length, (value, gradient, curvature) = 1.0, at
            start, step = theta, -_solved(curvature + common * np.trace(curvature) / size, gradient)
            descent = float(-gradient @ step)
            last = descent <= _EPSILON * max(1.0, value)
        theta = start + length * step.reshape(theta.shape)
        at = evaluated(theta)
    raise InputError(f"no optimum within {_MOST_PASSES} passes; give some l2, such as 0.001")


def _solved(curvature: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    step: np.ndarray
    try:
        step = scipy.linalg.cho_solve(scipy.linalg.cho_factor(curvature), gradient)
    except np.linalg.LinAlgError:  # flat to rounding: the shortest of the steps that do as well
        step = np.linalg.lstsq(curvature, gradient)[0]
    return step
