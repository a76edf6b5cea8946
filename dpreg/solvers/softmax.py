"""Softmax regression on the host in float64, by Newton's method.

The Hessian couples the classes, so a step is not a least-squares problem as for the families of `dpreg.solvers.glm`.
The rows are reduced to the sums of the loss, its gradient and its Hessian (Boehning 1992).
"""

import math
from collections.abc import Callable

import numpy as np
import scipy

from dpreg.errors import InputError
from dpreg.solvers import newton


def sums(x: np.ndarray, y: np.ndarray, weight: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """The sums over rows [n, d] with labels [n, 1] and weights [n], at theta [1 + d, C] with the intercepts first.

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


def minimum(sums_at: Callable[[np.ndarray], np.ndarray], shape: tuple[int, int], l2: float) -> np.ndarray:
    """The theta [1 + d, C] of the least mean loss + l2 / 2 sum w^2, intercepts not counted, by Newton's method.

    Args:
      sums_at: theta -> what `sums` gives for all rows.
      shape: of theta.

    Raises:
      InputError: when there is no row with a weight, or no optimum was found.
    """
    size, classes = math.prod(shape), shape[1]
    penalty = np.repeat(np.where(np.arange(shape[0]) > 0, l2, 0.0), classes)
    # What all classes have in common changes no probability: no step goes there.
    common = np.kron(np.eye(shape[0]), np.ones((classes, classes)))

    def evaluated(theta: np.ndarray) -> newton.Point:
        weight, *of_rows = sums_at(theta.reshape(shape))
        if not weight > 0:
            raise InputError("there is no row with a weight to fit; give one row at least a weight")
        at = np.array(of_rows) / weight
        curvature = at[1 + size :].reshape(size, size) + np.diag(penalty)
        gradient = at[1 : 1 + size] + penalty * theta
        step = -_solved(curvature + common * np.trace(curvature) / size, gradient)
        moved = 0.0 if l2 else float(np.abs(step[classes:]).max(initial=0.0))  # with a penalty there is an optimum
        value, decrement = float(at[0] + (penalty * theta**2).sum() / 2), float(-gradient @ step)
        return newton.Point(value, step, decrement, moved)

    start = np.zeros(size)
    theta, _ = newton.minimum(evaluated, start, lambda: start)
    return theta.reshape(shape)


def _solved(curvature: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    step: np.ndarray
    try:
        step = scipy.linalg.cho_solve(scipy.linalg.cho_factor(curvature), gradient)
    except np.linalg.LinAlgError:  # flat to rounding: the shortest of the steps that do as well
        step = np.linalg.lstsq(curvature, gradient)[0]
    return step
