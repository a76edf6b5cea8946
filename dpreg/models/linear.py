"""Linear regression."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from dpreg.config import Config, check_settings
from dpreg.errors import InputError
from dpreg.models.module import Module


def linear_parameters(params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """W [d, t] and b [t] of dpreg's linear models, with b = 0 if the model has no intercept; None for other models."""
    layer = params["Dense_0"] if set(params) == {"Dense_0"} else params
    for of_w, of_b in (("w", "b"), ("kernel", "bias")):
        if of_w in layer and not set(layer) - {of_w, of_b}:
            w = np.asarray(layer[of_w])
            return w, np.asarray(layer.get(of_b, np.zeros(w.shape[1], w.dtype)))
    return None


def initial_weights(sigma: float | None) -> nn.initializers.Initializer:
    """An initializer for N(0, sigma^2), with sigma 0.01 by default (D2L section 3.4.1)."""
    return nn.initializers.normal(0.01 if sigma is None else sigma)


def initial_bias(bias: tuple[float, ...] | None) -> nn.initializers.Initializer:
    """An initializer for a bias: zeros, or given values."""
    if bias is None:
        return nn.initializers.zeros
    return lambda key, shape, dtype=jnp.float32: jnp.broadcast_to(jnp.asarray(bias, dtype), shape)


class LinearRegressionScratch(Module):
    """Linear regression with explicit parameters, x w + b (D2L section 3.4.1).

    `w` [num_inputs, num_targets] starts as N(0, sigma^2), or on a table as zero; `b` [num_targets] starts as `bias`.

    Attributes:
      num_inputs: the number of features of a row, d.
      lr: the learning rate of minibatch SGD.
      sigma: the standard deviation of the initial weights; by default 0.01, and 0 for rows of a table, where no step
        would change the initial draw in a direction that the rows do not determine.
      num_targets: the number of targets of a row, t; D2L has one.
      intercept: whether the model has a `b`; without it, the predictions are x w.
      bias: the initial `b`, one value a target; zeros by default.

    >>> model = LinearRegressionScratch(num_inputs=2, lr=0.03)
    >>> params = {"w": jnp.array([[2.0], [-3.0]]), "b": jnp.array([4.0])}
    >>> model.apply({"params": params}, jnp.array([[1.0, 1.0]]))
    Array([[3.]], dtype=float32)
    """

    num_inputs: int
    lr: float
    sigma: float | None = None
    num_targets: int = 1
    intercept: bool = Config.intercept
    bias: tuple[float, ...] | None = None
    row_wise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(sigma=self.sigma, intercept=self.intercept)
        super().__post_init__()

    def setup(self) -> None:
        """Creates the parameters."""
        size = self.num_inputs, self.num_targets
        self.w = self.param("w", initial_weights(self.sigma), size, jnp.float32)
        if self.intercept:
            self.b = self.param("b", initial_bias(self.bias), (self.num_targets,), jnp.float32)

    def __call__(self, x: Array) -> Array:
        """The predictions: [n, num_inputs] -> [n, num_targets].

        Raises:
          InputError: for rows of another width.
        """
        if x.shape[-1] != self.num_inputs:
            raise InputError(f"num_inputs={self.num_inputs}: the rows have {x.shape[-1]:,} features; use that number")
        prediction = jnp.matmul(x, self.w)
        return prediction + self.b[None] if self.intercept else prediction
