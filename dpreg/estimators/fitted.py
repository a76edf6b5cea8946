"""The state that an estimator keeps after training."""

import dataclasses
import functools
from typing import Any

import numpy as np
from jax.sharding import Mesh

from dpreg.config import Config
from dpreg.data.schema import Number, Schema
from dpreg.distributed import devices
from dpreg.models.losses import Loss
from dpreg.models.module import Module
from dpreg.solvers.fit import Fit
from dpreg.solvers.tsqr import RFactor
from dpreg.step.state import Model
from dpreg.tables.statistics import SMALLEST
from dpreg.train.build import build_model, objective_and_optimizer
from dpreg.train.predictor import Predictor

_TINY = float(np.finfo(np.float64).tiny)


@dataclasses.dataclass
class Fitted:
    """The state that an estimator keeps after training, as plain values and NumPy arrays.

    Attributes:
      config: the settings of the run.
      module: the user's model, if it is not one of dpreg.
      targets: the number of columns of y.
      one_column: whether y was an array with a single axis.
      schema: the units in which the model reads the rows.
      r_factor: the R factor of all rows so far, if least squares were solved exactly.
      fit: an exact fit of centred and scaled columns, and their means [d + t].
      weighted: whether rows had weights other than 1.
      variables, optimizer: the variables and the optimizer state, if an optimizer was used.
      centred: for a linear model the means of the features [d], the prediction there [p], w [d, p] and b [p].
    """

    config: Config
    module: Model | None
    targets: int
    one_column: bool
    schema: Schema
    r_factor: RFactor | None = None
    fit: tuple[Fit, np.ndarray] | None = None
    weighted: bool = False
    variables: Any = None
    optimizer: Any = None
    centred: tuple[np.ndarray, ...] = ()

    @property
    def is_linear(self) -> bool:
        """Whether the model is one of dpreg's linear models."""
        return self.module is None and self.config.model in ("linear", "concise")

    @property
    def objective(self) -> Loss:
        """The loss, with its penalty and link."""
        loss: Loss = objective_and_optimizer(self.config)["objective"]
        return loss

    @property
    def outputs(self) -> int:
        """The number of columns of a prediction."""
        return self.objective.outputs(self.targets)

    @property
    def mesh(self) -> Mesh:
        """The mesh of the devices to compute on."""
        return devices.data_mesh(self.config.num_shards, self.config.platform, self.config.num_devices)

    def scale(self, x: np.ndarray) -> np.ndarray:
        """Converts features [n, d] to the units of the model. Those that were constant in training become 0."""
        mean, scale = (values[: x.shape[1]] for values in self.schema.units)
        scaled: np.ndarray = np.where(self.schema.constant, 0.0, (x - mean) / scale)
        return scaled

    def model(self, config: Config, num_steps: int = 1) -> Model:
        """The model to train for `num_steps` steps, or to predict with."""
        if self.module is None:
            return build_model(config, len(self.schema.inputs), self.targets, num_steps)
        if not isinstance(self.module, Module):
            return self.module
        own = objective_and_optimizer(config, num_steps)
        return self.module.clone(**own | {"optimizer": self.module.optimizer or own["optimizer"]})

    @functools.cached_property
    def predictor(self) -> Predictor:
        """The predictor of a model that is not linear. It predicts the outputs before the inverse link."""
        config, model = self.config, self.model(self.config)
        if isinstance(model, Module):
            model = model.clone(objective=dataclasses.replace(model.objective, mean=lambda prediction: prediction))
        return Predictor(
            model,
            self.variables,
            len(self.schema.inputs),
            self.targets,
            mesh=self.mesh,
            num_shards=config.num_shards,
            batch_size=config.batch_size,
            schema=self.schema,
            reduction=config.reduction,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in self.__dict__.items() if name != "predictor"
        }  # it has compiled functions


def compute_moments(columns: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weighted mean and standard deviation [m] of columns [n, m] float64; the deviation of a constant is 0."""
    first = columns[0]  # shift by the first row, to lose no digits to large means
    mean = first + weight @ (columns - first) / weight.sum()
    deviation = np.sqrt(weight @ np.square(columns - mean) / weight.sum())
    return mean, np.where((columns != first).any(axis=0), np.maximum(deviation, _TINY), 0.0)


def moments_from_r(triangle: RFactor) -> tuple[np.ndarray, np.ndarray]:
    """The result of `compute_moments`, to rounding, from the R factor of the rows."""
    centred = triangle.r[1:, 1:]  # the R factor of the centred columns; exactly 0 for constants
    length = np.sqrt(np.square(centred).sum(axis=0))
    deviation = np.where(length < SMALLEST, _TINY, length / np.sqrt(triangle.weight))
    return triangle.means, np.where(centred.any(axis=0), deviation, 0.0)


def update_constants(schema: Schema, x: np.ndarray) -> Schema:
    """The schema after further rows x [n, d]: a column with another value in them is no longer constant."""
    same_value = (x == schema.units[0][: x.shape[1]]).all(axis=0)
    columns = zip(schema.inputs, same_value, strict=True)
    inputs = (dataclasses.replace(c, constant=c.constant and bool(s)) for c, s in columns if isinstance(c, Number))
    return dataclasses.replace(schema, inputs=tuple(inputs))
