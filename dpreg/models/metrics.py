"""How well a model predicts: losses and errors of rows, added up exactly."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from dpreg.errors import InputError
from dpreg.models.losses import loss_of, row_losses

_ROUNDINGS_OF_MEAN = 4  # by which the mean of equal targets may be off, in units of their last digit


class Errors(NamedTuple):
    """What evaluation keeps of the rows of a shard's batch, weighted: enough for all metrics, exactly.

    Targets have an axis of their own: [t]. `mean` and `spread` are those of the targets: their weighted mean
    and the weighted sum of squares around it. `right` is the weight of what was predicted to the nearest integer.
    """

    weight: Any
    loss: Any
    absolute_error: Any
    squared_error: Any
    pinball: Any
    right: Any
    mean: Any
    spread: Any


def errors(model: Any, log_targets: bool, prediction: Array, batch: dict[str, Array]) -> Errors:
    """The errors of one shard's batch, traced.

    Args:
      model: with a `loss`.
      log_targets: whether the model sees logarithms of the targets. The errors are those of the targets then; the
        loss is the model's own.
      prediction: [b, p], of the batch.
      batch: {"y": [b, t], "weight": [b]}.

    Raises:
      InputError: when the model does not predict one column for each target.
    """
    weight, target = batch["weight"], batch["y"]
    losses = row_losses(model, prediction, batch)
    mean_of = loss_of(model).mean(prediction)
    if mean_of.shape != target.shape:
        raise InputError(
            f"the model predicts {list(prediction.shape)} where the target is {list(target.shape)}; "
            "give one column for each target"
        )
    if log_targets:
        mean_of, target = jnp.exp(mean_of), jnp.exp(target)
    error = jnp.where(weight[:, None] > 0, mean_of - target, 0)
    total = weight.sum()
    mean = weight @ target / jnp.where(total > 0, total, 1)
    return Errors(
        total,
        jnp.vdot(losses, weight),
        weight @ jnp.abs(error),
        weight @ jnp.square(error),
        weight @ (jnp.abs(error) / 2 - (loss_of(model).quantile - 0.5) * error),
        weight @ (jnp.abs(error) < 0.5).astype(weight.dtype),
        mean,
        weight @ jnp.square(target - mean[None]),
    )


def metrics(
    blocks: Sequence[Errors], scale: np.ndarray | float = 1.0, named: Sequence[str] = ("rmse", "mae", "r2")
) -> tuple[float, dict[str, float]]:
    """(mean loss, metrics) from the errors of all batches, added in float64 in one fixed order.

    rmse, mae, pinball, and accuracy (the share within 1/2 of the target) are over all values of all targets, r2 is the
    mean of the targets'; deviance is twice the mean loss. The spread of all targets is put together from that
    within the batches and that of their means (Chan, Golub and LeVeque 1983). What cannot be said, such as r2 without
    spread, is left out.

    Args:
      blocks: each [steps, shards, ...].
      scale: [t], of the targets in their own units; the loss is not scaled.
      named: the metrics wanted.
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
    loss = float(every.loss.sum() / weight)
    squared = every.squared_error.sum(axis=0)
    center = every.weight @ every.mean / weight
    spread = every.spread.sum(axis=0) + every.weight @ np.square(every.mean - center)
    # What rounding may make of equal targets.
    rounding = weight * np.square(_ROUNDINGS_OF_MEAN * np.finfo(np.asarray(blocks[0].mean).dtype).eps * center)
    found = {
        "rmse": math.sqrt((squared * np.square(scale)).mean() / weight),
        "mae": float((every.absolute_error.sum(axis=0) * scale).mean() / weight),
        "r2": float((1 - squared / spread).mean()) if (spread > rounding).all() else math.nan,
        "accuracy": float(every.right.sum(axis=0).mean() / weight),
        "pinball": float((every.pinball.sum(axis=0) * scale).mean() / weight),
        "deviance": 2 * loss,
    }
    return loss, {name: found[name] for name in named if math.isfinite(found[name])}
