"""The concise linear model and multilayer perceptrons."""

from collections.abc import Sequence
from typing import ClassVar

from flax import linen as nn
from jax import Array

from dpreg.config import Config, check_settings
from dpreg.models.linear import initial_bias, initial_weights
from dpreg.models.module import Module


class LinearRegression(Module):
    """Linear regression by flax's own layer (D2L section 3.5): `Dense_0` with `kernel` and `bias`.

    Attributes:
      num_outputs: the number of columns of the prediction.
      lr: the learning rate of minibatch SGD.
      sigma: the standard deviation of the initial weights, as in `dpreg.LinearRegressionScratch`.
      intercept: whether the model has a bias.
      bias: its initial values, one an output; zeros by default.
    """

    num_outputs: int = 1
    lr: float = Config.lr
    sigma: float | None = None
    intercept: bool = Config.intercept
    bias: tuple[float, ...] | None = None
    row_wise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(sigma=self.sigma, intercept=self.intercept)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """The predictions: [n, d] -> [n, num_outputs]."""
        start = initial_weights(self.sigma)
        return nn.Dense(self.num_outputs, self.intercept, kernel_init=start, bias_init=initial_bias(self.bias))(x)


class MLP(Module):
    """A multilayer perceptron (D2L section 5.1), with Dropout (5.6) and BatchNorm (8.5) after each hidden layer.

    BatchNorm normalises over the rows of a logical shard, so that it does not depend on the number of devices, or over
    all rows of the batch, which needs a collective in every layer.

    Attributes:
      hidden: the widths of the hidden layers.
      num_outputs: the number of columns of the prediction.
      lr: the learning rate of minibatch SGD.
      dropout: the fraction of hidden values that are set to 0 in training.
      batch_norm: whether hidden values are normalised.
      activation: the name of a function of `flax.linen`, such as "relu".
      sync_batch_norm: whether BatchNorm normalises over all rows of the batch instead of those of a shard.
      bias: the initial biases of the outputs; zeros by default.
    """

    hidden: Sequence[int]
    num_outputs: int = 1
    lr: float = Config.lr
    dropout: float = Config.dropout
    batch_norm: bool = Config.batch_norm
    activation: str = Config.activation
    sync_batch_norm: bool = Config.sync_batch_norm
    bias: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_settings(hidden=tuple(self.hidden), dropout=self.dropout)
        check_settings(batch_norm=self.batch_norm, sync_batch_norm=self.sync_batch_norm)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """The predictions: [n, d] -> [n, num_outputs]."""
        over = "batch" if self.sync_batch_norm else None
        for width in self.hidden:
            x = nn.Dense(width)(x)
            if self.batch_norm:
                x = nn.BatchNorm(use_running_average=not train, use_fast_variance=False, axis_name=over)(x)
            x = nn.Dropout(self.dropout, deterministic=not train)(getattr(nn, self.activation)(x))
        return nn.Dense(self.num_outputs, bias_init=initial_bias(self.bias))(x)
