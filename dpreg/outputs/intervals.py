"""Intervals around the predictions of a linear model, from the covariance of its exact fit."""

import numpy as np

from dpreg.config.model import GLM_LOSSES
from dpreg.data.schema import Schema
from dpreg.errors import InputError
from dpreg.models.linear import linear_parameters
from dpreg.outputs.export import ExactFit, ExportedModel
from dpreg.solvers.inference import INFINITE
from dpreg.spelling import spell
from dpreg.tables.standalone import apply_inverse_link


class Intervals:
    """Computes the intervals of predictions, in float64 on the host.

    A linear predictor z = x w + b has the variance a' C a, where C is the covariance of b and w, and a is (1, x). The
    interval of the prediction is z -/+ q sqrt(a' C a), with the quantile q of Student's t (of the normal distribution
    where the dispersion is known), through the inverse of the link. For squared loss, that of a new observation of
    weight 1 is z -/+ q sqrt(a' C a + dispersion) (Seber and Lee 2003, chapter 5). For logarithms of a target, both are
    exponentiated: they are intervals of its median, and of a new observation.

    Args:
      model: the model; schema: of the table that it was trained on.
      level: of the intervals, in (0, 1).

    Attributes:
      names: of the columns that a call returns: low_TARGET and high_TARGET for each target, and for squared loss also
        new_low_TARGET and new_high_TARGET, of a new observation.

    Raises:
      InputError: for a model without standard errors.
    """

    def __init__(self, model: ExportedModel, schema: Schema, level: float):
        fit, self._roots = _require_errors(model, level)
        linear = linear_parameters(model.variables["params"]) or (np.zeros(0), np.zeros(0))
        self._w, self._b = (values.astype(np.float64) for values in linear)
        self._schema, self._loss, self._intercept = schema, model.flags["loss"], bool(model.flags["intercept"])
        coefficients = [each.coefficients[self._intercept :] for each in fit.summaries]
        notes = [{c.note for c in of_column} for of_column in zip(*coefficients, strict=True)]
        self._infinite = np.flatnonzero([not found.isdisjoint(INFINITE.values()) for found in notes])
        self._used, self._reach = fit.used(self._intercept), fit.summaries[0].quantile(level)
        scale = schema.units[1][model.num_inputs :]
        self._dispersion = np.array([each.dispersion for each in fit.summaries]) / np.square(scale)
        kinds = ("", "new_") if self._loss == "squared" else ("",)
        self.names = [f"{kind}{end}_{t.name}" for t in schema.targets for kind in kinds for end in ("low", "high")]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """[n, columns] float64: the ends of the intervals for rows x [n, d] in the units of training.

        They are NaN for rows of a level of a category without a finite estimate.
        """
        x = x.astype(np.float64)
        z, variances = x @ self._w + self._b, np.stack([self._variance(x, root) for root in self._roots], axis=1)
        ends = []
        for variance in (variances, variances + self._dispersion) if self._loss == "squared" else (variances,):
            reach = self._reach * np.sqrt(variance)
            with np.errstate(over="ignore"):  # an end may be infinite
                ends += [apply_inverse_link(end, self._loss) for end in (z - reach, z + reach)]
        found = np.stack([self._schema.prediction(end) for end in ends], axis=2).reshape(len(x), -1)
        found[x[:, self._infinite].any(axis=1)] = np.nan
        return found

    def _variance(self, x: np.ndarray, root: np.ndarray) -> np.ndarray:
        """[n]: the variances of the linear predictors, from a root of the covariance."""
        projected = x[:, self._used] @ root[int(self._intercept) :]
        if self._intercept:
            projected += root[0]
        variance: np.ndarray = np.square(projected).sum(axis=1)
        return variance


def _require_errors(model: ExportedModel, level: float) -> tuple[ExactFit, np.ndarray]:
    """The exact fit of a model and the roots of its covariances.

    Raises:
      InputError: for a model without them.
    """
    asked, fit = spell("interval", level), model.fit
    if fit is None:
        how = f"{spell('solver', 'exact')} and {spell('loss', 'squared', *GLM_LOSSES)}"
        raise InputError(f"{asked}: the model has no exact fit with standard errors; train it with {how}")
    if fit.roots is None:
        l2 = model.flags["l2"]
        why = spell("l2", l2) if l2 else "without degrees of freedom"
        remedy = "train it without a penalty" if l2 else "train it on more rows"
        raise InputError(f"{asked}: a fit {'with ' if l2 else ''}{why} has no standard errors; {remedy}")
    return fit, fit.roots
