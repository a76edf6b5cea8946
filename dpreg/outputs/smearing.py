"""Duan's smearing factor, by which the median that a model of logarithms predicts becomes a mean (Duan 1983)."""

import collections
from collections.abc import Callable, Iterator

import numpy as np

from dpreg.config import Config
from dpreg.data.pipeline import CastSource
from dpreg.data.sources import RegressionData, Rows
from dpreg.models.linear import linear_parameters
from dpreg.solvers.solver import Solver
from dpreg.train.trainer import Trainer


def smearing_factors(
    config: Config, trainer: Trainer, data: RegressionData, heartbeat: Callable[[], None] = lambda: None
) -> tuple[float, ...] | None:
    """For each target, the weighted mean of exp(residual) over the training rows, where residuals are of logarithms.

    It estimates the mean of exp(error), whatever the distribution of the errors is, if it is the same for all rows. For
    a linear model it has the same bits on any devices, for another model if its predictions have. All processes have
    to call this.

    Args:
      config, trainer, data: of a run that has ended.
      heartbeat: called whenever some rows are done.

    Returns:
      None where a factor is not finite, and for a model that predicts something else than the logarithm of each target.
    """
    linear = linear_parameters(trainer.state.params) if config.is_linear else None
    if linear is None:
        weight, *sums = _sum_over_predictions(trainer, data)
    else:
        solver = Solver(CastSource(data.train, config.precision), trainer.mesh, config.num_shards, heartbeat)
        weight, *sums = _sum_over_shards(solver, *linear)
    factors = np.array(sums) / weight
    if len(factors) != data.num_targets or not (np.isfinite(factors) & (factors > 0)).all():
        return None
    return tuple(factors.tolist())


def _sum_over_shards(solver: Solver, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[1 + t]: the sum of the weights, and those of weight exp(residual) of a linear model."""
    w, b = w.astype(np.float64), b.astype(np.float64)

    def add(rows: Rows) -> np.ndarray:
        x, y, weight = (rows[name].astype(np.float64) for name in ("x", "y", "weight"))
        with np.errstate(over="ignore"):  # in the thread that computes
            return np.append(weight.sum(), weight @ np.exp(y - x @ w - b))

    return solver.sums(1 + len(b), add)


def _sum_over_predictions(trainer: Trainer, data: RegressionData) -> np.ndarray:
    """The same for any model, by the predictions of its rows; the weight alone if it predicts another number."""
    predictor, waiting = trainer.predictor(), collections.deque[Rows]()

    def chunks() -> Iterator[Rows]:
        for rows in predictor.chunks(data.train, encoded=True):
            waiting.append(rows)
            yield rows

    total = np.zeros(1 + data.num_targets)
    for predicted in predictor.predictions(chunks()):
        rows = waiting.popleft()
        observed, weight = np.exp(rows["y"].astype(np.float64)), rows["weight"].astype(np.float64)
        if predicted.shape != observed.shape:
            total = total[:1]
        else:
            with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
                total += np.append(weight.sum(), weight @ (observed / predicted))
    return total
