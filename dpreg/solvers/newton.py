"""Newton's method with a line search, on the host in float64: of generalised linear models and softmax regression."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy

from dpreg.errors import NoOptimumError

_MOST_STEPS = 28  # about 8 are needed; after 37 a model without an optimum comes to rest by rounding
_MOST_HALVED = 40  # times that one step is found too long
_ENOUGH = 1e-4  # of the decrease that the slope promises
_ROUNDING = 1e-10  # of the objective, by which a step may seem to increase it
_AT_REST = 1e-3  # of the predictions, on the link's scale
_LAST_DECREMENT = 1e-15  # of the last step: that of a next one would be its square, and the Hessian has 7 digits
_APPROACHED = 1.5e-8  # the length of the gradient where an approach ends
_EXACTLY = 5e-6  # the length of the gradient below which an approach needs more than seven digits
_NEAR = 1e-6  # Values that differ by less may differ by their rounding.


class Point(NamedTuple):
    """An objective at one point, and the step of Newton's method from there.

    Attributes:
      value: of the objective; where it is not finite, the step that led here was too long.
      step: [m] float64.
      decrement: the product of the step and the gradient, times -1: twice the predicted decrease.
      moved: a bound on how much the step changes a typical prediction, on the link's scale.
      detail: other results for the caller.
    """

    value: float
    step: np.ndarray
    decrement: float
    moved: float
    detail: Any = None


def minimum(
    evaluate: Callable[[np.ndarray], Point],
    start: np.ndarray,
    safe: Callable[[], np.ndarray],
    enough: float = 0.0,
    most_steps: int = _MOST_STEPS,
) -> tuple[np.ndarray, Point]:
    """The minimum of a convex function, by Newton's method with backtracking (Boyd and Vandenberghe 2004, 9.5.2).

    Args:
      evaluate: a function of a point [m]; it takes a pass over the rows.
      start: [m] the first point.
      safe: gives the first point [m] if the objective is not finite at `start`.
      enough: the decrement of the last step, if not so small that the parameters have all their digits.
      most_steps: the number of steps, at most: few from a start near the minimum, see `_MOST_STEPS`.

    Returns:
      the minimum [m], and the `Point` before the last step.

    Raises:
      NoOptimumError: when no optimum was found.
    """
    at = evaluate(start)
    if not np.isfinite(at.value):
        at = evaluate(start := safe())
    for _ in range(most_steps):
        if not np.isfinite(at.value):
            break
        # Without an optimum the objective may stop changing, but the parameters do not.
        precise = at.decrement <= _LAST_DECREMENT * max(1.0, abs(at.value)) and at.moved <= _AT_REST
        if precise or at.decrement <= enough:
            return start + at.step, at
        length, before = 1.0, at
        for _ in range(_MOST_HALVED):
            at = evaluate(after := start + length * before.step)
            most = before.value - _ENOUGH * length * before.decrement + _ROUNDING * (abs(at.value) + 0.1)
            if np.isfinite(at.value) and at.value <= most:
                break
            length /= 2
        start = after
    raise NoOptimumError(
        f"no optimum within {most_steps} steps: there is none where all targets are alike, or where features tell "
        "them for certain; for the latter give some l2, such as 0.001"
    )


def approach(
    evaluate: Callable[[np.ndarray, bool], tuple[float, np.ndarray]],
    start: np.ndarray,
    along: np.ndarray | scipy.sparse.csr_array,
    most: int,
    enough: float = 0.0,
) -> np.ndarray:
    """A point [m] near the minimum of a smooth function, by L-BFGS (Byrd, Lu, Nocedal and Zhu 1995).

    Near the minimum, the rounding of two values hides which is less. Their difference is then taken from the gradients
    at both (Hager and Zhang 2005).

    Args:
      evaluate: (point, whether seven digits are enough) -> (value, gradient [m]); it takes a pass over the rows.
      start: [m] the first point.
      along: [m, k] the point is `start` plus this times parameters for which the Hessian is near the identity.
      most: the number of evaluations, at most.
      enough: the decrement where it ends, if not `_APPROACHED` squared.
    """
    best, least = start, np.inf
    last = np.zeros(along.shape[1]), np.inf, np.full(along.shape[1], np.inf)

    def evaluated(u: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best, least, last
        at, (before, value_before, gradient_before) = start + along @ u, last
        value, of_point = evaluate(at, bool(np.linalg.norm(gradient_before) > _EXACTLY))
        with np.errstate(all="ignore"):
            gradient = along.T @ of_point
            length = float(np.linalg.norm(gradient))
        if not np.isfinite(value + length):
            raise StopIteration
        if abs(value - value_before) < _NEAR * max(1.0, abs(value)):
            value = value_before + float((u - before) @ (gradient + gradient_before)) / 2
        last = u.copy(), value, gradient
        if value < least:
            best, least = at, value
        if length <= max(np.sqrt(enough), _APPROACHED):
            best = at
            raise StopIteration
        return value, gradient

    with contextlib.suppress(StopIteration):  # at the end, or where a step was too long
        first = evaluated(np.zeros(along.shape[1]))
        unit = float(np.linalg.norm(first[1]))  # The first step of the library has a length of 1.

        def scaled(u: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = evaluated(unit * u) if u.any() else first
            return value, unit * gradient

        options = {"maxfun": most, "gtol": 0.0, "ftol": 0.0, "maxcor": 20}
        scipy.optimize.minimize(scaled, np.zeros(along.shape[1]), jac=True, method="L-BFGS-B", options=options)
    return best
