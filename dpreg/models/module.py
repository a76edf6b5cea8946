"""The base class of models."""

import warnings
from typing import Any, ClassVar

import optax
from flax import linen as nn
from jax import Array

from dpreg.config import check_settings
from dpreg.models.losses import SQUARED, Loss
from dpreg.models.sgd import SGD


class Module(nn.Module, kw_only=True):
    """A flax module with a loss and an optimizer, like D2L's `Module`.

    A subclass defines `__call__(x)`, or `__call__(x, train)` if training differs from evaluation, as with Dropout and
    BatchNorm. x is [n, d] float32, and the result is [n, t]. A subclass may override `loss` and
    `configure_optimizers`, and must override the latter if it has no field `lr`. Any other flax module with these two
    methods can be trained as well. Padding rows are masked in every `nn.BatchNorm`, which normalises over the rows of
    a logical shard, or over all rows of the batch if it has an `axis_name`, such as "batch".

    A class with `row_wise = True` declares that its `__call__` computes each row independently of other rows and of
    random numbers. Batches may then be processed in chunks that stay in cache.

    Attributes:
      objective: the loss, with its link and its metrics; keyword only.
      optimizer: an optax transformation instead of `SGD(lr)`; keyword only.
      row_wise: whether each row is computed independently, see above.

    >>> class Net(Module):
    ...     lr: float
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return nn.Dense(1)(nn.relu(nn.Dense(8)(x)))
    >>> model = Net(lr=0.1)
    """

    def __init_subclass__(cls, **settings: Any) -> None:
        """Accepts `rows_apart`, the former name of `row_wise`."""
        if "rows_apart" in vars(cls):
            warnings.warn(f"{cls.__name__}.rows_apart is deprecated; call it row_wise", DeprecationWarning, 2)
            cls.row_wise = vars(cls)["rows_apart"]
        super().__init_subclass__(**settings)

    objective: Loss = SQUARED
    optimizer: optax.GradientTransformation | None = None
    row_wise: ClassVar[bool] = False

    def loss(self, prediction: Array, target: Array) -> Array:
        """The loss of each row: [n, p], [n, t] -> [n]. It must not be a mean, since the step applies the weights."""
        return self.objective.rows(prediction, target)

    def configure_optimizers(self) -> optax.GradientTransformation:
        """The optimizer, an optax transformation; by default `SGD` with the subclass's field `lr`."""
        if self.optimizer:
            return self.optimizer
        check_settings(lr=self.lr)
        return SGD(self.lr)
