"""What the estimators of `dpreg.sklearn` have in common: all but the targets."""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from dpreg.config import Config
from dpreg.data.schema import Number, Schema
from dpreg.data.sources import ArraySource, PermutedSource, RegressionData, first_outside
from dpreg.distributed import devices
from dpreg.errors import InputError
from dpreg.estimators.fitted import Fitted, moments, moments_of, varying
from dpreg.models.linear import linear_parameters
from dpreg.solvers import robust
from dpreg.solvers.glm import FAMILIES
from dpreg.solvers.optimality import is_near_optimum
from dpreg.solvers.solver import Solver
from dpreg.step.checks import mode_arguments
from dpreg.step.state import Model
from dpreg.tables.columns import LARGEST
from dpreg.tables.statistics import SMALLEST
from dpreg.tracing import make_key
from dpreg.train.build import build_trainer
from dpreg.train.trainer import Trainer

_MOST_EXACT = 1024  # parameters up to which "auto" is exact: its time grows with their square, or third power
_LOCATED = ("squared", "huber", "absolute", "quantile")  # losses of which a scaled target is a target, too
_OF_LOGARITHMS = ("poisson", "gamma")  # losses of which a linear model adds up logarithms
SOLVERS = ("auto", "exact", "sgd")
STANDARDIZE = True
DEFAULTS = Config(optimizer="adam", lr_schedule="linear", max_epochs=100)  # of all other arguments


class Estimator(BaseEstimator):
    """What the regressor and the classifier have in common: all but the targets."""

    def __init__(
        self,
        *,
        model: str | Model = DEFAULTS.model,
        hidden: Sequence[int] = DEFAULTS.hidden,
        solver: str = SOLVERS[0],
        optimizer: str = DEFAULTS.optimizer,
        lr: float = DEFAULTS.lr,
        lr_schedule: str = DEFAULTS.lr_schedule,
        l1: float = DEFAULTS.l1,
        l2: float = 1e-4,
        batch_size: int = DEFAULTS.batch_size,
        max_epochs: int = DEFAULTS.max_epochs,
        standardize: bool = STANDARDIZE,
        num_devices: int | None = None,
        num_shards: int = DEFAULTS.num_shards,
        reduction: str = DEFAULTS.reduction,
        random_state: Any = DEFAULTS.seed,
    ):
        self.model, self.hidden, self.solver = model, hidden, solver
        self.optimizer, self.lr, self.lr_schedule, self.l1, self.l2 = optimizer, lr, lr_schedule, l1, l2
        self.batch_size, self.max_epochs, self.standardize = batch_size, max_epochs, standardize
        self.num_devices, self.num_shards, self.reduction = num_devices, num_shards, reduction
        self.random_state = random_state

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_fitted")

    def _config(self, **of_loss: Any) -> Config:
        """The run that the arguments describe."""
        if self.solver not in SOLVERS:
            raise InputError(f"solver={self.solver!r}: use {', '.join(SOLVERS[:-1])} or {SOLVERS[-1]}")
        return Config(
            model=self.model if isinstance(self.model, str) else "linear",
            hidden=self.hidden,  # type: ignore[arg-type]  # any sequence
            optimizer=self.optimizer,
            lr=self.lr,
            lr_schedule=self.lr_schedule,
            l1=self.l1,
            l2=self.l2,
            batch_size=self.batch_size,
            max_epochs=self.max_epochs,
            num_devices=self.num_devices,
            num_shards=self.num_shards,
            reduction=self.reduction,
            seed=int(check_random_state(self.random_state).randint(2**31 - 1)),
            **of_loss,
        )

    def _train(
        self, config: Config, x: np.ndarray, y: np.ndarray, weight: np.ndarray, one_column: bool, further: bool
    ) -> None:
        """Trains on rows [n, d], [n, t], [n] float64: from the beginning, or further.

        Raises:
          InputError: for what cannot be trained so.
        """
        module = None if isinstance(self.model, str) else self.model
        before: Fitted | None = getattr(self, "_fitted", None) if further else None
        same = y.shape[1], config.model, config.loss, module
        if before and (before.targets, before.config.model, before.config.loss, before.module) != same:
            raise InputError("partial_fit: it goes on with the targets, model and loss that it began with; call fit")
        if before:  # in another order each time
            config = dataclasses.replace(config, seed=(before.config.seed + 1) % 2**31)
        fitted = Fitted(config, module, y.shape[1], one_column, Schema((), ()))
        if wrong := first_outside(ArraySource(np.zeros(len(y)), y, weight, np.float64), fitted.objective.allowed):
            raise fitted.objective.refusal(*wrong)
        used = np.flatnonzero(weight > 0)
        x, y, weight = x[used], y[used], weight[used]
        _require_squares(x, y, weight, used)
        exact, squared = self._is_exact(fitted), config.loss == "squared"
        if further and exact and not squared:
            if self.solver == "exact":
                raise InputError("solver='exact': its partial_fit is for loss='squared'; use solver='auto' or 'sgd'")
            exact = False
        if exact and squared and not (before and not before.triangle):
            self._solve_least_squares(fitted, x, y, weight, before)
        elif exact and not further:
            self._solve_by_newton(fitted, x, y, weight)
        else:
            self._take_steps(fitted, x, y, weight, before, further)
        if not fitted.is_linear:
            for name in ("coef_", "intercept_"):  # of another model
                self.__dict__.pop(name, None)
        self._fitted = fitted

    def _is_exact(self, fitted: Fitted) -> bool:
        config = fitted.config
        can = fitted.is_linear and not config.l1 and config.loss in (*_LOCATED, "softmax", *FAMILIES)
        if self.solver == "exact" and not can:
            raise InputError("solver='exact': it is for model='linear', no l1, and no loss='gamma'; use solver='auto'")
        size = (1 + self.n_features_in_) * fitted.outputs
        return can and (self.solver == "exact" or (self.solver == "auto" and size <= _MOST_EXACT))

    def _solve_least_squares(
        self, fitted: Fitted, x: np.ndarray, y: np.ndarray, weight: np.ndarray, before: Fitted | None
    ) -> None:
        """Exactly, of these rows and those before."""
        triangle = self._solver(fitted, x, y, weight).triangle()
        if before and before.triangle:
            triangle = before.triangle + triangle
        fitted.triangle, fitted.schema = triangle, self._schema(fitted, *moments_of(triangle))
        # About the means in any case: a penalty on w is the same there, and large ones cost no digits.
        mean, (_, scale) = triangle.means, fitted.schema.units
        self.n_iter_ = 1
        fit = triangle.standardized(mean, scale).solve(fitted.config.l2)
        self._keep_linear(fitted, *fit.shortest(), mean)

    def _solve_by_newton(self, fitted: Fitted, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> None:
        """Exactly, of these rows."""
        loss, l2 = fitted.config.loss, fitted.config.l2
        triangle = self._solver(fitted, x, y, weight).triangle()
        fitted.schema = self._schema(fitted, *moments_of(triangle))
        d, (mean, scale) = x.shape[1], fitted.schema.units
        mean = np.concatenate([triangle.means[:d], mean[d:]])  # about the means in any case, as least squares
        fit = triangle.standardized(mean, scale).solve()
        rows, self.n_iter_ = (x - mean[:d]) / scale[:d], 0
        kept, along = fit.inverse.kept, fit.inverse.root
        if not l2:  # nothing to find but along the columns kept: orthogonal, and of one length, alike to the steps
            rows = rows[:, kept] @ along
            length = np.sqrt(weight @ np.square(rows) / weight.sum())
            rows, along = rows / length, along / length
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for target in ((y - mean[d:]) / scale[d:]).T:
            solver = self._solver(fitted, rows, target[:, None], weight)
            if loss == "softmax":
                found.append(solver.softmax(fitted.outputs, l2))
            elif loss in _LOCATED:
                slopes = robust.slopes_of(loss, fitted.config.huber_delta, fitted.config.quantile)
                found.append(solver.robust(slopes, l2))
            else:
                of_target, _ = solver.newton(FAMILIES[loss], l2)
                found.append((of_target.w, of_target.b))
            self.n_iter_ = max(self.n_iter_, solver.passes)
        w, b = (np.concatenate(parts, axis=-1) for parts in zip(*found, strict=True))
        if not l2:
            of_kept, w = along @ w, np.zeros((d, w.shape[1]))
            w[kept] = of_kept
            w = fit.shared(w)
        self._keep_linear(fitted, w, b, mean)

    def _solver(self, fitted: Fitted, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> Solver:
        return Solver(ArraySource(x, y, weight, np.float64), fitted.mesh, fitted.config.num_shards)

    def _take_steps(
        self,
        fitted: Fitted,
        x: np.ndarray,
        y: np.ndarray,
        weight: np.ndarray,
        before: Fitted | None,
        further: bool,
    ) -> None:
        """By the optimizer: `max_epochs`, or further one epoch."""
        config = fitted.config
        fitted.schema = varying(before.schema, x) if before else self._schema(fitted, *moments(np.c_[x, y], weight))
        if further:
            steady = config.lr_schedule in ("linear", "cosine")
            config = dataclasses.replace(config, max_epochs=1, lr_schedule="constant" if steady else config.lr_schedule)
        mean, scale = (part[x.shape[1] :] for part in fitted.schema.units)
        # The weights between 0 and 2, as float32 may not hold them; what is learned does not depend on their unit.
        weight = weight / np.exp2(np.floor(np.log2(weight.max())))
        rows = ArraySource(fitted.scaled(x), (y - mean) / scale, weight)
        trainer = build_trainer(config)
        # In a fixed order: contiguous shards of sorted rows would be no samples.
        trainer.prepare_data(RegressionData(PermutedSource(rows), None, config.batch_size, fitted.schema))
        model = fitted.model(config, trainer.train.num_steps)
        if fitted.module is not None:
            _require_outputs(model, rows.x, fitted.outputs)
        trainer.prepare_model(model)
        if before:
            self._go_on(trainer, before)
        elif fitted.is_linear and config.loss in _OF_LOGARITHMS:
            # From the mean: the steps of an optimizer are too short to get there from 1.
            typical = np.maximum(weight @ y / weight.sum(), np.finfo(np.float32).tiny)
            trainer.set_linear_params(np.zeros((x.shape[1], fitted.targets)), np.log(typical), np.nan)
        trainer.fit_epochs()
        optimizer = trainer.state.opt_state
        fitted.variables, fitted.optimizer = jax.tree.map(np.asarray, (trainer.variables, optimizer))
        self.n_iter_ = config.max_epochs
        if fitted.is_linear and (linear := linear_parameters(fitted.variables["params"])):
            self._keep_linear(fitted, *linear)
            of_rows = rows.x, rows.y, rows.weight
            if not (further or is_near_optimum(fitted.objective, of_rows, linear, config.l1, config.l2)):
                warnings.warn(
                    f"loss={config.loss!r}: max_epochs={config.max_epochs} ended far from the optimum; use more, "
                    "another lr, or solver='auto'",
                    ConvergenceWarning,
                    stacklevel=4,
                )

    def _go_on(self, trainer: Trainer, before: Fitted) -> None:
        """From the parameters, and the optimizer's state where there is one."""
        if before.is_linear:
            w, b = np.atleast_2d(self.coef_).T, np.ravel(self.intercept_)
            mean, scale = before.schema.units
            d = len(w)
            trainer.set_linear_params(
                w * scale[:d, None] / scale[d:], (b + mean[:d] @ w - mean[d:]) / scale[d:], np.nan
            )
        else:
            trainer.state = trainer.state.replace(**devices.replicated(before.variables, trainer.mesh))
        same = jax.tree.structure(before.optimizer) == jax.tree.structure(trainer.state.opt_state)  # type: ignore[operator]
        if same:
            trainer.state = trainer.state.replace(opt_state=devices.replicated(before.optimizer, trainer.mesh))

    def _schema(self, fitted: Fitted, mean: np.ndarray, deviation: np.ndarray) -> Schema:
        d, constant = self.n_features_in_, deviation == 0
        names = [*map(str, getattr(self, "feature_names_in_", ()))]
        if len(set(names)) < d:
            names = [f"x{j}" for j in range(d)]
        if (lost := (deviation > 0) & (deviation < SMALLEST)).any():
            column = [*names, *(f"y{k}" for k in range(len(mean) - d))][lost.argmax()]
            raise InputError(
                f"column {column!r} varies by less than {SMALLEST:g}, or its weights are as small; scale it"
            )
        scaled = np.full(len(mean), self.standardize)
        scaled[d:] &= fitted.config.loss in _LOCATED
        mean = np.where(scaled | (constant & (np.arange(len(mean)) < d)), mean, 0.0)
        units = list(zip(mean.tolist(), np.where(scaled & ~constant, deviation, 1.0).tolist(), strict=True))
        return Schema(
            tuple(
                Number(name, *unit, constant=bool(of_one_value))
                for name, unit, of_one_value in zip(names, units[:d], constant[:d], strict=True)
            ),
            tuple(Number(f"y{k}", *unit) for k, unit in enumerate(units[d:])),
        )

    def _keep_linear(self, fitted: Fitted, w: np.ndarray, b: np.ndarray, mean: np.ndarray | None = None) -> None:
        """Gives w [d, p] and b [p] in the units of the rows.

        Args:
          mean: [d + t] what the model has seen columns less of; by default that of `fitted.schema`.
        """
        d, (of_schema, scale) = len(w), fitted.schema.units
        mean = of_schema if mean is None else mean
        w, at_mean = fitted.schema.parameters(w, b)[0], b * scale[d:] + mean[d:]
        b = at_mean - mean[:d] @ w
        if not (np.isfinite(w).all() and np.isfinite(b).all()):
            raise InputError("the coefficients are not finite in float64; scale X, y or the weights closer to 1")
        fitted.around = mean[:d], at_mean, w, b
        self.coef_: np.ndarray = w[:, 0] if fitted.one_column else np.ascontiguousarray(w.T)
        self.intercept_: float | np.ndarray = float(b[0]) if fitted.one_column else b

    def _margins(self, x: ArrayLike) -> np.ndarray:
        """What the model adds up for rows, before any link: [n, p] float64, of a located loss in the units of y."""
        check_is_fitted(self)
        fitted, rows = self._fitted, validate_data(self, x, reset=False, dtype=np.float64, order="C")
        if fitted.is_linear:
            w, b = np.atleast_2d(self.coef_).T, np.atleast_1d(self.intercept_)
            mean, at_mean, *kept = fitted.around
            # Around the mean, where an intercept far from 0 costs no digits; unless the user has changed them.
            as_fitted = all(map(np.array_equal, kept, (w, b)))
            margins: np.ndarray = (rows - mean) @ w + at_mean if as_fitted else rows @ w + b
            return margins
        return fitted.predictor.predict(rows)


def _require_outputs(model: Any, x: np.ndarray, outputs: int) -> None:
    def prediction(row: jax.Array) -> jax.Array:
        predicted: jax.Array = model.init_with_output(make_key(0), row, **mode_arguments(model, False))[0]
        return predicted

    shape = jax.eval_shape(prediction, jnp.asarray(x[:1])).shape
    if shape != (1, outputs):
        raise InputError(f"model: it predicts {list(shape)} for one row; give one that predicts [1, {outputs}]")


def _require_squares(x: np.ndarray, y: np.ndarray, weight: np.ndarray, row: np.ndarray) -> None:
    """Raises InputError for a value of rows [n, d], [n, t], [n] whose weighted square is not finite in float64.

    Args:
      row: [n] their numbers, from 0.
    """
    most = LARGEST / max(1.0, float(np.sqrt(weight.max())))
    for name, values in (("X", x), ("y", y)):
        if len(large := np.argwhere(np.abs(values) > most)):
            at, column = large[0]
            raise InputError(
                f"{name}: column {column + 1} has {values[at, column]:g} in row {row[at] + 1:,}; "
                f"scale it to {most:g} at most" + (", or use smaller weights" if most < LARGEST else "")
            )


def weights_of(sample_weight: ArrayLike | None, x: np.ndarray) -> np.ndarray:
    """The weights of rows, [n] float64; 1 where there are none.

    Raises:
      InputError: for a negative one, and where all are 0.
    """
    weight: np.ndarray = _check_sample_weight(sample_weight, x, dtype=np.float64)
    if (weight < 0).any():
        raise InputError(f"sample_weight: it is negative in row {(weight < 0).argmax() + 1:,}; use 0 or more")
    if not weight.any():
        raise InputError("sample_weight: it is zero in every row; give one row at least a weight")
    return weight
