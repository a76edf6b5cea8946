"""Losses: functions of (prediction, target) that give one value per row."""

import jax.numpy as jnp
from jax import Array


def squared_loss(prediction: Array, target: Array) -> Array:
    """Half the squared error, (prediction - target)^2 / 2, summed over the targets (D2L section 3.1.1.2).

    Args:
      prediction: [n, t] float.
      target: [n, t] float; the same shape, since a broadcast here is a wrong loss without an error.

    Returns:
      [n]: the loss of each row, unweighted.

    Raises:
      ValueError: when the shapes differ.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {list(prediction.shape)} and target {list(target.shape)} differ in shape: "
            "give both as [rows, targets]"
        )
    return jnp.square(prediction - target).reshape(len(target), -1).sum(axis=1) / 2
