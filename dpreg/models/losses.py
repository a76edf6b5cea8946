"""Losses: functions of (prediction, target) with one value per row, and their links, domains and metrics.

Predictions are [n, t] float, on the scale of the link if the loss has one; targets are [n, t]. Rows have weights, so
no loss here is a mean. A loss that is a "half deviance" is 0 for a perfect prediction; twice its mean is the deviance
that R and scikit-learn report.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from dpreg.config import Config
from dpreg.config.model import LABEL_LOSSES
from dpreg.errors import InputError, quote_names
from dpreg.spelling import spell

RowLoss = Callable[[Array, Array], Array]


def _refuse_broadcasts(prediction: Array, target: Array) -> None:
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {list(prediction.shape)} and target {list(target.shape)} differ in shape; "
            "give both as [rows, targets]"
        )


def squared_loss(prediction: Array, target: Array) -> Array:
    """Half the squared error, (prediction - target)^2 / 2, summed over the targets (D2L section 3.1.1.2).

    Args:
      prediction: [n, t] float.
      target: [n, t] float; the same shape, since a broadcast here is a wrong loss without an error.

    Returns:
      [n]: the loss of each row, unweighted.

    Raises:
      ValueError: when the shapes differ.

    >>> squared_loss(jnp.array([[3.0], [1.0]]), jnp.array([[1.0], [1.0]]))
    Array([2., 0.], dtype=float32)
    """
    _refuse_broadcasts(prediction, target)
    return jnp.square(prediction - target).reshape(len(target), -1).sum(axis=1) / 2


def huber_loss(prediction: Array, target: Array, delta: float = Config.huber_delta) -> Array:
    """e^2 / 2 for errors |e| up to delta, delta (|e| - delta / 2) beyond (Huber 1964; optax.huber_loss). -> [n]."""
    _refuse_broadcasts(prediction, target)
    losses: Array = optax.huber_loss(prediction, target, delta=delta).sum(axis=1)
    return losses


def absolute_loss(prediction: Array, target: Array) -> Array:
    """|prediction - target|, least for the median (Laplace). -> [n]."""
    _refuse_broadcasts(prediction, target)
    return jnp.abs(prediction - target).sum(axis=1)


def quantile_loss(prediction: Array, target: Array, quantile: float = Config.quantile) -> Array:
    """The pinball loss max(q e, (q - 1) e) of e = target - prediction (Koenker and Bassett 1978). -> [n]."""
    _refuse_broadcasts(prediction, target)
    error = target - prediction
    return jnp.maximum(quantile * error, (quantile - 1) * error).sum(axis=1)


def logistic_loss(prediction: Array, target: Array) -> Array:
    """The cross-entropy of targets 0 and 1 with logits, log(1 + e^z) - y z: half deviance, link logit. -> [n]."""
    _refuse_broadcasts(prediction, target)
    losses: Array = optax.sigmoid_binary_cross_entropy(prediction, target).sum(axis=1)
    return losses


def softmax_loss(prediction: Array, target: Array) -> Array:
    """The cross-entropy of labels 0 to C - 1 [n, 1] with logits [n, C] (D2L section 4.1): half deviance. -> [n]."""
    labels = target[:, 0].astype(jnp.int32)
    losses: Array = optax.softmax_cross_entropy_with_integer_labels(prediction, labels)
    return losses


def poisson_loss(prediction: Array, target: Array) -> Array:
    """Half the deviance of counts with log link, y log(y / m) - y + m with m = e^z (McCullagh and Nelder). -> [n].

    It is computed as y (e^t - 1 - t) with t = log(m / y), since a difference of large counts would lose its digits.
    """
    _refuse_broadcasts(prediction, target)
    some = target > 0
    ratio = prediction - jnp.log(jnp.where(some, target, 1))
    return jnp.where(some, target * (jnp.expm1(ratio) - ratio), jnp.exp(prediction)).sum(axis=1)


def gamma_loss(prediction: Array, target: Array) -> Array:
    """Half the deviance of positive targets with log link, y / m - 1 - log(y / m) with m = e^z. -> [n]."""
    _refuse_broadcasts(prediction, target)
    ratio = jnp.log(target) - prediction
    return (jnp.expm1(ratio) - ratio).sum(axis=1)


def tweedie_loss(prediction: Array, target: Array, power: float = Config.tweedie_power) -> Array:
    """Half the deviance of targets of 0 or more whose variance is that power of the mean (Jorgensen 1987). -> [n].

    The link is log, the power p in (1, 2). With m = e^z and t = log(m / y), half the deviance of a target above 0 is
    y^(2 - p) ((e^((2 - p) t) - 1) / (2 - p) - (e^((1 - p) t) - 1) / (1 - p)), and m^(2 - p) / (2 - p) of a target of 0.
    """
    _refuse_broadcasts(prediction, target)
    some, of_mean, of_ratio = target > 0, 2 - power, 1 - power
    y = jnp.where(some, target, 1)
    ratio = prediction - jnp.log(y)
    of_some = y**of_mean * (jnp.expm1(of_mean * ratio) / of_mean - jnp.expm1(of_ratio * ratio) / of_ratio)
    return jnp.where(some, of_some, jnp.exp(of_mean * prediction) / of_mean).sum(axis=1)


def negative_binomial_loss(prediction: Array, target: Array, alpha: float) -> Array:
    """Half the deviance of counts whose variance is m + alpha m^2, with log link, m = e^z (Hilbe 2011). -> [n].

    With q = alpha y / (1 + alpha y) and t = log(m / y) it is y (log(1 + q (e^t - 1)) / q - t) of a count above 0, and
    log(1 + alpha m) / alpha of 0.
    """
    _refuse_broadcasts(prediction, target)
    some = target > 0
    y = jnp.where(some, target, 1)
    ratio, share = prediction - jnp.log(y), alpha * y / (1 + alpha * y)
    of_some = y * (jnp.log1p(share * jnp.expm1(ratio)) / share - ratio)
    return jnp.where(some, of_some, jnp.logaddexp(0, prediction + math.log(alpha)) / alpha).sum(axis=1)


def _itself(prediction: Array) -> Array:
    return prediction


def _most_likely(prediction: Array) -> Array:
    return prediction.argmax(axis=1, keepdims=True).astype(prediction.dtype)


def _are_labels(target: np.ndarray, classes: int) -> np.ndarray:
    labels: np.ndarray = (target >= 0) & (target < classes) & (target == np.floor(target))
    return labels


def _anything(target: np.ndarray) -> np.ndarray:
    return np.ones(target.shape, bool)


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss with its link, its metrics and the targets that it is defined for.

    Attributes:
      name: the name, as in `Config.loss`.
      rows: (prediction, target) -> [n], the loss of each row.
      mean: prediction [n, p] -> predicted targets [n, t]: the inverse of the link, or the most probable label.
      metrics: the names of the metrics of `dpreg.models.metrics.metrics` that fit the loss.
      domain: a description of valid targets; allowed: target [n, t] -> bool, which targets are valid.
      num_classes: the number of classes if targets are labels, for each of which the model predicts a column; else 0.
      quantile: the quantile of the metric "pinball".
    """

    name: str
    rows: RowLoss
    mean: Callable[[Array], Array] = _itself
    metrics: tuple[str, ...] = ("rmse", "mae", "r2")
    domain: str = ""
    allowed: Callable[[np.ndarray], np.ndarray] = _anything
    num_classes: int = 0
    quantile: float = Config.quantile

    def outputs(self, num_targets: int) -> int:
        """The number of columns that a model has to predict.

        Raises:
          InputError: for several targets if targets are labels.
        """
        if self.num_classes and num_targets > 1:
            raise InputError(
                f"{spell('loss', self.name)}: it has one target of labels, and there are {num_targets}; name one"
            )
        return self.num_classes or num_targets

    def check_labels(self, target: str, labels: Sequence[str]) -> None:
        """Raises InputError unless the loss is defined for these labels of a target."""
        column = f"column {target!r} has {len(labels)} labels, {quote_names(labels)}"
        if self.name not in LABEL_LOSSES:
            raise InputError(f"{column}, which the loss is not defined for; use {spell('loss', *LABEL_LOSSES)}")
        if not self.num_classes and len(labels) != 2:
            softmax = spell("loss", "softmax")
            raise InputError(f"{spell('loss', self.name)}: {column}, and is defined for two; use {softmax}")
        if self.num_classes and len(labels) != self.num_classes:
            none = spell("target_transform", "none")
            raise InputError(
                f"{spell('num_classes', self.num_classes)}: {column}; leave it out, or use {none} for numbers from 0"
            )

    def refusal(self, row: int, target: Iterable[float], remedy: str | None = None) -> InputError:
        """The error for a target outside the domain, in a row that is numbered from 1."""
        is_now, remedy = ", ".join(f"{value:g}" for value in target), remedy or self._another_loss()
        return InputError(
            f"{spell('loss', self.name)}: the target in row {row:,} is {is_now} and has to be {self.domain}; "
            f"correct it, or {remedy}"
        )

    def _another_loss(self) -> str:
        larger = f"a larger {spell('num_classes')} or " if self.num_classes else ""
        return f"use {larger}another {spell('loss')}"


SQUARED = Loss("squared", squared_loss)


def make_loss(
    name: str,
    huber_delta: float = Config.huber_delta,
    quantile: float = Config.quantile,
    num_classes: int = Config.num_classes,
    tweedie_power: float = Config.tweedie_power,
    negative_binomial_alpha: float | None = Config.negative_binomial_alpha,
) -> Loss:
    """The loss of a name in `Config.loss`.

    Args:
      name: such as "squared".
      huber_delta: the delta of "huber", in units of the target.
      quantile: the quantile of "quantile", in (0, 1).
      num_classes: the number of classes of "softmax", C.
      tweedie_power: the power of "tweedie", in (1, 2).
      negative_binomial_alpha: the alpha of "negative_binomial", above 0; None stands for 1, until it is estimated.
    """
    of_classes: dict[str, Any] = {"metrics": ("accuracy", "deviance")}
    of_means: dict[str, Any] = {"mean": jnp.exp, "metrics": ("deviance", "rmse", "mae", "r2")}
    from_0: dict[str, Any] = {"domain": "0 or more", "allowed": lambda y: y >= 0} | of_means
    return {
        "squared": SQUARED,
        "huber": Loss(name, functools.partial(huber_loss, delta=huber_delta)),
        "absolute": Loss(name, absolute_loss),
        "quantile": Loss(
            name, functools.partial(quantile_loss, quantile=quantile), metrics=("pinball", "mae"), quantile=quantile
        ),
        "logistic": Loss(
            name, logistic_loss, jax.nn.sigmoid, domain="0 or 1", allowed=lambda y: _are_labels(y, 2), **of_classes
        ),
        "softmax": Loss(
            name,
            softmax_loss,
            _most_likely,
            domain=f"a label from 0 to {num_classes - 1}",
            allowed=lambda y: _are_labels(y, num_classes),
            num_classes=num_classes,
            **of_classes,
        ),
        "poisson": Loss(name, poisson_loss, **from_0),
        "gamma": Loss(name, gamma_loss, domain="above 0", allowed=lambda y: y > 0, **of_means),
        "tweedie": Loss(name, functools.partial(tweedie_loss, power=tweedie_power), **from_0),
        "negative_binomial": Loss(
            name, functools.partial(negative_binomial_loss, alpha=negative_binomial_alpha or 1.0), **from_0
        ),
    }[name]


def loss_of(model: Any) -> Loss:
    """The loss of a model; for a model with nothing but a method `loss`, that method, without a link."""
    objective = getattr(model, "objective", None)
    return objective if isinstance(objective, Loss) else Loss("own", model.loss)


def row_losses(model: Any, variables: Mapping[str, Any], prediction: Array, batch: Mapping[str, Array]) -> Array:
    """The loss of each row, [n]; 0 for rows without weight.

    A model whose loss reads more than prediction and target has a method `row_losses(variables, prediction, batch)`.

    Args:
      model: the model, whose `loss` or `row_losses` is applied.
      variables: "params" and "batch_stats" of the model.
      prediction: [n, p], the predictions for the batch.
      batch: {"x": [n, d], "y": [n, t], "weight": [n]}.

    Raises:
      InputError: when there is not one prediction for each row, or the model's loss does not give one value per row
        but, for example, their mean.
    """
    counts = batch["weight"] > 0
    if prediction.shape[:1] != counts.shape:
        raise InputError(
            f"the model predicts {list(prediction.shape)} for {len(counts)} rows; give a prediction for each row, "
            "[rows, targets]"
        )
    # The predictions are replaced as well as the loss: its derivative may be infinite, and infinity times 0 is NaN.
    along = counts.reshape(-1, *[1] * (prediction.ndim - 1))
    prediction = jnp.where(along, prediction, 0)
    own = getattr(model, "row_losses", None)
    losses = model.loss(prediction, batch["y"]) if own is None else own(variables, prediction, batch)
    if losses.shape != batch["weight"].shape:
        raise InputError(
            f"the model's loss gives {list(losses.shape)} for {len(batch['weight'])} rows; "
            "give one value for each row, [rows], and no mean: rows have weights"
        )
    return jnp.where(counts, losses, 0)
