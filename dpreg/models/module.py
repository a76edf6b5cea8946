"""What the trainer asks of a model."""

import optax
from flax import linen as nn
from jax import Array

from dpreg.models.losses import squared_loss
from dpreg.models.sgd import SGD


class Module(nn.Module):
    """A flax module that knows its loss and its optimizer, like D2L's `Module`.

    A subclass gives `__call__(x)`, or `__call__(x, train)` where training differs from evaluation, as with
    Dropout and BatchNorm: x is [n, d] float32 and the result [n, t]. It may replace `loss`, and
    `configure_optimizers` where it has no field `lr`. A flax module that is no subclass but has these
    two methods trains as well. Padding rows are hidden from every `nn.BatchNorm`.
    """

    def loss(self, prediction: Array, target: Array) -> Array:
        """The loss of each row: [n, t], [n, t] -> [n]. Never a mean: the step owns the weights."""
        return squared_loss(prediction, target)

    def configure_optimizers(self) -> optax.GradientTransformation:
        """The optimizer: an optax transformation."""
        return SGD(self.lr)  # type: ignore[attr-defined]  # a field of the subclass
