"""How well a model predicts: losses and errors of rows, added up exactly."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from dpreg.errors import InputError
from dpreg.models.losses import row_losses


class Errors(NamedTuple):
    """What evaluation keeps of the rows of a shard's batch, weighted: enough for the loss and R^2, exactly.

    Targets have an axis of their own: [t]. `mean` and `spread` are those of the targets: their weighted mean
    and the weighted sum of squares around it.
    """

    weight: Any
    loss: Any
    absolute_error: Any
    squared_error: Any
    mean: Any
    spread: Any


def errors(model: Any, log_targets: bool, prediction: Array, batch: dict[str, Array]) -> Errors:
    """The errors of one shard's batch, traced.

    Args:
      model: with a `loss`.
      log_targets: whether the model sees logarithms of the targets. The errors are those of the targets then; the
        loss is the model's own.
      prediction: [b, t], of the batch.
      batch: {"y": [b, t], "weight": [b]}.

    Raises:
      InputError: when the model does not predict one column for each target.
    """
    weight, target = batch["weight"], batch["y"]
    losses = row_losses(model, prediction, batch)
    if prediction.shape != target.shape:
        raise InputError(
            f"the model predicts {list(prediction.shape)} where the target is {list(target.shape)}: "
            "give one column for each target"
        )
    if log_targets:
        prediction, target = jnp.exp(prediction), jnp.exp(target)
    error = jnp.where(weight[:, None] > 0, prediction - target, 0)
    total = weight.sum()
    mean = weight @ target / jnp.where(total > 0, total, 1)
    return Errors(
        total,
        jnp.vdot(losses, weight),
        weight @ jnp.abs(error),
        weight @ jnp.square(error),
        mean,
        weight @ jnp.square(target - mean[None]),
    )


def metrics(blocks: Sequence[Errors], scale: np.ndarray | float = 1.0) -> tuple[float, dict[str, float]]:
    """(mean loss, {"rmse", "mae", "r2"}) from the errors of all batches, added in float64 in one fixed order.

    The spread of all targets is put together from that within the batches and that of their means (Chan,
    Golub and LeVeque 1983). With several targets rmse and mae are over all values, r2 is the targets' mean.
    What cannot be said, such as r2 without spread, is left out.

    Args:
      blocks: each [steps, shards, ...].
      scale: [t], of the targets in their own units; the loss is not scaled.
    """
    every = Errors(
        *(
            np.concatenate([np.reshape(leaf, (-1, *np.shape(leaf)[2:])) for leaf in leaves]).astype(np.float64)
            for leaves in zip(*blocks, strict=True)
        )
    )
    weight = every.weight.sum()
    if weight == 0:
        return 0.0, {}
    squared = every.squared_error.sum(axis=0)
    center = every.weight @ every.mean / weight
    spread = every.spread.sum(axis=0) + every.weight @ np.square(every.mean - center)
    found = {
        "rmse": math.sqrt((squared * np.square(scale)).mean() / weight),
        "mae": float((every.absolute_error.sum(axis=0) * scale).mean() / weight),
    }
    if (spread > 0).all():
        found["r2"] = float((1 - squared / spread).mean())
    return float(every.loss.sum() / weight), {name: value for name, value in found.items() if math.isfinite(value)}
