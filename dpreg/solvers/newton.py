"""Newton's method with a line search, on the host in float64: of generalised linear models and softmax regression."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy

from dpreg.errors import NoOptimumError

_EPSILON = float(np.finfo(np.float64).eps)
_MOST_STEPS = 30  # about 8 are needed; after 37 a model without an optimum comes to rest by rounding
_MOST_HALVED = 40  # times that one step is found too long
_ENOUGH = 1e-4  # of the decrease that the slope promises
_ROUNDING = 1e-10  # of the objective, by which a step may seem to increase it
_AT_REST = 1e-3  # of the predictions, on the link's scale
_LAST_DECREMENT = 1e-15  # of the last step: at its start the Hessian has to be known to 7 digits, for standard errors
_NEXT_DECREMENT = 1e-18  # of the step that would follow, about
_APPROACHED = 3e-8  # the length of the gradient where an approach ends


class Point(NamedTuple):
    """An objective at one point, and the step of Newton's method from there.

    Attributes:
      value: of the objective; where it is not finite, the step that led here was too long.
      step: [m] float64.
      decrement: the product of the step and the gradient, times -1: twice the predicted decrease.
      moved: a bound on how much the step changes a typical prediction, on the link's scale.
      quadratic: whether the step uses the Hessian, so that near the minimum decrements are about the squares of those
        before; else it uses its expectation.
      detail: other results for the caller.
    """

    value: float
    step: np.ndarray
    decrement: float
    moved: float
    quadratic: bool = False
    detail: Any = None


def minimum(
    evaluate: Callable[[np.ndarray], Point],
    start: np.ndarray,
    safe: Callable[[], np.ndarray],
    enough: float = 0.0,
) -> tuple[np.ndarray, Point]:
    """The minimum of a convex function, by Newton's method with backtracking (Boyd and Vandenberghe 2004, 9.5.2).

    Args:
      evaluate: a function of a point [m]; it takes a pass over the rows.
      start: [m] the first point.
      safe: gives the first point [m] if the objective is not finite at `start`.
      enough: the decrement of a last step; by default it is so small that the parameters have all their digits.

    Returns:
      the minimum [m], and the `Point` before the last step.

    Raises:
      NoOptimumError: when no optimum was found.
    """
    at = evaluate(start)
    if not np.isfinite(at.value):
        at = evaluate(start := safe())
    ratio = 1.0  # of the decrements of two steps in a row
    for _ in range(_MOST_STEPS):
        # Without an optimum the objective may stop changing, but the parameters do not.
        expected = at.decrement * min(1.0, at.decrement if at.quadratic else ratio)
        precise = at.decrement <= _LAST_DECREMENT and expected <= _NEXT_DECREMENT and at.moved <= _AT_REST
        if precise or at.decrement <= enough:
            return start + at.step, at
        length, before = 1.0, at
        for _ in range(_MOST_HALVED):
            at = evaluate(start + length * before.step)
            most = before.value - _ENOUGH * length * before.decrement + _ROUNDING * (abs(at.value) + 0.1)
            if np.isfinite(at.value) and at.value <= most:
                break
            length /= 2
        start = start + length * before.step
        ratio = at.decrement / before.decrement if length == 1 and before.decrement else 1.0
    raise NoOptimumError(
        f"no optimum within {_MOST_STEPS} steps: there is none where all targets are alike, or where features tell "
        "them for certain; for the latter give some l2, such as 0.001"
    )


def approach(
    evaluate: Callable[[np.ndarray], tuple[float, np.ndarray]],
    start: np.ndarray,
    along: np.ndarray | scipy.sparse.csr_array,
    most: int,
) -> np.ndarray:
    """A point [m] near the minimum of a smooth function, by L-BFGS (Byrd, Lu, Nocedal and Zhu 1995).

    Args:
      evaluate: point -> (value, gradient [m]); it takes a pass over the rows.
      start: [m] the first point.
      along: [m, k] the point is `start` plus this times parameters for which the Hessian is near the identity.
      most: the number of evaluations, at most.
    """
    best, value = start, np.inf

    def evaluated(u: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best, value
        at = start + along @ u
        found, gradient = evaluate(at)
        if not (np.isfinite(found) and np.isfinite(gradient).all()):
            raise StopIteration
        if found < value:
            best, value = at, found
        return found, along.T @ gradient

    options = {"maxfun": most, "gtol": _APPROACHED / np.sqrt(along.shape[1]), "ftol": 0.0, "maxcor": 20}
    with contextlib.suppress(StopIteration):  # where a step was too long
        scipy.optimize.minimize(evaluated, np.zeros(along.shape[1]), jac=True, method="L-BFGS-B", options=options)
    return best
