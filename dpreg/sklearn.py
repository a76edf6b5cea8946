"""dpreg's models as scikit-learn estimators. Needs scikit-learn: `pip install 'dpreg[sklearn]'`."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import scipy
from numpy.typing import ArrayLike

try:
    from sklearn.base import ClassifierMixin, MultiOutputMixin, RegressorMixin
    from sklearn.utils import column_or_1d
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import validate_data
except ImportError as missing:
    raise ImportError("dpreg.sklearn: needs scikit-learn 1.6 or newer; pip install 'dpreg[sklearn]'") from missing

from dpreg.config import Config
from dpreg.config.model import LOG_LINK_LOSSES
from dpreg.errors import InputError
from dpreg.estimators.base import DEFAULTS, SOLVERS, STANDARDIZE, Estimator
from dpreg.estimators.rows import Folds, check_groups, check_sample_weight, split_rows
from dpreg.step.state import Model

__all__ = ["DataParallelClassifier", "DataParallelRegressor"]


class DataParallelRegressor(MultiOutputMixin, RegressorMixin, Estimator):
    """Regression on all devices, as a scikit-learn estimator. The number of devices does not affect the result.

    Args:
      loss: "squared", "huber", "absolute", "quantile", or with a log link "poisson", "gamma", "tweedie" or
        "negative_binomial".
      huber_delta: the error beyond which the loss "huber" is linear. Its unit is that of the fitted target: with
        `standardize`, the standard deviation of y.
      quantile: the quantile of the loss "quantile", in (0, 1).
      tweedie_power: the power of the loss "tweedie", in (1, 2).
      negative_binomial_alpha: the alpha of the loss "negative_binomial"; None for the most likely one, exact solvers
        only.
      model: "linear", "concise" (flax.linen.Dense) or "mlp"; PACKAGE.MODULE:CLASS; or a flax module that predicts a
        column for each target. A `dpreg.Module` gets this loss, and this optimizer if it has none; other modules have
        their own.
      hidden: the widths of an mlp's hidden layers.
      solver: "exact" solves linear models to the optimum, in float64 on the host: least squares in one pass over the
        rows, and the other losses by Newton's method. "sgd" trains with `optimizer`, in float32 on
        the devices; a `ConvergenceWarning` tells that a linear model is far from its optimum. "auto" is "exact" if that
        supports the model and the loss, and there are at most 4,096 parameters (1,024 where the loss needs several
        passes); otherwise "sgd".
      optimizer: of solver "sgd": "sgd", "momentum", "adam", "adamw" or "lbfgs".
      lr: the learning rate.
      lr_schedule: "constant", "linear", "cosine" or "inverse_sqrt". In `partial_fit`, "linear" and "cosine" are
        constant.
      l1, l2: the weights of the penalties l1 sum |w| and l2 / 2 sum w^2, added to the mean loss in the units of the
        fit, without biases. With l1, weights are exactly 0 where that is best; "exact" supports it for "squared" and
        the losses with a log link, and "sgd" with optimizer="sgd".
      cv: chooses the strength alpha of a penalty alpha (l1_ratio sum |w| + (1 - l1_ratio) / 2 sum w^2) on squared loss,
        as `ElasticNetCV` does: a number of folds, a splitter of scikit-learn, or pairs of row numbers to fit and row
        numbers held out, such as those of `GroupKFold`. The losses of all folds come from one pass over the rows, whose
        features are scaled once. By default, there is no choice, and the penalties are `l1` and `l2`.
      l1_ratio: with `cv`, the share of l1: 1 for the lasso, 0 for ridge regression.
      batch_size: the rows of a step, over all devices; a multiple of `num_shards`.
      max_epochs: the number of passes of solver "sgd" over the rows.
      standardize: whether to scale features, and targets of losses without a link, to mean 0 and standard deviation 1
        for the fit, with weighted moments in float64. `coef_` and `intercept_` are in the units of X and y.
      num_devices: the number of devices; None uses all, up to `num_shards`.
      num_shards: the number of logical shards; it affects the result, at least by rounding.
      reduction: of solver "sgd": "pmean", or "ordered" for the same bits on any number of devices. The solver "exact"
        always gives the same bits.
      covariance: of the coefficients, for the standard errors of an exact solution without a penalty: "classic" for
        rows with variances as in the model; "HC0", "HC1", "HC2" or "HC3" for any; "cluster" for rows that are
        correlated within the `groups` of `fit`. By default "cluster" with groups, else "classic".
      random_state: the seed of the initial parameters and the order of rows: an int, a RandomState, or None for a
        random one.

    Attributes:
      coef_: the weights of a linear model, [d], or [t, d] if y has two axes.
      intercept_: the intercept of a linear model, a float, or [t] if y has two axes.
      n_features_in_, feature_names_in_: the number and names of the features.
      n_iter_: the number of passes over the rows.
      alpha_, alphas_: with `cv`, the strength chosen, and all strengths, the strongest first, in the units of the fit.
      mse_path_: with `cv`, the mean squared error in the units of y, for each strength and fold, [s, K].
      summary_: the summary of an exact solution, a `dpreg.solvers.inference.Summary`; standard errors need l2=0.
    """

    def __init__(
        self,
        loss: str = DEFAULTS.loss,
        *,
        huber_delta: float = DEFAULTS.huber_delta,
        quantile: float = DEFAULTS.quantile,
        tweedie_power: float = DEFAULTS.tweedie_power,
        negative_binomial_alpha: float | None = DEFAULTS.negative_binomial_alpha,
        model: str | Model = DEFAULTS.model,
        hidden: Sequence[int] = DEFAULTS.hidden,
        solver: str = SOLVERS[0],
        optimizer: str = DEFAULTS.optimizer,
        lr: float = DEFAULTS.lr,
        lr_schedule: str = DEFAULTS.lr_schedule,
        l1: float = DEFAULTS.l1,
        l2: float = DEFAULTS.l2,
        cv: Any = None,
        l1_ratio: float = DEFAULTS.l1_ratio,
        batch_size: int = DEFAULTS.batch_size,
        max_epochs: int = DEFAULTS.max_epochs,
        standardize: bool = STANDARDIZE,
        num_devices: int | None = None,
        num_shards: int = DEFAULTS.num_shards,
        reduction: str = DEFAULTS.reduction,
        covariance: str | None = DEFAULTS.covariance,
        random_state: Any = DEFAULTS.seed,
    ):
        self.loss, self.huber_delta, self.quantile = loss, huber_delta, quantile
        self.tweedie_power, self.negative_binomial_alpha = tweedie_power, negative_binomial_alpha
        self.cv, self.l1_ratio = cv, l1_ratio
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
            covariance=covariance,
            random_state=random_state,
        )

    def fit(
        self,
        X: ArrayLike,  # noqa: N803
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> Self:
        """Trains a new model.

        Args:
          X: the features [n, d], in NumPy, pandas or Arrow.
          y: the targets, [n] or [n, t].
          sample_weight: [n], 0 or more. A row of weight 2 counts as two rows, and one of weight 0 is ignored.
          groups: [n], the label of the group of each row, for `covariance`, and for a splitter that `cv` is.

        Raises:
          ValueError: for invalid rows or arguments.
          Diverged: when the loss is not finite.
        """
        return self._fit(X, y, sample_weight, False, groups)

    def partial_fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:  # noqa: N803
        """Continues training: exact least squares for these and all previous rows, or one epoch of sgd for these rows.

        Exact least squares standardize by the moments of all rows, and sgd by those of the first call.
        """
        return self._fit(X, y, sample_weight, True, None)

    def _fit(
        self,
        X: Any,  # noqa: N803
        y: Any,
        sample_weight: ArrayLike | None,
        partial: bool,
        groups: ArrayLike | None,
    ) -> Self:
        if self.loss in ("logistic", "softmax"):
            raise InputError(f"loss={self.loss!r}: it is a loss of classification; use DataParallelClassifier")
        config = self._config(
            loss=self.loss,
            huber_delta=self.huber_delta,
            quantile=self.quantile,
            tweedie_power=self.tweedie_power,
            negative_binomial_alpha=self.negative_binomial_alpha,
        )
        first = not (partial and hasattr(self, "_fitted"))
        x, y = validate_data(self, X, y, reset=first, dtype=np.float64, order="C", multi_output=True, y_numeric=True)
        weight, one_column, y = check_sample_weight(sample_weight, x), y.ndim == 1, np.asarray(y, np.float64)
        numbers = check_groups(groups, x, self.covariance, self.cv)
        folds = self._folds(config, x, y, weight, partial, numbers)
        clusters = None if folds else numbers
        self._train(config, x, y.reshape(len(x), -1), weight, one_column, partial, folds, clusters)
        return self

    def _folds(
        self,
        config: Config,
        x: np.ndarray,
        y: np.ndarray,
        weight: np.ndarray,
        partial: bool,
        groups: np.ndarray | None,
    ) -> Folds | None:
        """The folds of `cv`, if there are any.

        Raises:
          InputError: for folds that are none, and for arguments that `cv` does not apply to.
        """
        if self.cv is None:
            if self.l1_ratio != DEFAULTS.l1_ratio:
                raise InputError(f"l1_ratio={self.l1_ratio!r}: it applies only with cv; give both, or l1 and l2")
            return None
        if not config.is_least_squares() or not isinstance(self.model, str) or self.solver == "sgd":
            raise InputError("cv: it applies only to model='linear', loss='squared' and the exact solver; leave it out")
        if self.l1 or self.l2:
            raise InputError("cv: it chooses the penalty; leave out l1 and l2, and give l1_ratio")
        if partial:
            raise InputError("cv: it needs all rows at once; call fit, or leave it out")
        if y.size != len(x):
            raise InputError(f"cv: it chooses one penalty for one target, and y has {y.shape[1]}; give one")
        if self.covariance is not None:
            raise InputError(f"covariance={self.covariance!r}: standard errors are unknown with cv; leave one out")
        return split_rows(self.cv, x, y, weight, self.l1_ratio, groups)

    def predict(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
        """Predicts the mean of the targets, or their median or quantile for those losses.

        Returns:
          [n] or [n, t] float64, like y in `fit`.
        """
        margins = self._margins(X)
        means = np.exp(margins) if self._fitted.config.loss in LOG_LINK_LOSSES else margins
        return means[:, 0] if self._fitted.one_column else means


class DataParallelClassifier(ClassifierMixin, Estimator):
    """Classification on all devices, as a scikit-learn estimator. The number of devices does not affect the result.

    The loss is "logistic" for two classes, with one output per row, and "softmax" for more, with an output for each
    class. The solver "exact" uses Newton's method.

    Args:
      l2: the weight of the l2 penalty. Without a penalty, there is no optimum for classes that are linearly separable.
      others: see `DataParallelRegressor`.

    Attributes:
      classes_: the labels, sorted.
      coef_, intercept_: the parameters of a linear model: [1, d] and [1] for two classes, [C, d] and [C] for more.
      n_features_in_, feature_names_in_, n_iter_: see `DataParallelRegressor`.
    """

    def fit(
        self,
        X: ArrayLike,  # noqa: N803
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> Self:
        """Trains a new model.

        Args:
          X: the features [n, d], in NumPy, pandas or Arrow.
          y: the labels [n].
          sample_weight: [n], 0 or more. A row of weight 2 counts as two rows, and one of weight 0 is ignored.
          groups: [n], the label of the group of each row, for `covariance`.

        Raises:
          ValueError: for invalid rows or arguments, and for a single class.
          Diverged: when the loss is not finite.
        """
        x, labels, weight = self._check_rows(X, y, sample_weight, True)
        numbers = check_groups(groups, x, self.covariance)
        return self._fit(x, labels, weight, np.unique(labels[weight > 0]), False, numbers)

    def partial_fit(
        self,
        X: ArrayLike,  # noqa: N803
        y: ArrayLike,
        classes: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> Self:
        """Continues training, by one epoch of sgd.

        Args:
          X, y, sample_weight: the rows, as in `fit`.
          classes: all labels of this and later calls; required in the first call.
        """
        first = not hasattr(self, "_fitted")
        if first and classes is None:
            raise InputError(
                "classes: the first call of partial_fit needs all labels of this and later calls; give them"
            )
        known = np.unique(np.asarray(classes)) if first else self.classes_
        if classes is not None and not np.array_equal(np.unique(np.asarray(classes)), known):
            raise InputError(f"classes: they were {known} in the first call of partial_fit; give those, or none")
        x, labels, weight = self._check_rows(X, y, sample_weight, first)
        check_groups(None, x, self.covariance)
        return self._fit(x, labels, weight, known, True, None)

    def _check_rows(
        self,
        X: Any,  # noqa: N803
        y: Any,
        sample_weight: ArrayLike | None,
        first: bool,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        x, labels = validate_data(self, X, y, reset=first, dtype=np.float64, order="C")
        check_classification_targets(labels)
        return x, column_or_1d(labels, warn=True), check_sample_weight(sample_weight, x)

    def _fit(
        self,
        x: np.ndarray,
        labels: np.ndarray,
        weight: np.ndarray,
        classes: np.ndarray,
        partial: bool,
        groups: np.ndarray | None,
    ) -> Self:
        if len(classes) < 2:
            raise InputError(f"y: there is one class, {classes.tolist()[0]!r}; give rows of two classes or more")
        indices = np.searchsorted(classes, labels)
        unknown = classes[np.minimum(indices, len(classes) - 1)] != labels
        if (unknown & (weight > 0)).any():
            raise InputError(
                f"y: the label {labels[unknown].tolist()[0]!r} is none of the classes, {classes}; "
                "leave out its rows, or call fit"
            )
        y = np.where(unknown, 0, indices).astype(np.float64)[:, None]
        config = self._config(loss="logistic" if len(classes) == 2 else "softmax", num_classes=len(classes))
        self._train(config, x, y, weight, False, partial, groups=groups)
        self.classes_ = classes
        return self

    def decision_function(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
        """The logits: [n] for the second of two classes, [n, C] for more classes."""
        margins = self._margins(X)
        return margins[:, 0] if margins.shape[1] == 1 else margins

    def predict(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
        """The most probable labels, [n]."""
        logits = self.decision_function(X)
        labels: np.ndarray = self.classes_[(logits > 0).astype(int) if logits.ndim == 1 else logits.argmax(axis=1)]
        return labels

    def predict_proba(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
        """The probabilities of the classes, [n, C]."""
        probabilities: np.ndarray = np.exp(self.predict_log_proba(X))
        return probabilities

    def predict_log_proba(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
        """The logarithms of the probabilities of the classes, [n, C]."""
        logits = self.decision_function(X)
        logarithms: np.ndarray
        if logits.ndim == 1:
            logarithms = -np.logaddexp(0, np.stack([logits, -logits], axis=1))
        else:
            logarithms = scipy.special.log_softmax(logits, axis=1)
        return logarithms
