"""What an estimator keeps of training."""

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
from dpreg.solvers.tsqr import Fit, RFactor
from dpreg.step.state import Model
from dpreg.tables.statistics import SMALLEST
from dpreg.train.build import build_model, objective_and_optimizer
from dpreg.train.predictor import Predictor

_TINY = float(np.finfo(np.float64).tiny)


@dataclasses.dataclass
class Fitted:
    """What an estimator keeps of training, in plain values and NumPy arrays.

    Attributes:
      config: of the run.
      module: the user's own, if any.
      targets: columns of y; one_column: whether y was an array with a single axis.
      schema: the units, by which the model sees the rows.
      triangle: of all rows so far, where least squares are solved exactly.
      fit: an exact fit of columns less their means and over their scale, with these means [d + t].
      variables, optimizer: of the trained model, where steps were taken.
      around: of a linear model the means [d] of features, what it predicts there [p], and w [d, p] and b [p].
    """

    config: Config
    module: Model | None
    targets: int
    one_column: bool
    schema: Schema
    triangle: RFactor | None = None
    fit: tuple[Fit, np.ndarray] | None = None
    variables: Any = None
    optimizer: Any = None
    around: tuple[np.ndarray, ...] = ()

    @property
    def is_linear(self) -> bool:
        """Whether the model is one of the linear ones that `dpreg.sklearn` knows by name."""
        return self.module is None and self.config.model in ("linear", "concise")

    @property
    def objective(self) -> Loss:
        """The loss, with its penalty and link."""
        loss: Loss = objective_and_optimizer(self.config)["objective"]
        return loss

    @property
    def outputs(self) -> int:
        """Columns that the model predicts."""
        return self.objective.outputs(self.targets)

    @property
    def mesh(self) -> Mesh:
        """The devices to compute on, in their order."""
        return devices.data_mesh(self.config.num_shards, self.config.platform, self.config.num_devices)

    def scaled(self, x: np.ndarray) -> np.ndarray:
        """Rows [n, d] as the model sees them."""
        mean, scale = (part[: x.shape[1]] for part in self.schema.units)
        scaled: np.ndarray = np.where(self.schema.constant, 0.0, (x - mean) / scale)
        return scaled

    def model(self, config: Config, num_steps: int = 1) -> Model:
        """The model to train for so many steps, or to predict with."""
        if self.module is None:
            return build_model(config, len(self.schema.inputs), self.targets, num_steps)
        if not isinstance(self.module, Module):
            return self.module
        own = objective_and_optimizer(config, num_steps)
        return self.module.clone(**own | {"optimizer": self.module.optimizer or own["optimizer"]})

    @functools.cached_property
    def predictor(self) -> Predictor:
        """Of a model that is not linear; gives what it adds up, before any link."""
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
        return {name: value for name, value in self.__dict__.items() if name != "predictor"}  # compiled, on devices


def moments(columns: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of columns [n, m] float64; 0 for the deviation of constants."""
    first = columns[0]  # a column far from 0 keeps its digits around it
    mean = first + weight @ (columns - first) / weight.sum()
    deviation = np.sqrt(weight @ np.square(columns - mean) / weight.sum())
    return mean, np.where((columns != first).any(axis=0), np.maximum(deviation, _TINY), 0.0)


def moments_of(triangle: RFactor) -> tuple[np.ndarray, np.ndarray]:
    """The result of `moments`, to rounding, for the rows of a triangle, whose first row is that of the means."""
    about = triangle.r[1:, 1:]  # exactly 0 of constants
    spread = np.sqrt(np.square(about).sum(axis=0))
    deviation = np.where(spread < SMALLEST, _TINY, spread / np.sqrt(triangle.weight))
    return triangle.means, np.where(about.any(axis=0), deviation, 0.0)


def varying(schema: Schema, x: np.ndarray) -> Schema:
    """The schema of earlier rows for these [n, d], too: a column that has another value here is not constant."""
    one_value = (x == schema.units[0][: x.shape[1]]).all(axis=0)
    columns = zip(schema.inputs, one_value, strict=True)
    inputs = (dataclasses.replace(c, constant=c.constant and bool(o)) for c, o in columns if isinstance(c, Number))
    return dataclasses.replace(schema, inputs=tuple(inputs))
