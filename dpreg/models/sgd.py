"""Minibatch stochastic gradient descent, from scratch."""

import jax
import optax


def SGD(lr: float) -> optax.GradientTransformation:  # noqa: N802 (D2L's name)
    """Minibatch stochastic gradient descent: the update is `-lr * gradient` (D2L section 3.4.3).

    Args:
      lr: learning rate, positive; per step of the global batch, whatever the number of devices.

    Returns:
      An optax transformation without state; equal to `optax.sgd(lr)` to the last bit.

    >>> optimizer = SGD(lr=0.5)
    >>> state = optimizer.init({"w": 1.0})
    >>> optimizer.update({"w": 4.0}, state)[0]
    {'w': -2.0}
    """

    def init(params: optax.Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        gradients: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        return jax.tree.map(lambda gradient: -lr * gradient, gradients), state

    return optax.GradientTransformation(init, update)
