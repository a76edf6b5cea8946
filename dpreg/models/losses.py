"""Losses: functions of (prediction, target) that give one value per row."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from dpreg.errors import InputError


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


def row_losses(model: Any, prediction: Array, batch: Mapping[str, Array]) -> Array:
    """The loss of each row, [n]; 0 for rows without weight.

    Raises:
      InputError: when the model's loss gives anything but one value a row, such as their mean.
    """
    losses = model.loss(prediction, batch["y"])
    if losses.shape != batch["weight"].shape:
        raise InputError(
            f"the model's loss gives {list(losses.shape)} for {len(batch['weight'])} rows: "
            "give one value for each row, [rows], and no mean: rows have weights"
        )
    return jnp.where(batch["weight"] > 0, losses, 0)
