"""What a solver finds."""

from typing import NamedTuple

import numpy as np

from dpreg.solvers import elastic_net
from dpreg.solvers.fit import Fit


class Solution(NamedTuple):
    """A linear model of the least loss.

    Attributes:
      w, b: [d, p] and [p] float64.
      loss: the mean loss, without the penalty.
      fit: what the standard errors come from, where they are known.
      alpha: of a negative binomial model, where it was estimated.
      path: how the strength of the penalty was chosen, if it was.
      infinite: the levels of categories for which the best w of a target is not finite.
    """

    w: np.ndarray
    b: np.ndarray
    loss: float
    fit: Fit | None = None
    alpha: float | None = None
    path: elastic_net.Path | None = None
    infinite: tuple[int, ...] = ()
