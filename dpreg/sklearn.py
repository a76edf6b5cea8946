"""dpreg's models as estimators of scikit-learn, which has to be there: `pip install 'dpreg[sklearn]'`."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from dpreg.build import build_model, build_trainer, objective_and_optimizer
from dpreg.config import Config
from dpreg.data.schema import Number, Schema
from dpreg.data.sources import ArraySource, RegressionData, Shuffled, first_outside
from dpreg.errors import InputError
from dpreg.models.glm import FAMILIES
from dpreg.models.least_squares import Triangle
from dpreg.models.linear import linear_parameters
from dpreg.models.losses import Loss
from dpreg.models.module import Module
from dpreg.parallel import devices
from dpreg.parallel.step import Model, train_argument
from dpreg.predictor import Predictor
from dpreg.solver import Solver
from dpreg.trainer import Trainer

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin
    from sklearn.utils import check_random_state, column_or_1d
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
except ImportError as missing:
    raise ImportError("dpreg.sklearn: needs scikit-learn 1.6 or newer; pip install 'dpreg[sklearn]'") from missing

__all__ = ["DataParallelClassifier", "DataParallelRegressor"]

_MOST_EXACT = 1024  # parameters up to which "auto" is exact: its time grows with their square, or third power
_LOCATED = ("squared", "huber", "absolute", "quantile")  # losses of which a scaled target is a target, too
_EPSILON = float(np.finfo(np.float64).eps)


@dataclasses.dataclass
class _Fitted:
    """What is kept of training, all in plain values and NumPy arrays.

    Attributes:
      config: of the run.
      module: the user's own, if any.
      targets: columns of y; one_column: whether y was an array with a single axis.
      schema: the units, by which the model sees the rows.
      triangle: of all rows so far, where least squares are solved exactly.
      variables, optimizer: of the trained model, where steps were taken.
    """

    config: Config
    module: Model | None
    targets: int
    one_column: bool
    schema: Schema
    triangle: Triangle | None = None
    variables: Any = None
    optimizer: Any = None

    @property
    def is_linear(self) -> bool:
        return self.module is None and self.config.model in ("linear", "concise")

    @property
    def objective(self) -> Loss:
        loss: Loss = objective_and_optimizer(self.config)["objective"]
        return loss

    @property
    def outputs(self) -> int:
        """Columns that the model predicts."""
        return self.objective.outputs(self.targets)

    @property
    def mesh(self) -> Mesh:
        return devices.data_mesh(self.config.num_shards, self.config.platform, self.config.num_devices)

    def scaled(self, x: np.ndarray) -> np.ndarray:
        """Rows [n, d] as the model sees them."""
        mean, scale = (part[: x.shape[1]] for part in self.schema.units)
        scaled: np.ndarray = (x - mean) / scale
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


class _Estimator(BaseEstimator):
    """What the regressor and the classifier have in common: all but the targets."""

    def __init__(
        self,
        *,
        model: str | Model = "linear",
        hidden: Sequence[int] = (64, 64),
        solver: str = "auto",
        optimizer: str = "adam",
        lr: float = 0.03,
        lr_schedule: str = "linear",
        l1: float = 0.0,
        l2: float = 1e-4,
        batch_size: int = 32,
        max_epochs: int = 100,
        standardize: bool = True,
        num_devices: int | None = None,
        num_shards: int = 8,
        reduction: str = "pmean",
        random_state: Any = 0,
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
        if self.solver not in ("auto", "exact", "sgd"):
            raise InputError(f"solver={self.solver!r}: use auto, exact or sgd")
        return Config(
            model=self.model if isinstance(self.model, str) else "linear",
            hidden=tuple(self.hidden),
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
        before: _Fitted | None = getattr(self, "_fitted", None) if further else None
        same = y.shape[1], config.model, config.loss, module
        if before and (before.targets, before.config.model, before.config.loss, before.module) != same:
            raise InputError("partial_fit: it goes on with the targets, model and loss that it began with; call fit")
        if before:  # in another order each time
            config = dataclasses.replace(config, seed=(before.config.seed + 1) % 2**31)
        fitted = _Fitted(config, module, y.shape[1], one_column, Schema((), ()))
        if wrong := first_outside(ArraySource(np.zeros(len(y)), y, dtype=np.float64), fitted.objective.allowed):
            target = ", ".join(f"{value:g}" for value in wrong[1])
            domain = fitted.objective.domain
            raise InputError(
                f"loss={config.loss!r}: the target in row {wrong[0]:,} is {target} and has to be {domain}; "
                "mend it, or use another loss"
            )
        used = weight > 0
        if not used.any():
            raise InputError("sample_weight: it is zero in every row; give one row at least a weight")
        x, y, weight = x[used], y[used], weight[used]
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

    def _is_exact(self, fitted: _Fitted) -> bool:
        config = fitted.config
        can = fitted.is_linear and not config.l1 and config.loss in ("squared", "softmax", *FAMILIES)
        if self.solver == "exact" and not can:
            raise InputError(
                "solver='exact': it is for model='linear', no l1, and loss='squared', 'poisson', or classes; use "
                "solver='auto'"
            )
        size = (1 + self.n_features_in_) * fitted.outputs
        return can and (self.solver == "exact" or (self.solver == "auto" and size <= _MOST_EXACT))

    def _solve_least_squares(
        self, fitted: _Fitted, x: np.ndarray, y: np.ndarray, weight: np.ndarray, before: _Fitted | None
    ) -> None:
        """Exactly, of these rows and those before."""
        triangle = self._solver(fitted, x, y, weight).triangle()
        if before and before.triangle:
            triangle = before.triangle + triangle
        fitted.triangle, fitted.schema = triangle, self._schema(fitted, *_moments_of(triangle))
        mean, scale = fitted.schema.units
        self.n_iter_ = 1
        self._keep_linear(fitted, *triangle.in_units(-mean / scale, 1 / scale).solve(fitted.config.l2).shortest())

    def _solve_by_newton(self, fitted: _Fitted, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> None:
        """Exactly, of these rows."""
        loss, l2 = fitted.config.loss, fitted.config.l2
        triangle = self._solver(fitted, x, y, weight).triangle()
        fitted.schema = self._schema(fitted, *_moments_of(triangle))
        mean, scale = fitted.schema.units
        # Without a penalty there is nothing to find but in the directions in which rows differ.
        along = np.eye(x.shape[1]) if l2 else triangle.in_units(-mean / scale, 1 / scale).solve().directions
        rows, self.n_iter_ = fitted.scaled(x) @ along, 0
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for target in y.T:
            solver = self._solver(fitted, rows, target[:, None], weight)
            if loss == "softmax":
                found.append(solver.softmax(fitted.outputs, l2))
            else:
                fit, _ = solver.newton(FAMILIES[loss], l2)
                found.append((fit.w, fit.b))
            self.n_iter_ = max(self.n_iter_, solver.passes)
        w, b = (np.concatenate(parts, axis=-1) for parts in zip(*found, strict=True))
        self._keep_linear(fitted, along @ w, b)

    def _solver(self, fitted: _Fitted, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> Solver:
        return Solver(ArraySource(x, y, weight, np.float64), fitted.mesh, fitted.config.num_shards)

    def _take_steps(
        self,
        fitted: _Fitted,
        x: np.ndarray,
        y: np.ndarray,
        weight: np.ndarray,
        before: _Fitted | None,
        further: bool,
    ) -> None:
        """By the optimizer: `max_epochs`, or further one epoch."""
        config = fitted.config
        fitted.schema = before.schema if before else self._schema(fitted, *_moments(np.c_[x, y], weight))
        if further:
            steady = config.lr_schedule in ("linear", "cosine")
            config = dataclasses.replace(config, max_epochs=1, lr_schedule="constant" if steady else config.lr_schedule)
        mean, scale = (part[x.shape[1] :] for part in fitted.schema.units)
        rows = ArraySource(fitted.scaled(x), (y - mean) / scale, weight)
        trainer = build_trainer(config)
        # In a fixed order: contiguous shards of sorted rows would be no samples.
        trainer.prepare_data(RegressionData(Shuffled(rows), None, config.batch_size, fitted.schema))
        model = fitted.model(config, trainer.train.num_steps)
        if fitted.module is not None:
            _require_outputs(model, rows.x, fitted.outputs)
        trainer.prepare_model(model)
        if before:
            self._go_on(trainer, before)
        while not trainer.done:
            trainer.fit_epoch()
        optimizer = trainer.state.opt_state
        fitted.variables, fitted.optimizer = jax.tree.map(np.asarray, (trainer.variables, optimizer))
        self.n_iter_ = config.max_epochs
        if fitted.is_linear and (linear := linear_parameters(fitted.variables["params"])):
            self._keep_linear(fitted, *linear)

    def _go_on(self, trainer: Trainer, before: _Fitted) -> None:
        """From the parameters, and the optimizer's state where there is one."""
        if before.is_linear:
            w, b = np.atleast_2d(self.coef_).T, np.ravel(self.intercept_)
            mean, scale = before.schema.units
            d = len(w)
            trainer.accept(w * scale[:d, None] / scale[d:], (b + mean[:d] @ w - mean[d:]) / scale[d:], np.nan)
        else:
            trainer.state = trainer.state.replace(**devices.replicated(before.variables, trainer.mesh))
        same = jax.tree.structure(before.optimizer) == jax.tree.structure(trainer.state.opt_state)  # type: ignore[operator]
        if same:
            trainer.state = trainer.state.replace(opt_state=devices.replicated(before.optimizer, trainer.mesh))

    def _schema(self, fitted: _Fitted, mean: np.ndarray, scale: np.ndarray) -> Schema:
        d = self.n_features_in_
        names = getattr(self, "feature_names_in_", [f"x{j}" for j in range(d)])
        units = [*zip(mean.tolist(), scale.tolist(), strict=True)]
        x = units[:d] if self.standardize else [(0.0, 1.0)] * d
        y = units[d:] if self.standardize and fitted.config.loss in _LOCATED else [(0.0, 1.0)] * fitted.targets
        return Schema(
            tuple(Number(str(name), *unit) for name, unit in zip(names, x, strict=True)),
            tuple(Number(f"y{k}", *unit) for k, unit in enumerate(y)),
        )

    def _keep_linear(self, fitted: _Fitted, w: np.ndarray, b: np.ndarray) -> None:
        """Gives w [d, p] and b [p] in the units of the rows."""
        w, b = fitted.schema.parameters(w, b)
        self.coef_: np.ndarray = w[:, 0] if fitted.one_column else np.ascontiguousarray(w.T)
        self.intercept_: float | np.ndarray = float(b[0]) if fitted.one_column else b

    def _margins(self, x: ArrayLike) -> np.ndarray:
        """What the model adds up for rows, before any link: [n, p] float64, of a located loss in the units of y."""
        check_is_fitted(self)
        fitted, rows = self._fitted, validate_data(self, x, reset=False, dtype=np.float64, order="C")
        if fitted.is_linear:
            margins: np.ndarray = rows @ np.atleast_2d(self.coef_).T + np.atleast_1d(self.intercept_)
            return margins
        source = ArraySource(fitted.scaled(rows), np.zeros((len(rows), fitted.targets)))
        return np.concatenate(list(fitted.predictor.predictions(fitted.predictor.pieces(source))))


def _require_outputs(model: Any, x: np.ndarray, outputs: int) -> None:
    def prediction(row: jax.Array) -> jax.Array:
        predicted: jax.Array = model.init_with_output(jax.random.key(0), row, **train_argument(model, False))[0]
        return predicted

    shape = jax.eval_shape(prediction, jnp.asarray(x[:1])).shape
    if shape != (1, outputs):
        raise InputError(f"model: it predicts {list(shape)} for one row; give one that predicts [1, {outputs}]")


def _moments(columns: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of columns [n, m] float64; 1 for the deviation of constants."""
    mean = weight @ columns / weight.sum()
    deviation = np.sqrt(weight @ np.square(columns - mean) / weight.sum())
    return mean, _scale(deviation, mean)


def _moments_of(triangle: Triangle) -> tuple[np.ndarray, np.ndarray]:
    """The same, of the rows of a triangle, whose first row is that of the means."""
    mean = triangle.r[0, 1:] / triangle.r[0, 0]
    return mean, _scale(np.sqrt(np.square(triangle.r[1:, 1:]).sum(axis=0) / triangle.weight), mean)


def _scale(deviation: np.ndarray, mean: np.ndarray) -> np.ndarray:
    return np.where(deviation > 10 * _EPSILON * np.abs(mean), deviation, 1.0)


def _weights(sample_weight: ArrayLike | None, x: np.ndarray) -> np.ndarray:
    weight: np.ndarray = _check_sample_weight(sample_weight, x, dtype=np.float64)
    if (weight < 0).any():
        raise InputError(f"sample_weight: it is negative in row {(weight < 0).argmax() + 1:,}; use 0 or more")
    return weight


class DataParallelRegressor(MultiOutputMixin, RegressorMixin, _Estimator):
    """Regression on all devices, to the same result on any number of them, as an estimator of scikit-learn.

    Args:
      loss: "squared", "huber", "absolute", "quantile", or with log link "poisson" or "gamma".
      huber_delta: of "huber", in the units of what is fitted: with `standardize`, deviations of y.
      quantile: of "quantile", in (0, 1).
      model: "linear", "concise" or "mlp"; PACKAGE.MODULE:CLASS; or a flax module, which predicts a column for each
        target. A `dpreg.Module` is given this loss, and this optimizer where it has none; any other has its own.
      hidden: widths of an mlp's hidden layers.
      solver: "exact", in float64 on the host: of linear models least squares in one pass over the rows, and
        poisson by Newton's method; "sgd": by `optimizer`, in float32 on the devices; or "auto": exact where that is
        for the model and loss, of 1024 parameters at most, else sgd.
      optimizer, lr, lr_schedule: of sgd: "sgd", "momentum", "adam", "adamw" or "lbfgs"; "constant", "linear", "cosine"
        or "inverse_sqrt". `partial_fit` takes a schedule that ends with the run as constant.
      l1, l2: of the penalties l1 sum |w| and l2 / 2 sum w^2 on the mean loss of what is fitted; none on biases. l1
        needs optimizer="sgd".
      batch_size: rows of a step over all devices: a multiple of `num_shards`.
      max_epochs: how often sgd uses every row.
      standardize: whether features are fitted with mean 0 and deviation 1, and targets of the losses without a link, by
        the weighted moments in float64; `coef_` and `intercept_` are in the units of X and y.
      num_devices: None takes all there are, up to `num_shards`.
      num_shards: logical shards, which the result depends on, by rounding at least.
      reduction: of sgd: "pmean", or "ordered" for the same bits on any number of devices; exact always has the same.
      random_state: of the initial parameters and the order of rows: an int, a RandomState, or None for another each
        time.

    Attributes:
      coef_: [d], or [t, d] where y has two axes; intercept_: a float, or [t]. Of linear models.
      n_features_in_, feature_names_in_: of X.
      n_iter_: passes over the rows.
    """

    def __init__(
        self,
        loss: str = "squared",
        *,
        huber_delta: float = 1.0,
        quantile: float = 0.5,
        model: str | Model = "linear",
        hidden: Sequence[int] = (64, 64),
        solver: str = "auto",
        optimizer: str = "adam",
        lr: float = 0.03,
        lr_schedule: str = "linear",
        l1: float = 0.0,
        l2: float = 0.0,
        batch_size: int = 32,
        max_epochs: int = 100,
        standardize: bool = True,
        num_devices: int | None = None,
        num_shards: int = 8,
        reduction: str = "pmean",
        random_state: Any = 0,
    ):
        self.loss, self.huber_delta, self.quantile = loss, huber_delta, quantile
        super().__init__(
            model=model,
            hidden=hidden,
            solver=solver,
            optimizer=optimizer,
            lr=lr,
            lr_schedule=lr_schedule,
            l1=l1,
            l2=l2,
            batch_size=batch_size,
            max_epochs=max_epochs,
            standardize=standardize,
            num_devices=num_devices,
            num_shards=num_shards,
            reduction=reduction,
            random_state=random_state,
        )

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:  # noqa: N803
        """Trains from the beginning.

        Args:
          X: [n, d]: NumPy, pandas or Arrow.
          y: [n] or [n, t].
          sample_weight: [n], 0 or more: a row of weight 2 counts as two, one of weight 0 for nothing.

        Raises:
          ValueError: for rows or arguments that cannot be.
          Diverged: when the loss is no longer finite.
        """
        return self._fit(X, y, sample_weight, further=False)

    def partial_fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:  # noqa: N803
        """Goes on from where it was: to the exact solution of these rows and all before, or by sgd for one epoch.

        The features' scales are those of the first rows; but exact least squares know those of all.
        """
        return self._fit(X, y, sample_weight, further=True)

    def _fit(self, X: Any, y: Any, sample_weight: ArrayLike | None, further: bool) -> Self:  # noqa: N803
        if self.loss in ("logistic", "softmax"):
            raise InputError(f"loss={self.loss!r}: it is for classes; use DataParallelClassifier")
        config = self._config(loss=self.loss, huber_delta=self.huber_delta, quantile=self.quantile)
        first = not (further and hasattr(self, "_fitted"))
        x, y = validate_data(self, X, y, reset=first, dtype=np.float64, order="C", multi_output=True, y_numeric=True)
        weight = _weights(sample_weight, x)
        self._train(config, x, np.asarray(y, np.float64).reshape(len(x), -1), weight, y.ndim == 1, further)
        return self

    def predict(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
        """The expected targets, or the quantile: [n] or [n, t] float64, as y was."""
        margins = self._margins(X)
        means = np.exp(margins) if self._fitted.config.loss in ("poisson", "gamma") else margins
        return means[:, 0] if self._fitted.one_column else means


class DataParallelClassifier(ClassifierMixin, _Estimator):
    """Classification on all devices, to the same result on any number of them, as an estimator of scikit-learn.

    The loss is "logistic" for two classes, with one prediction a row, and "softmax" for more, with one for each; the
    exact solver of both is Newton's method.

    Args:
      l2: of the penalty on the mean loss; without any, classes that can be told apart have no optimum.
      others: as of `DataParallelRegressor`.

    Attributes:
      classes_: the labels, sorted.
      coef_, intercept_: of linear models: [1, d] and [1] for two classes, [C, d] and [C] for more.
      n_features_in_, feature_names_in_, n_iter_: as of `DataParallelRegressor`.
    """

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:  # noqa: N803
        """Trains from the beginning.

        Args:
          X: [n, d]: NumPy, pandas or Arrow.
          y: [n] labels.
          sample_weight: [n], 0 or more: a row of weight 2 counts as two, one of weight 0 for nothing.

        Raises:
          ValueError: for rows or arguments that cannot be, or a single class.
          Diverged: when the loss is no longer finite.
        """
        x, labels, weight = self._rows(X, y, sample_weight, True)
        return self._fit(x, labels, weight, np.unique(labels[weight > 0]), further=False)

    def partial_fit(
        self,
        X: ArrayLike,  # noqa: N803
        y: ArrayLike,
        classes: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> Self:
        """Goes on from where it was, by sgd for one epoch.

        Args:
          classes: all labels there are; the first call needs them.
        """
        first = not hasattr(self, "_fitted")
        if first and classes is None:
            raise InputError("classes: the first call of partial_fit needs all labels that there will be; give them")
        known = np.unique(np.asarray(classes)) if first else self.classes_
        if classes is not None and not np.array_equal(np.unique(np.asarray(classes)), known):
            raise InputError(f"classes: they were {known} in the first call of partial_fit; give those, or none")
        x, labels, weight = self._rows(X, y, sample_weight, first)
        return self._fit(x, labels, weight, known, further=True)

    def _rows(
        self,
        X: Any,  # noqa: N803
        y: Any,
        sample_weight: ArrayLike | None,
        first: bool,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        x, labels = validate_data(self, X, y, reset=first, dtype=np.float64, order="C")
        check_classification_targets(labels)
        return x, column_or_1d(labels, warn=True), _weights(sample_weight, x)

    def _fit(self, x: np.ndarray, labels: np.ndarray, weight: np.ndarray, classes: np.ndarray, further: bool) -> Self:
        if len(classes) < 2 and (weight > 0).any():
            raise InputError(f"y: there is one class, {classes.tolist()[0]!r}; give rows of two classes or more")
        at = np.searchsorted(classes, labels)
        unknown = classes[np.minimum(at, len(classes) - 1)] != labels
        if (unknown & (weight > 0)).any():
            raise InputError(
                f"y: the label {labels[unknown].tolist()[0]!r} is none of the classes, {classes}; "
                "leave it out, or call fit"
            )
        y = np.where(unknown, 0, at).astype(np.float64)[:, None]
        two = len(classes) == 2
        config = self._config(loss="logistic" if two else "softmax", num_classes=len(classes))
        self._train(config, x, y, weight, False, further)
        self.classes_ = classes
        return self

    def decision_function(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
        """The logits: [n] of the second of two classes, [n, C] of more."""
        margins = self._margins(X)
        return margins[:, 0] if margins.shape[1] == 1 else margins

    def predict(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
        """The likeliest labels, [n]."""
        logits = self.decision_function(X)
        labels: np.ndarray = self.classes_[(logits > 0).astype(int) if logits.ndim == 1 else logits.argmax(axis=1)]
        return labels

    def predict_proba(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
        """The probabilities of the classes, [n, C]."""
        probabilities: np.ndarray = np.exp(self.predict_log_proba(X))
        return probabilities

    def predict_log_proba(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
        """Their logarithms, [n, C]."""
        logits = self.decision_function(X)
        logarithms: np.ndarray
        if logits.ndim == 1:
            logarithms = -np.logaddexp(0, np.stack([logits, -logits], axis=1))
        else:
            logarithms = scipy.special.log_softmax(logits, axis=1)
        return logarithms
