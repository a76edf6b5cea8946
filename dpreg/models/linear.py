"""Linear regression."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from dpreg.models.module import Module


def linear_parameters(params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """W [d, t] and b [t] of a linear model, the scratch or the concise one; None for any other."""
    layer = params["Dense_0"] if set(params) == {"Dense_0"} else params
    for names in (("w", "b"), ("kernel", "bias")):
        if set(layer) == set(names):
            return np.asarray(layer[names[0]]), np.asarray(layer[names[1]])
    return None


class LinearRegressionScratch(Module):
    """Linear regression with explicit parameters, x w + b (D2L section 3.4.1).

    `w` [num_inputs, num_targets] starts as N(0, sigma^2), `b` [num_targets] as zero.

    Attributes:
      num_inputs: features per row, d.
      lr: learning rate of minibatch SGD.
      sigma: standard deviation of the initial weights.
      num_targets: targets per row, t; D2L has one.
    """

    num_inputs: int
    lr: float
    sigma: float = 0.01
    num_targets: int = 1

    def setup(self) -> None:
        """Creates the parameters."""
        self.w = self.param("w", nn.initializers.normal(self.sigma), (self.num_inputs, self.num_targets))
        self.b = self.param("b", nn.initializers.zeros, (self.num_targets,))

    def __call__(self, x: Array) -> Array:
        """The predictions: [n, num_inputs] -> [n, num_targets]."""
        return jnp.matmul(x, self.w) + self.b[None]
