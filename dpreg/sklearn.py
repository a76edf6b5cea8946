"""dpreg's models as estimators of scikit-learn, which has to be there: `pip install 'dpreg[sklearn]'`."""

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

from dpreg.errors import InputError
from dpreg.estimators.base import DEFAULTS, SOLVERS, STANDARDIZE, Estimator, weights_of
from dpreg.step.state import Model

__all__ = ["DataParallelClassifier", "DataParallelRegressor"]


class DataParallelRegressor(MultiOutputMixin, RegressorMixin, Estimator):
    """Regression on all devices, to the same result on any number of them, as an estimator of scikit-learn.

    Args:
      loss: "squared", "huber", "absolute", "quantile", or with log link "poisson" or "gamma".
      huber_delta: of "huber", in the units of what is fitted: with `standardize`, deviations of y.
      quantile: of "quantile", in (0, 1).
      model: "linear", "concise" or "mlp"; PACKAGE.MODULE:CLASS; or a flax module, which predicts a column for each
        target. A `dpreg.Module` is given this loss, and this optimizer where it has none; any other has its own.
      hidden: widths of an mlp's hidden layers.
      solver: "exact", in float64 on the host: of linear models least squares in one pass over the rows, and the
        other losses but gamma by Newton's method, to the optimum; "sgd": by `optimizer`, in float32 on the devices,
        with a `ConvergenceWarning` where that ends far from a linear model's optimum; or "auto": exact where that
        is for the model and loss, of 1024 parameters at most, else sgd.
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
      summary_: of exact solutions, see `dpreg.solvers.inference.Summary`; standard errors need l2=0.
    """

    def __init__(
        self,
        loss: str = DEFAULTS.loss,
        *,
        huber_delta: float = DEFAULTS.huber_delta,
        quantile: float = DEFAULTS.quantile,
        model: str | Model = DEFAULTS.model,
        hidden: Sequence[int] = DEFAULTS.hidden,
        solver: str = SOLVERS[0],
        optimizer: str = DEFAULTS.optimizer,
        lr: float = DEFAULTS.lr,
        lr_schedule: str = DEFAULTS.lr_schedule,
        l1: float = DEFAULTS.l1,
        l2: float = DEFAULTS.l2,
        batch_size: int = DEFAULTS.batch_size,
        max_epochs: int = DEFAULTS.max_epochs,
        standardize: bool = STANDARDIZE,
        num_devices: int | None = None,
        num_shards: int = DEFAULTS.num_shards,
        reduction: str = DEFAULTS.reduction,
        random_state: Any = DEFAULTS.seed,
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
        weight = weights_of(sample_weight, x)
        self._train(config, x, np.asarray(y, np.float64).reshape(len(x), -1), weight, y.ndim == 1, further)
        return self

    def predict(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
        """The expected targets, or the quantile: [n] or [n, t] float64, as y was."""
        margins = self._margins(X)
        means = np.exp(margins) if self._fitted.config.loss in ("poisson", "gamma") else margins
        return means[:, 0] if self._fitted.one_column else means


class DataParallelClassifier(ClassifierMixin, Estimator):
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
        return x, column_or_1d(labels, warn=True), weights_of(sample_weight, x)

    def _fit(self, x: np.ndarray, labels: np.ndarray, weight: np.ndarray, classes: np.ndarray, further: bool) -> Self:
        if len(classes) < 2:
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
