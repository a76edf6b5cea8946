"""What a run on a table does where its settings do not say: the solver, the steps, the start.

The defaults of `Config` are those of the book, for its synthetic rows. A table has another number of rows, and its
columns have other units. What is chosen here depends on the rows and the settings alone, never on the devices.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from dpreg.config import Config
from dpreg.config.model import LABEL_LOSSES, LOCATED_LOSSES, LOG_LINK_LOSSES, MODELS
from dpreg.data.sources import RegressionData, Source
from dpreg.solvers.solver import widest_exact
from dpreg.spelling import spell
from dpreg.tables.ingest import Progress
from dpreg.tables.levels import BaseLevels
from dpreg.train.build import build_data

# Settings that say how steps are taken: whoever gives one asks for steps.
_OF_STEPS = (
    *("optimizer", "lr", "lr_schedule", "warmup_steps", "max_epochs", "patience", "batch_size", "sigma"),
    *("gradient_clip_val", "accumulate_steps", "log_every_steps", "checkpoint_every_steps", "profile"),
)
_SAMPLE_ROWS, _SAMPLE_VALUES = 1 << 16, 1 << 22  # of rows that stand for all: those of a table are in random order
_POWER_ITERATIONS = 30

# Steps of networks: batches of about a 64th of the rows, and steps enough for a small table.
_BATCHES_OF_EPOCH = 64
_SMALLEST_BATCH, _LARGEST_BATCH = 32, 1024
_LEAST_STEPS = {"network": 4000, "linear": 3000}
_STEPS_OF_ROW, _FEWEST_STEPS = 2.0, 200  # of a network, where all of the target is noise
_LEAST_EPOCHS = {"network": 10, "linear": 3}
_NETWORK_LR, _LARGEST_NETWORK_LR = 1e-3, 4e-3
_SGD_LR_OF_NETWORKS = 0.01
_WARM_UP = 0.05  # of the steps
_PATIENCE = 0.1  # of the epochs
_LEAST_PATIENCE = 10
_ROWS_OF_PATIENCE = 200  # held out: the loss of fewer is too noisy to stop by, so that they are fitted instead
_WEIGHT_DECAY, _ROWS_OF_WEIGHT_DECAY = 3.5, 500  # for a target of noise alone
_LEAST_ROWS = 150  # more decay than that of so many rows would bound the weights too much, as AdamW keeps |w| < 1 / l2
_LEAST_NOISE = {"steps": 0.01, "decay": 0.2}
_WEIGHT_DECAY_OF_OTHERS = 3.0  # of losses for which the noise is not estimated


def read_rows(config: Config, progress: Progress = lambda what, rows: None) -> tuple[Config, RegressionData, str]:
    """(the config with a value for each setting that depends on the rows, the rows, why it has that solver).

    Args:
      progress: as of `build_data`.

    Raises:
      InputError: as `build_data`.
    """
    is_table = config.dataset != "synthetic"
    if is_table and not config.is_given("target_transform"):
        config = dataclasses.replace(config, target_transform=_choose_transform(config))
    solver, why = _choose_solver(config)
    # All rows are fitted where no step needs others to stop by, unless the caller asks for validation rows.
    asked = config.is_given("validation_fraction") or config.validation_dataset is not None
    whole = solver != "sgd" and is_table and not asked
    data = build_data(dataclasses.replace(config, validation_fraction=0.0) if whole else config, progress)
    BaseLevels.named(data.schema, config.base)  # refuses unknown ones before the work begins
    if config.loss == "softmax" and data.schema and data.schema.labels and not config.is_given("num_classes"):
        config = dataclasses.replace(config, num_classes=len(data.schema.labels))
    if config.solver == "auto" and solver != "sgd" and (too_wide := _why_too_wide(config, data)):
        solver, why = "sgd", too_wide
        data = build_data(config, progress) if whole else data
    elif whole:
        config = dataclasses.replace(config, validation_fraction=0.0)
    elif config.model == "mlp" and is_table and not (asked or config.is_given("patience")) and _are_few(data.val):
        config = dataclasses.replace(config, validation_fraction=0.0)
        data = build_data(config, progress)
    config = dataclasses.replace(config, solver=solver)
    if solver == "sgd" and is_table:
        chosen = {name: value for name, value in _steps(config, data).items() if not config.is_given(name)}
        config = dataclasses.replace(config, **chosen)
        data.batch_size = config.batch_size
    return config, data, why


def _choose_transform(config: Config) -> str:
    if config.loss in LABEL_LOSSES:
        return "labels"
    has_unit = config.loss == "huber" and config.is_given("huber_delta")  # which is one of the target
    scaled = config.model == "mlp" and config.loss in LOCATED_LOSSES and not has_unit
    return "standardize" if scaled else "none"  # targets of a network are scaled, whatever their unit


def _choose_solver(config: Config) -> tuple[str, str]:
    """(the solver by the settings, why it was chosen): exact also for a table that turns out to be too wide."""
    if config.solver != "auto":
        return config.solver, ""
    if config.folds:
        return "exact", f"{spell('folds', config.folds)} chooses a penalty by one pass over the rows"
    if config.dataset == "synthetic":
        return "sgd", ""
    limited = spell("l1", config.l1) if config.l1 else spell("intercept", False)
    for applies, why in (
        (not config.is_linear, f"{spell('model', config.model)} has no exact solution"),
        (not config.has_exact_solution, f"{spell('loss', config.loss)} has no exact solution with {limited}"),
    ):
        if applies:
            return "sgd", why
    if given := [name for name in _OF_STEPS if config.is_given(name)]:
        return "sgd", f"{spell(given[0], getattr(config, given[0]))} is one of steps"
    way = "one pass over the rows" if config.loss == "squared" else "Newton's method"
    return "exact", f"the least loss, by {way}"


def _why_too_wide(config: Config, data: RegressionData) -> str:
    """Why an exact solution for so many features would take too long; empty where it does not."""
    size = (1 + data.num_inputs) * (config.num_classes if config.loss == "softmax" else 1)
    if size <= (widest := widest_exact(config)):
        return ""
    return f"{size:,} parameters are more than the {widest:,} up to which an exact solution is fast"


def _steps(config: Config, data: RegressionData) -> dict[str, Any]:
    """Settings of steps for the rows of a table."""
    rows, kind = len(data.train), "linear" if config.is_linear else "network"
    batch = 2 ** round(math.log2(max(1.0, rows / _BATCHES_OF_EPOCH)))
    batch = min(max(batch, _SMALLEST_BATCH), _LARGEST_BATCH)
    batch = config.batch_size if config.is_given("batch_size") else -(-batch // config.num_shards) * config.num_shards
    steps_of_epoch = -(-rows // (batch * config.accumulate_steps))
    noise = _noise(_sample(data)) if config.model == "mlp" and config.loss in LOCATED_LOSSES else None
    steps = _LEAST_STEPS[kind] if noise is None else _steps_for_noise(noise, rows)
    epochs = max(_LEAST_EPOCHS[kind], -(-steps // steps_of_epoch))
    epochs = config.max_epochs if config.is_given("max_epochs") else epochs
    chosen: dict[str, Any] = {"batch_size": batch, "max_epochs": epochs}
    if config.model not in MODELS:
        return chosen
    if not config.is_given("lr"):
        chosen["lr_schedule"] = "cosine"
    if kind == "network" and config.l1:  # which only sgd takes
        chosen["lr"] = _in_digits(_SGD_LR_OF_NETWORKS)
    elif kind == "network":
        chosen["optimizer"] = "adamw"
        chosen["lr"] = _in_digits(min(_NETWORK_LR * math.sqrt(batch / _SMALLEST_BATCH), _LARGEST_NETWORK_LR))
        chosen["warmup_steps"] = round(_WARM_UP * epochs * steps_of_epoch)
        if config.optimizer == "adamw" or not config.is_given("optimizer"):
            chosen["l2"] = _in_digits(_weight_decay(noise, rows))
        if data.val and not _are_few(data.val):
            chosen["patience"] = max(_LEAST_PATIENCE, round(_PATIENCE * epochs))
    else:
        chosen["lr"] = _in_digits(_rate_of_linear_model(config, data, batch))
    return chosen


def _are_few(val: Source | None) -> bool:
    """Whether there are validation rows, but too few of them to stop by."""
    return val is not None and 0 < len(val) < _ROWS_OF_PATIENCE


def _steps_for_noise(noise: float, rows: int) -> int:
    """The number of steps of a network with few rows: in proportion to rows / noise.

    Early stopping acts as a ridge penalty in proportion to 1 / steps (Ali, Kolter and Tibshirani 2019), and the best
    one is in proportion to noise / rows, see `_weight_decay`.
    """
    steps = math.ceil(_STEPS_OF_ROW * rows / max(noise, _LEAST_NOISE["steps"]))
    return min(max(steps, _FEWEST_STEPS), _LEAST_STEPS["network"])


def _weight_decay(noise: float | None, rows: int) -> float:
    """The weight decay of a network: in proportion to the noise of the target, and less for more rows.

    The best penalty of ridge regression is the variance of the noise over the number of rows and the variance of the
    weights (Hoerl, Kennard and Baldwin 1975). Beyond some rows, the decay falls more slowly, and validation rows end
    the run.
    """
    ratio = _ROWS_OF_WEIGHT_DECAY / max(rows, _LEAST_ROWS)
    if noise is None:
        return _WEIGHT_DECAY_OF_OTHERS * min(1.0, math.pow(ratio, 0.75))
    return _WEIGHT_DECAY * max(noise, _LEAST_NOISE["decay"]) * max(ratio, math.pow(ratio, 0.75))


def _noise(sample: dict[str, np.ndarray]) -> float:
    """The share of the target's variance that a linear model does not explain, which stands for that of the noise.

    It is 1 - adjusted R2 of weighted least squares, the mean over the targets; 1 for fewer than two rows a parameter.
    """
    rows, width = len(sample["weight"]), 1 + sample["x"].shape[1]
    if rows < 2 * width:
        return 1.0
    weight = sample["weight"].astype(np.float64) / sample["weight"].sum()
    root, y = np.sqrt(weight)[:, None], sample["y"].astype(np.float64)
    q, _ = np.linalg.qr(np.concatenate([root, root * sample["x"]], axis=1))
    y = root * (y - weight @ y)
    variance, residual = np.square(y).sum(axis=0), np.square(y - q @ (q.T @ y)).sum(axis=0)
    share = np.divide(residual, variance, out=np.ones_like(variance), where=variance > 0)
    return _in_digits(min(1.0, share.mean() * (rows - 1) / (rows - width)))


def _in_digits(value: float) -> float:
    """In three digits: further ones may depend on the machine, and a run goes on only with equal settings."""
    return float(f"{value:.3g}")


def _rate_of_linear_model(config: Config, data: RegressionData, batch: int) -> float:
    """A learning rate for which the steps of a linear model neither diverge nor crawl.

    Gradient descent on the mean loss converges for rates below 2 over its curvature: the second derivative of the loss
    by the prediction, times the largest eigenvalue of the second moments of the features. The noise of batches adds to
    that eigenvalue the mean squared length of rows over the batch size (Bach and Moulines 2013).
    """
    sample = _sample(data)
    weight = sample["weight"] / sample["weight"].sum()
    x = np.concatenate([np.ones((len(weight), 1)), sample["x"]], axis=1, dtype=np.float64)
    square = float(weight @ np.square(x).sum(axis=1))
    direction = np.ones(x.shape[1])
    for _ in range(_POWER_ITERATIONS):
        direction = x.T @ (weight * (x @ (direction / np.linalg.norm(direction))))
    largest = float(np.linalg.norm(direction))
    y = sample["y"].astype(np.float64)
    deviation = float(np.sqrt(weight @ np.square(y - weight @ y)).mean())
    rate = 1 / (largest + 3 * square / batch)
    if config.optimizer == "lbfgs":
        return 1.0
    if config.optimizer in ("adam", "adamw"):
        return 0.03 * (deviation or 1.0) if config.loss in LOCATED_LOSSES else 0.03
    if config.optimizer == "momentum":
        rate /= 10
    if config.loss == "huber":
        return rate * max(1.0, deviation / config.huber_delta)
    if config.loss in ("absolute", "quantile"):  # whose gradients have one length
        return rate * (deviation or 1.0)
    mean, alpha = max(float((weight @ y).mean()), 0.1), config.negative_binomial_alpha or 1.0
    curvature: dict[str, float] = {
        "squared": 1.0,
        "logistic": 0.25,
        "softmax": 0.5,
        "gamma": 4.0,
        "poisson": 4 * mean,
        "tweedie": 4 * mean ** (2 - config.tweedie_power),
        "negative_binomial": 4 * mean / (1 + alpha * mean),
    }
    return rate / curvature[config.loss]


def constant_fit(config: Config, data: RegressionData) -> tuple[float, ...] | None:
    """What a model without features would predict before any link, one value an output; None for a model of the user's.

    The means and quantiles are those of the first 65,536 rows at most, which are in random order, in six digits.
    """
    found = _constant_fit(config, data)
    return None if found is None else tuple(float(f"{value:.6g}") for value in found)


def _constant_fit(config: Config, data: RegressionData) -> tuple[float, ...] | None:
    if config.dataset == "synthetic" or config.model not in MODELS:
        return None
    sample = _sample(data)
    weight, y = sample["weight"] / sample["weight"].sum(), sample["y"].astype(np.float64)
    if config.loss == "softmax":
        count = weight @ (y == np.arange(config.num_classes)) * len(y) + 0.5
        return tuple(np.log(count / count.sum()).tolist())
    if config.loss in ("huber", "absolute", "quantile"):
        share = config.quantile if config.loss == "quantile" else 0.5
        return tuple(_quantile(column, weight, share) for column in y.T)
    mean = weight @ y
    least = 0.5 / len(y)
    if config.loss == "logistic":
        mean = np.clip(mean, least, 1 - least)
        return tuple(np.log(mean / (1 - mean)).tolist())
    if config.loss in LOG_LINK_LOSSES:
        of_counts = config.loss in ("poisson", "negative_binomial")
        mean = np.log(np.maximum(mean, least if of_counts else np.finfo(np.float32).tiny))
    return tuple(mean.tolist())


def _sample(data: RegressionData) -> dict[str, np.ndarray]:
    most = min(_SAMPLE_ROWS, max(256, _SAMPLE_VALUES // data.num_inputs))
    rows = data.train[np.arange(min(most, len(data.train)), dtype=np.int32)]
    return {name: np.asarray(rows[name]) for name in ("x", "y", "weight")}


def _quantile(values: np.ndarray, weight: np.ndarray, share: float) -> float:
    order = np.argsort(values, kind="stable")
    at = np.searchsorted(np.cumsum(weight[order]), share)
    return float(values[order[min(int(at), len(values) - 1)]])
