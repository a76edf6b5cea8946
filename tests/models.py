"""Models that tests train, as a user would write them."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import dpreg


class Net(dpreg.Module):
    """A network with BatchNorm, Dropout and an optimizer that keeps a state."""

    optimizer: optax.GradientTransformation
    width: int = 16
    activation: Callable = nn.relu

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(self.width, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, use_fast_variance=False)(x)
        x = self.activation(x)
        x = nn.Dropout(0.25, deterministic=not train)(x)
        x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(1)(x)

    def configure_optimizers(self):
        return self.optimizer


class Foreign(nn.Module):
    """A flax module with a loss and an optimizer that is not a `dpreg.Module`."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(x)

    def loss(self, prediction, target):
        return jnp.abs(prediction - target).sum(axis=1)

    def configure_optimizers(self):
        return optax.sgd(0.05)


@dataclasses.dataclass
class Rows:
    """Random regression rows [n, d]; some of the optional sample weights are 0."""

    num_rows: int
    num_inputs: int = 3
    weighted: bool = False
    seed: int = 0

    def source(self) -> dpreg.ArraySource:
        rng = np.random.default_rng(self.seed)
        x = rng.normal(size=(self.num_rows, self.num_inputs))
        y = np.sin(x @ rng.normal(size=self.num_inputs)) + 0.1 * rng.normal(size=self.num_rows)
        weight = rng.uniform(0.5, 2, self.num_rows) * (rng.random(self.num_rows) > 0.2) if self.weighted else None
        return dpreg.ArraySource(x, y, weight)

    def data(self, batch_size: int, num_val: int = 0) -> dpreg.RegressionData:
        val = Rows(num_val, self.num_inputs, seed=9).source() if num_val else None
        return dpreg.RegressionData(self.source(), val, batch_size)
