"""The base class of the estimators of `dpreg.sklearn`, which add the checks of their targets."""

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
from sklearn.utils.validation import check_is_fitted, validate_data

from dpreg.config import Config
from dpreg.config.model import GLM_LOSSES, L1_LOSSES, LOCATED_LOSSES, LOG_LINK_LOSSES
from dpreg.data.schema import Number, Schema
from dpreg.data.sources import ArraySource, PermutedSource, RegressionData, first_outside
from dpreg.distributed import devices
from dpreg.errors import InputError
from dpreg.estimators.fitted import Fitted, compute_moments, moments_from_r, update_constants
from dpreg.estimators.rows import Folds, require_errors, require_squares
from dpreg.models.linear import linear_parameters
from dpreg.solvers import elastic_net
from dpreg.solvers.inference import Summary, summarize_fit
from dpreg.solvers.optimality import is_near_optimum
from dpreg.solvers.solver import Solver, widest_exact
from dpreg.step.checks import mode_arguments
from dpreg.step.state import Model
from dpreg.tables.statistics import SMALLEST
from dpreg.tracing import make_key
from dpreg.train.build import build_trainer
from dpreg.train.trainer import Trainer

SOLVERS = ("auto", "exact", "sgd")
STANDARDIZE = True
DEFAULTS = Config(optimizer="adam", lr_schedule="linear", max_epochs=100)  # the defaults of the other arguments


class Estimator(BaseEstimator):
    """The base class of the regressor and the classifier."""

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
        covariance: str | None = DEFAULTS.covariance,
        random_state: Any = DEFAULTS.seed,
    ):
        self.model, self.hidden, self.solver = model, hidden, solver
        self.optimizer, self.lr, self.lr_schedule, self.l1, self.l2 = optimizer, lr, lr_schedule, l1, l2
        self.batch_size, self.max_epochs, self.standardize = batch_size, max_epochs, standardize
        self.num_devices, self.num_shards, self.reduction = num_devices, num_shards, reduction
        self.covariance, self.random_state = covariance, random_state

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_fitted")

    def _config(self, **loss_settings: Any) -> Config:
        """The settings of a run with the arguments of the estimator."""
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
            # Of groups, which a solver has, not a config, "cluster" is the default.
            covariance=None if self.covariance == "cluster" else self.covariance,
            solver=self._solver_of_l1(loss_settings["loss"]),
            seed=int(check_random_state(self.random_state).randint(2**31 - 1)),
            **loss_settings,
        )

    def _solver_of_l1(self, loss: str) -> str:
        """The solver of the config: "exact" for an l1 penalty that needs no optimizer, so that any may be given."""
        exact = self.l1 and self.solver != "sgd" and self.model in ("linear", "concise") and loss in L1_LOSSES
        return "exact" if exact else "auto"

    def _train(
        self,
        config: Config,
        x: np.ndarray,
        y: np.ndarray,
        weight: np.ndarray,
        one_column: bool,
        partial: bool,
        folds: Folds | None = None,
        groups: np.ndarray | None = None,
    ) -> None:
        """Trains on rows x [n, d], y [n, t], weight [n] in float64.

        Args:
          config: the settings of the run.
          x, y, weight: the rows.
          one_column: whether y was an array with a single axis.
          partial: whether to continue from the previous call, as `partial_fit` does.
          folds: of the rows, to choose the penalty of squared loss by.
          groups: [n] the numbers of the groups of rows within which errors are correlated, from 0; or None.

        Raises:
          InputError: for rows and settings that cannot be combined.
        """
        module = None if isinstance(self.model, str) else self.model
        previous: Fitted | None = getattr(self, "_fitted", None) if partial else None
        same = y.shape[1], config.model, config.loss, module
        if previous and (previous.targets, previous.config.model, previous.config.loss, previous.module) != same:
            raise InputError("partial_fit: the targets, the model or the loss differ from the first call; call fit")
        if previous:  # another order of the rows in each call
            config = dataclasses.replace(config, seed=(previous.config.seed + 1) % 2**31)
        fitted = Fitted(config, module, y.shape[1], one_column, Schema((), ()))
        if wrong := first_outside(ArraySource(np.zeros(len(y)), y, weight, np.float64), fitted.objective.allowed):
            raise fitted.objective.refusal(*wrong)
        used = np.flatnonzero(weight > 0)
        if folds:  # rows of one fold follow each other
            folds = folds._replace(numbers=folds.numbers[used])
            used = used[folds.order]
        x, y, weight, groups = x[used], y[used], weight[used], None if groups is None else groups[used]
        require_squares(x, y, weight, used)
        exact, squared = bool(folds) or self._is_exact(fitted), config.loss == "squared"
        if partial and exact and not squared:
            if self.solver == "exact":
                remedy = "use solver='auto' or 'sgd'"
                raise InputError(f"solver='exact': its partial_fit applies only to loss='squared'; {remedy}")
            exact = False
        if config.covariance or groups is not None:
            require_errors(config, exact and not partial, y.shape[1], groups)
        if exact and squared and not (previous and not previous.r_factor):
            self._solve_least_squares(fitted, x, y, weight, previous, folds, groups)
        elif exact and not partial:
            self._solve_by_newton(fitted, x, y, weight, groups)
        else:
            self._train_by_optimizer(fitted, x, y, weight, previous, partial)
        if not fitted.is_linear:
            for name in ("coef_", "intercept_"):  # left from a linear model of an earlier call
                self.__dict__.pop(name, None)
        if not folds:
            for name in ("alpha_", "alphas_", "mse_path_"):  # left from a choice of an earlier call
                self.__dict__.pop(name, None)
        self._fitted = fitted

    def _is_exact(self, fitted: Fitted) -> bool:
        """Whether to use an exact solver.

        Raises:
          InputError: if it is requested, and there is none for the model, the loss or the penalty.
        """
        config = fitted.config
        losses = L1_LOSSES if config.l1 else (*LOCATED_LOSSES, "softmax", *GLM_LOSSES)
        solvable = fitted.is_linear and config.loss in losses
        if self.solver == "exact" and not solvable:
            penalty = f", with l1 and loss={config.loss!r} to none" if config.l1 else ""
            raise InputError(f"solver='exact': it applies only to model='linear'{penalty}; use solver='auto'")
        size = (1 + self.n_features_in_) * fitted.outputs
        return solvable and (self.solver == "exact" or (self.solver == "auto" and size <= widest_exact(config)))

    def _solve_least_squares(
        self,
        fitted: Fitted,
        x: np.ndarray,
        y: np.ndarray,
        weight: np.ndarray,
        previous: Fitted | None,
        folds: Folds | None = None,
        groups: np.ndarray | None = None,
    ) -> None:
        """Solves least squares exactly, for these rows, in the order of their folds, and those of previous calls."""
        solver, penalties = self._make_solver(fitted, x, y, weight), (fitted.config.l1, fitted.config.l2)
        triangle, *of_folds = solver.fold_triangles(folds.starts) if folds else [solver.triangle()]
        if previous and previous.r_factor:
            triangle = previous.r_factor + triangle
        fitted.r_factor, fitted.schema = triangle, self._make_schema(fitted, *moments_from_r(triangle))
        # Always centre the columns, which loses no digits to large means and does not change a penalty on w.
        mean, (_, scale) = triangle.means, fitted.schema.units
        self.n_iter_ = 1
        triangle, *of_folds = (each.standardized(mean, scale) for each in (triangle, *of_folds))
        if folds:
            path = elastic_net.cross_validate(triangle, of_folds, folds.l1_ratio)
            self.alphas_, self.alpha_ = path.strengths, float(path.strengths[path.best])
            self.mse_path_ = 2 * np.square(scale[-1]) * path.fold_losses.T
            penalties = path.penalties(path.best)
        fits = elastic_net.solve_targets(triangle, *penalties)
        if fitted.config.covariance or groups is not None:
            d = x.shape[1]
            rows = (x - mean[:d]) / scale[:d], (y - mean[d:]) / scale[d:], weight
            fits = [self._make_solver(fitted, *rows, groups).with_covariance(fits[0], fitted.config)]
        w, b = (np.concatenate(values, axis=-1) for values in zip(*(fit.shortest() for fit in fits), strict=True))
        self._set_coefficients(fitted, w, b, mean)
        fitted.fit = (fits[0], mean) if len(fits) == 1 else None
        fitted.weighted = bool((weight != 1).any()) or bool(previous and previous.weighted)

    def _solve_by_newton(
        self, fitted: Fitted, x: np.ndarray, y: np.ndarray, weight: np.ndarray, groups: np.ndarray | None
    ) -> None:
        """Finds the exact solution for these rows by Newton's method."""
        triangle = self._make_solver(fitted, x, y, weight).triangle()
        fitted.schema = self._make_schema(fitted, *moments_from_r(triangle))
        d, (mean, scale) = x.shape[1], fitted.schema.units
        mean = np.concatenate([triangle.means[:d], mean[d:]])  # always centre the features, as for least squares
        solver = self._make_solver(fitted, (x - mean[:d]) / scale[:d], (y - mean[d:]) / scale[d:], weight, groups)
        solution = solver.solve(fitted.config)
        self.n_iter_ = 1 + solver.passes
        w, b = solution.fit.shortest() if solution.fit else (solution.w, solution.b)
        self._set_coefficients(fitted, w, b, mean)
        fitted.fit = (solution.fit, mean) if solution.fit else None
        fitted.weighted = bool((weight != 1).any())

    def _make_solver(
        self, fitted: Fitted, x: np.ndarray, y: np.ndarray, weight: np.ndarray, groups: np.ndarray | None = None
    ) -> Solver:
        source = ArraySource(x, y, weight, np.float64)
        return Solver(source, fitted.mesh, fitted.config.num_shards, groups=groups)

    def _train_by_optimizer(
        self,
        fitted: Fitted,
        x: np.ndarray,
        y: np.ndarray,
        weight: np.ndarray,
        previous: Fitted | None,
        partial: bool,
    ) -> None:
        """Trains with the optimizer for `max_epochs`, or for one epoch if `partial`."""
        config = dataclasses.replace(fitted.config, solver="sgd")
        if previous:
            fitted.schema = update_constants(previous.schema, x)
        else:
            fitted.schema = self._make_schema(fitted, *compute_moments(np.c_[x, y], weight))
        if partial:
            ends = config.lr_schedule in ("linear", "cosine")  # the schedule ends with the run, which has no end here
            config = dataclasses.replace(config, max_epochs=1, lr_schedule="constant" if ends else config.lr_schedule)
        mean, scale = (values[x.shape[1] :] for values in fitted.schema.units)
        # Scale the weights by a power of two to at most 2, in the range of float32; the result does not change.
        weight = weight / np.exp2(np.floor(np.log2(weight.max())))
        rows = ArraySource(fitted.scale(x), (y - mean) / scale, weight)
        trainer = build_trainer(config)
        # Permute the rows: with sorted ones, a batch, which has rows of each contiguous shard, would not be random.
        trainer.prepare_data(RegressionData(PermutedSource(rows), None, config.batch_size, fitted.schema))
        model = fitted.model(config, trainer.train.num_steps)
        if fitted.module is not None:
            _require_outputs(model, rows.x, fitted.outputs)
        trainer.prepare_model(model)
        if previous:
            self._continue_from(previous, trainer)
        elif fitted.is_linear and config.loss in LOG_LINK_LOSSES:
            # Start at the mean target: an optimizer needs many steps to get there from exp(0) = 1.
            mean_target = np.maximum(weight @ y / weight.sum(), np.finfo(np.float32).tiny)
            trainer.set_linear_params(np.zeros((x.shape[1], fitted.targets)), np.log(mean_target), np.nan)
        trainer.fit_epochs()
        optimizer = trainer.state.opt_state
        fitted.variables, fitted.optimizer = jax.tree.map(np.asarray, (trainer.variables, optimizer))
        self.n_iter_ = config.max_epochs
        if fitted.is_linear and (linear := linear_parameters(fitted.variables["params"])):
            self._set_coefficients(fitted, *linear)
            columns = rows.x, rows.y, rows.weight
            if not (partial or is_near_optimum(fitted.objective, columns, linear, config.l1, config.l2)):
                warnings.warn(
                    f"loss={config.loss!r}: max_epochs={config.max_epochs} ended far from the optimum; use more "
                    "epochs, another lr, or solver='auto'",
                    ConvergenceWarning,
                    stacklevel=4,
                )

    def _continue_from(self, previous: Fitted, trainer: Trainer) -> None:
        """Sets the trainer's parameters to those of the previous call, and its optimizer state if it fits."""
        if previous.is_linear:
            w, b = np.atleast_2d(self.coef_).T, np.ravel(self.intercept_)
            mean, scale = previous.schema.units
            d = len(w)
            trainer.set_linear_params(
                w * scale[:d, None] / scale[d:], (b + mean[:d] @ w - mean[d:]) / scale[d:], np.nan
            )
        else:
            trainer.state = trainer.state.replace(**devices.replicated(previous.variables, trainer.mesh))
        structure = jax.tree.structure(trainer.state.opt_state)
        if jax.tree.structure(previous.optimizer) == structure:  # type: ignore[operator]
            trainer.state = trainer.state.replace(opt_state=devices.replicated(previous.optimizer, trainer.mesh))

    def _make_schema(self, fitted: Fitted, mean: np.ndarray, deviation: np.ndarray) -> Schema:
        """The units of the columns of X and y, from their means and deviations [d + t].

        Raises:
          InputError: for a column whose deviation is too small to divide by.
        """
        d, constant = self.n_features_in_, deviation == 0
        names = [*map(str, getattr(self, "feature_names_in_", ()))]
        if len(set(names)) < d:
            names = [f"x{j}" for j in range(d)]
        if (too_small := (deviation > 0) & (deviation < SMALLEST)).any():
            column = [*names, *(f"y{k}" for k in range(len(mean) - d))][too_small.argmax()]
            raise InputError(
                f"column {column!r} varies by less than {SMALLEST:g}, or its weights are as small; scale it"
            )
        scaled = np.full(len(mean), self.standardize)
        scaled[d:] &= fitted.config.loss in LOCATED_LOSSES
        mean = np.where(scaled | (constant & (np.arange(len(mean)) < d)), mean, 0.0)
        units = list(zip(mean.tolist(), np.where(scaled & ~constant, deviation, 1.0).tolist(), strict=True))
        return Schema(
            tuple(
                Number(name, *unit, constant=bool(is_constant))
                for name, unit, is_constant in zip(names, units[:d], constant[:d], strict=True)
            ),
            tuple(Number(f"y{k}", *unit) for k, unit in enumerate(units[d:])),
        )

    def _set_coefficients(self, fitted: Fitted, w: np.ndarray, b: np.ndarray, mean: np.ndarray | None = None) -> None:
        """Sets `coef_` and `intercept_`: w [d, p] and b [p] in the units of X and y.

        Args:
          fitted: the schema with the units of w and b.
          w, b: the parameters for centred and scaled columns.
          mean: [d + t], the values by which the columns were centred; by default the means of the schema.
        """
        d, (schema_mean, scale) = len(w), fitted.schema.units
        mean = schema_mean if mean is None else mean
        w, at_mean = fitted.schema.parameters(w, b)[0], b * scale[d:] + mean[d:]
        b = at_mean - mean[:d] @ w
        if not (np.isfinite(w).all() and np.isfinite(b).all()):
            raise InputError("the coefficients are not finite in float64; scale X, y or the weights closer to 1")
        fitted.centred = mean[:d], at_mean, w, b
        self.coef_: np.ndarray = w[:, 0] if fitted.one_column else np.ascontiguousarray(w.T)
        self.intercept_: float | np.ndarray = float(b[0]) if fitted.one_column else b

    @property
    def summary_(self) -> Summary | tuple[Summary, ...]:
        """The coefficients with their errors, tests and intervals, and how well they fit; a tuple for several targets.

        Raises:
          AttributeError: unless the fit was exact, of squared, logistic, Poisson or gamma loss.
        """
        fitted: Fitted | None = getattr(self, "_fitted", None)
        if fitted is None or fitted.fit is None:
            raise AttributeError("summary_: it is of exact least squares, logistic, Poisson and gamma regression")
        (fit, mean), (names, targets) = fitted.fit, (fitted.schema.features, fitted.schema.targets)
        with np.errstate(over="ignore", invalid="ignore"):
            fit = fit.in_units(mean, fitted.schema.units[1])
            found = tuple(
                summarize_fit(
                    fit, names, t, target.name, weights=fitted.config.kind_of_weights if fitted.weighted else None
                )
                for t, target in enumerate(targets)
            )
        return found[0] if len(found) == 1 else found

    def _margins(self, x: ArrayLike) -> np.ndarray:
        """The linear predictors, or the outputs of a network, before the inverse link: [n, p] float64.

        They are in the units of y for losses without a link.
        """
        check_is_fitted(self)
        fitted, rows = self._fitted, validate_data(self, x, reset=False, dtype=np.float64, order="C")
        if fitted.is_linear:
            w, b = np.atleast_2d(self.coef_).T, np.atleast_1d(self.intercept_)
            mean, at_mean, *fitted_w_b = fitted.centred
            # Use the centred form, which loses no digits to a large intercept, unless the user has changed w or b.
            unchanged = all(map(np.array_equal, fitted_w_b, (w, b)))
            margins: np.ndarray = (rows - mean) @ w + at_mean if unchanged else rows @ w + b
            return margins
        return fitted.predictor.predict(rows)


def _require_outputs(model: Any, x: np.ndarray, outputs: int) -> None:
    """Raises InputError unless the model predicts [1, outputs] for one row."""

    def predict(row: jax.Array) -> jax.Array:
        prediction: jax.Array = model.init_with_output(make_key(0), row, **mode_arguments(model, False))[0]
        return prediction

    shape = jax.eval_shape(predict, jnp.asarray(x[:1])).shape
    if shape != (1, outputs):
        raise InputError(f"model: it predicts {list(shape)} for one row; give one that predicts [1, {outputs}]")
