"""Newton's method with a line search, on the host in float64: of generalised linear models and softmax regression."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dpreg.errors import NoOptimumError

_EPSILON = float(np.finfo(np.float64).eps)
_MOST_STEPS = 30  # about 8 are needed; after 37 a model without an optimum comes to rest by rounding
_MOST_HALVED = 40  # times that one step is found too long
_ENOUGH = 1e-4  # of the decrease that the slope promises
_ROUNDING = 1e-10  # of the objective, by which a step may seem to increase it
_AT_REST = 1e-3  # of the predictions, on the link's scale


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


def minimum(evaluate: Callable[[np.ndarray], Point], start: np.ndarray, safe: np.ndarray) -> tuple[np.ndarray, Point]:
    """The minimum of a convex function, by Newton's method with backtracking (Boyd and Vandenberghe 2004, 9.5.2).

    Args:
      evaluate: a function of a point [m]; it takes a pass over the rows.
      start: [m] the first point.
      safe: [m] the first point if the objective is not finite at `start`.

    Returns:
      the minimum [m], and the `Point` before the last step.

    Raises:
      NoOptimumError: when no optimum was found.
    """
    at = evaluate(start)
    if not np.isfinite(at.value):
        start, at = safe, evaluate(safe)
    for _ in range(_MOST_STEPS):
        # Without an optimum the objective may stop changing, but the parameters do not.
        if at.decrement <= _EPSILON * max(1.0, abs(at.value)) and at.moved <= _AT_REST:
            return start + at.step, at
        length, before = 1.0, at
        for _ in range(_MOST_HALVED):
            at = evaluate(start + length * before.step)
            most = before.value - _ENOUGH * length * before.decrement + _ROUNDING * (abs(at.value) + 0.1)
            if np.isfinite(at.value) and at.value <= most:
                break
            length /= 2
        start = start + length * before.step
    raise NoOptimumError(
        f"no optimum within {_MOST_STEPS} steps: there is none where all targets are alike, or where features tell "
        "them for certain; for the latter give some l2, such as 0.001"
    )
