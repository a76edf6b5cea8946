"""Metrics of predictions, from sums of losses and errors that do not depend on how rows are distributed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from dpreg.errors import InputError
from dpreg.models.losses import loss_of, row_losses

_ROUNDINGS_OF_MEAN = 4  # the error of the mean of equal targets, in units in the last place


class EvalSums(NamedTuple):
    """Weighted sums over the rows of a shard's batch, from which all metrics are computed.

    Sums of targets are [t]. `mean` and `spread` are the weighted mean of the targets and the weighted sum of squares
    around it. `right` is the weight of the targets that are predicted to the nearest integer.

    Squares of tiny values would underflow and those of huge ones overflow. So values are multiplied by a power of two,
    2**-e, that brings the largest of the batch near 1, which changes none of their digits. The exponents e [t] are
    `error_exponent` for `absolute_error`, `squared_error` (in units of 4**e) and `pinball`; `mean_exponent` for `mean`;
    and `spread_exponent` for `spread` (in units of 4**e).
    """

    weight: Any
    loss: Any
    absolute_error: Any
    squared_error: Any
    pinball: Any
    error_exponent: Any
    right: Any
    mean: Any
    mean_exponent: Any
    spread: Any
    spread_exponent: Any


def eval_sums(
    model: Any,
    log_targets: bool,
    variables: Mapping[str, Any],
    prediction: Array,
    batch: dict[str, Array],
    smearing: Sequence[float] = (),
) -> EvalSums:
    """The sums of one shard's batch, traced.

    Args:
      model: a model with a `loss`.
      log_targets: whether the model predicts logarithms of the targets. The errors are those of the targets
        themselves, while the loss is that of the logarithms.
      smearing: with logarithms, factors [t] by which predicted medians become means; none for medians.
      variables: "params" and "batch_stats" of the model.
      prediction: [b, p], the predictions for the batch.
      batch: {"x": [b, d], "y": [b, t], "weight": [b]}.

    Raises:
      InputError: when the model does not predict one column for each target.
    """
    weight, target = batch["weight"], batch["y"]
    losses = row_losses(model, variables, prediction, batch)
    mean_of = loss_of(model).mean(prediction)
    if mean_of.shape != target.shape:
        raise InputError(
            f"the model predicts {list(prediction.shape)} where the target is {list(target.shape)}; "
            "give one column for each target"
        )
    if smearing:
        mean_of += jnp.asarray(np.log([*smearing]), mean_of.dtype)[None]
    if log_targets:
        mean_of, target = jnp.exp(mean_of), jnp.exp(target)
    counts = weight[:, None] > 0
    error, target = jnp.where(counts, mean_of - target, 0), jnp.where(counts, target, 0)
    total = weight.sum()
    scaled_error, error_exponent = _scaled(error)
    scaled_target, mean_exponent = _scaled(target)
    mean = weight @ scaled_target / jnp.where(total > 0, total, 1)
    apart, spread_exponent = _scaled(jnp.where(counts, scaled_target - mean[None], 0))
    return EvalSums(
        total,
        jnp.vdot(losses, weight),
        weight @ jnp.abs(scaled_error),
        weight @ jnp.square(scaled_error),
        weight @ (jnp.abs(scaled_error) / 2 - (loss_of(model).quantile - 0.5) * scaled_error),
        error_exponent,
        weight @ (jnp.abs(error) < 0.5).astype(weight.dtype),
        mean,
        mean_exponent,
        weight @ jnp.square(apart),
        spread_exponent + mean_exponent,
    )


def _scaled(values: Array) -> tuple[Array, Array]:
    """(values [b, t] times 2**-e, e [t] of their dtype): the largest becomes 1/2 or more, and less than 1."""
    limits = np.finfo(np.dtype(values.dtype))
    largest = jnp.abs(values).max(axis=0)
    # Zeros take the exponent of the smallest number, and values that are not finite that of the largest.
    exponent = jnp.frexp(jnp.clip(largest, limits.tiny, limits.max))[1].astype(values.dtype)
    return _times_power(values, -exponent[None]), exponent


def _times_power(values: Array, exponent: Array) -> Array:
    """Values times 2**exponent, in two steps, since the dtype may not represent that power."""
    one, whole = jnp.ones((), values.dtype), exponent.astype(jnp.int32)
    half = whole // 2
    return values * jnp.ldexp(one, half) * jnp.ldexp(one, whole - half)


def metrics(
    blocks: Sequence[EvalSums],
    scale: np.ndarray | float = 1.0,
    named: Sequence[str] = ("rmse", "mae", "r2"),
    of_squares: bool = False,
) -> tuple[float, dict[str, float]]:
    """The mean loss and the metrics from the sums of all batches, added in float64 in one fixed order.

    rmse, mae, pinball and accuracy (the share within 1/2 of the target) are over all values of all targets; r2 is the
    mean over targets; deviance is twice the mean loss. The spread of the targets is combined from the spreads within
    batches and the spread of their means (Chan, Golub and LeVeque 1983). Undefined metrics, such as r2 without spread,
    are left out.

    Args:
      blocks: for each block its sums, [steps, shards, ...].
      scale: [t], the unit of each target; the loss is not scaled.
      named: the names of the metrics to compute.
      of_squares: whether the loss of a row is half its squared error; a mean loss that underflows in the dtype is then
        computed from the squared errors.
    """
    # Without entries of weight 0, such as steps that fill up a block: the order of a sum depends on their number.
    counted = [np.asarray(block.weight) > 0 for block in blocks]
    every = EvalSums(
        *(
            np.concatenate([np.asarray(leaf)[at] for leaf, at in zip(leaves, counted, strict=True)]).astype(np.float64)
            for leaves in zip(*blocks, strict=True)
        )
    )
    weight = every.weight.sum()
    if weight == 0:
        return 0.0, {}
    limits = np.finfo(np.asarray(blocks[0].mean).dtype)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # values that are not finite are left out below
        # In units of the largest power of two of all batches, of each target: [t].
        (of_errors,), unit = _powers(every.weight, every.error_exponent)
        (of_means, of_spreads), unit_of_targets = _powers(every.weight, every.mean_exponent, every.spread_exponent)
        absolute, pinball = ((sums * of_errors).sum(axis=0) for sums in (every.absolute_error, every.pinball))
        squared = (every.squared_error * np.square(of_errors)).sum(axis=0)
        center = every.weight @ (every.mean * of_means) / weight
        spread = (every.spread * np.square(of_spreads)).sum(axis=0)
        spread += every.weight @ np.square(every.mean * of_means - center)
        # What rounding may make of equal targets.
        rounding = weight * np.square(_ROUNDINGS_OF_MEAN * limits.eps * center)
        in_units = unit * scale
        largest = float(np.exp2(np.frexp(in_units.max())[1]))
        loss = float(every.loss.sum() / weight)
        if of_squares and loss < limits.tiny / limits.eps:  # digits of it are lost, or all
            loss = float((squared * unit / 2 * unit).sum() / weight)
        found = {
            "rmse": float(np.sqrt((squared * np.square(in_units / largest)).mean() / weight) * largest),
            "mae": float((absolute * in_units).mean() / weight),
            "r2": float((1 - squared / spread * np.square(unit / unit_of_targets)).mean()),
            "accuracy": float(every.right.sum(axis=0).mean() / weight),
            "pinball": float((pinball * in_units).mean() / weight),
            "deviance": 2 * loss,
        }
    if not (spread > rounding).all():
        found["r2"] = math.nan
    return loss, {name: found[name] for name in named if math.isfinite(found[name])}


def _powers(weight: np.ndarray, *exponents: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """2**(e - m) for each of several exponents e [n, t], and 2**m [t], where m is the largest of rows with a weight."""
    largest = np.max([np.where(weight[:, None] > 0, e, -np.inf).max(axis=0) for e in exponents], axis=0)
    return [np.ldexp(1.0, (e - largest).astype(int)) for e in exponents], np.ldexp(1.0, largest.astype(int))
