"""Generalised linear models over all shards, by iteratively reweighted least squares."""

import dataclasses
from typing import NamedTuple

import numpy as np
import scipy

from dpreg.config import Config
from dpreg.data.sources import Rows
from dpreg.errors import InputError, NoOptimumError
from dpreg.solvers import elastic_net
from dpreg.solvers.blas import in_float64, one_blas_thread
from dpreg.solvers.factors import Factors
from dpreg.solvers.fit import WIDE, Fit
from dpreg.solvers.glm import FAR, Family, infinite_levels
from dpreg.solvers.newton import Point, approach, minimum
from dpreg.solvers.offset import WithOffset, values
from dpreg.solvers.tsqr import RFactor
from dpreg.spelling import spell

_SAMPLED = 16  # One row of so many is in a sample, at most.
_SAMPLED_ROWS = 250  # the least number of rows of a sample for each column
_NEAR = 1e-4  # the decrement at which a fit to a sample is near enough
_FEW_STEPS = 12  # from a start near the optimum; more could bring a model without one to rest by rounding
_DETERMINED = 1e-4  # the least share of the deviation of a feature, in the weights of the last step
_SCORES, _FEW_SCORES = 100, 20  # the most passes for scores, with the Hessian of the null model, and with a better one
_SCORED_VALUES, _SCORED_ROWS = 1 << 21, 1 << 14  # of a block whose scores are summed at once: it stays in cache
_CENTRED = 10.0  # the most that a mean may be in deviations, for predictions that lose no digit in float32


class Objective(NamedTuple):
    """The mean loss of a family for one target, plus the penalties l1 sum |w| + l2 / 2 sum w^2.

    Attributes:
      family, target, l1, l2, intercept: as the arguments of `GeneralizedLinearModels.newton`.
      spread: [d] the greatest deviations of the features in the weights of any step so far, written by each. Where an
        optimum is infinite, later steps have weights near 0 there, in which they would seem to be short.
    """

    family: Family
    target: int
    l1: float
    l2: float
    intercept: bool
    spread: np.ndarray


class _Sums(NamedTuple):
    """The sums over all rows at one point: those of `Family.working`, and 0 where the point separates all rows."""

    loss: float
    weight: float
    pearson: float
    total: float
    mixed: float


class _SeparatedError(NoOptimumError):
    """The features separate all rows that were read."""


class _WeightlessError(InputError):
    """No row that was read has a weight."""


class GeneralizedLinearModels(Factors):
    """Fits generalised linear models to all rows of a source."""

    def newton(
        self,
        family: Family,
        l2: float = Config.l2,
        intercept: bool = Config.intercept,
        target: int = 0,
        counts: bool = False,
        l1: float = Config.l1,
        start: np.ndarray | None = None,
    ) -> tuple[Fit, float]:
        """(the linear model of least mean loss + l1 sum |w| + l2 / 2 sum w^2, that mean loss), by Newton's method.

        Each step is a pass, and a problem of least squares; with l1 an elastic net (Lee, Sun and Saunders 2014). The
        first steps are taken on a sample of the rows where there are many. Passes for scores alone, which take a part
        of the time, lead from there so near the minimum that one step on all rows is left.

        Without a penalty, a level of a category whose targets are all alike, such as 0, may have no finite weight. The
        loss of its rows then tends to its least value, 0, as the weight grows, whatever the other weights are. Those
        are the optimum for the other rows, and the level gets a weight of `FAR`.

        Args:
          target: the number of the target, from 0.
          counts: whether a weight is a number of equal rows; else of several with one mean.
          start: b and w [1 + d] near the solution, if known.

        Raises:
          InputError: when there is no optimum, such as for classes that a plane separates.
        """
        with one_blas_thread():
            return self._newton(Objective(family, target, l1, l2, intercept, np.zeros(self._inputs)), counts, start)

    def _newton(self, objective: Objective, counts: bool, start: np.ndarray | None) -> tuple[Fit, float]:
        levels = self._levels.features if self._levels and not (objective.l1 or objective.l2) else ()
        infinite = infinite_levels(objective.family, levels, objective.target, self._reduced)
        if not infinite:
            return self._fit(objective, counts, start)
        total = self._sum_weights()
        with self._skipping(infinite):
            share = self._sum_weights() / total
            if not share:
                raise NoOptimumError(
                    "no optimum: each row has a level of a category whose targets are all alike; give some "
                    f"{spell('l2', 0.001)}"
                )
            fit, loss = self._fit(objective, counts, start)
        w = fit.w.copy()
        w[list(infinite), 0] = [sign * FAR for sign in infinite.values()]
        return dataclasses.replace(fit, w=w, infinite=tuple(infinite)), loss * share

    def _fit(self, objective: Objective, counts: bool, start: np.ndarray | None) -> tuple[Fit, float]:
        """The result of `newton` for the rows that are not skipped."""
        family, l1, l2 = objective.family, objective.l1, objective.l2
        theta, at = self._minimum(objective, start)
        if not (family.canonical or l1):  # Standard errors are of the expected information.
            at = self._evaluate(objective, theta, observed=False)
        fit, (loss, weight, pearson, total, _) = at.detail
        if counts:
            fit = dataclasses.replace(fit, triangle=dataclasses.replace(fit.triangle, rows=weight))
        dispersion = pearson / max(fit.degrees_of_freedom, 1) if family.dispersed else 1.0
        null = self._null_prediction(objective, total / weight) if objective.intercept else 0.0
        repeats = counts or not family.dispersed
        constant, of_null = self._constants(objective, null, dispersion or 1.0, repeats)
        return dataclasses.replace(
            fit,
            l1=l1,
            l2=l2,
            dispersion=dispersion,
            known_variance=not family.dispersed,
            deviance=2 * loss,
            null_deviance=2 * of_null if objective.intercept else None,
            log_likelihood=constant - loss / (dispersion or 1.0),
        ), loss / weight

    def _minimum(self, objective: Objective, start: np.ndarray | None, enough: float = 0.0) -> tuple[np.ndarray, Point]:
        """(b and w [1 + d] of the least objective, the `Point` before the last step); see `minimum` for `enough`."""
        t = objective.target

        def evaluated(theta: np.ndarray) -> Point:
            return self._evaluate(objective, theta)

        def safe() -> np.ndarray:
            weight, total = self._reduced(2, lambda rows: rows["weight"] @ np.c_[np.ones(len(y := rows["y"])), y[:, t]])
            null = self._null_prediction(objective, total / weight) if objective.intercept else 0.0
            return np.append(null, np.zeros(self._inputs))

        if start is None and (near := self._near(objective, enough)) is not None:
            try:
                theta, at = minimum(evaluated, near, safe, enough, _FEW_STEPS)
                if objective.l2 or _is_determined(at.detail[0], objective.spread):
                    return theta, at
            except _SeparatedError:
                raise
            except NoOptimumError:  # A sample may be unlike the other rows.
                pass
        return minimum(evaluated, self._fit_start(objective) if start is None else start, safe, enough)

    def _near(self, objective: Objective, enough: float) -> np.ndarray | None:
        """A b and w [1 + d] near the minimum; None where the first predictions of the family are the best start.

        With l1 it is the minimum of a sample. Else scores lead there, whose sums take less time than those of products,
        with a Hessian: that near the minimum of a sample, or of all rows where these are few; that of the null model
        where these are few beside many features.
        """
        every = min(_SAMPLED, len(self._source) // (_SAMPLED_ROWS * self._every * (1 + self._inputs)))
        if every > 1 or not (enough or objective.l1 or self._inputs >= WIDE):
            try:
                with self._sampling(max(every, 1)):
                    start, at = self._minimum(objective, None, _NEAR)
            except (NoOptimumError, _WeightlessError):
                if every > 1:
                    return None
                raise
            if objective.l1:
                return start
            along, centred, most = *_unit_hessian(objective, at), _FEW_SCORES
        elif self._inputs >= WIDE and not objective.l1:
            start, along, centred = self._null_model(objective)
            most = _SCORES
        else:
            return None

        def evaluate(theta: np.ndarray, roughly: bool) -> tuple[float, np.ndarray]:
            return self._gradient(objective, theta, roughly and centred)

        return approach(evaluate, start, along, most, enough)

    def _evaluate(self, objective: Objective, theta: np.ndarray, observed: bool = True) -> Point:
        """The objective and Newton's step at b and w [1 + d]: a pass. `Point.detail` is (the next fit, `_Sums`).

        Args:
          observed: whether with the information that was observed, as in Newton's method; else with that expected.
        """
        triangle, of_rows = self._around(objective, theta, observed)
        sums = _Sums(*of_rows)
        if not np.isfinite(sums.loss):
            return Point(np.inf, np.zeros_like(theta), 0.0, 0.0)
        l1, l2, w = objective.l1, objective.l2, theta[1:]
        _require_optimum(objective, sums.mixed)
        fit = self._solve_around(objective, triangle, sums, w)
        step = np.append(fit.b, fit.w) - theta
        along = np.square(triangle.about(0.0)[:, : step.size] @ step).sum() / sums.weight
        return Point(
            sums.loss / sums.weight + float(l1 * np.abs(w).sum() + l2 / 2 * np.square(w).sum()),
            step,
            decrement=float(along + l2 * np.square(step[1:]).sum()),
            moved=float(np.max(np.abs(step[1:]) * objective.spread, initial=0.0)),
            detail=(fit, sums),
        )

    def _around(self, objective: Objective, theta: np.ndarray | None, observed: bool) -> tuple[RFactor, np.ndarray]:
        """The problem of Newton's next step from b and w [1 + d], and the sums of `Family.working`."""
        family = objective.family

        def problem(rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            x, y, weight, offset = values(rows, objective.target)
            prediction = family.start(y) if theta is None else x @ theta[1:, None] + theta[0] + offset
            response, information, sums = family.working(y, weight, prediction, observed)
            mixed = theta is None or not family.separates(prediction - offset, y)
            return response - offset, information, np.append(sums, mixed)

        return self._factor(problem, 1, len(_Sums._fields))

    def _solve_around(
        self, objective: Objective, triangle: RFactor, sums: _Sums, start: np.ndarray | None = None
    ) -> Fit:
        _require_weight(sums.weight)
        x = triangle.below(objective.intercept)[:, 1 : 1 + self._inputs]
        np.maximum(objective.spread, np.sqrt(np.einsum("ij,ij->j", x, x) / triangle.weight), out=objective.spread)
        unit = sums.weight / triangle.weight
        return elastic_net.solve(triangle, objective.l1 * unit, objective.l2 * unit, objective.intercept, start)

    def _fit_start(self, objective: Objective) -> np.ndarray:
        """The b and w [1 + d] of the problem of least squares at the first predictions of the family: a pass."""
        triangle, sums = self._around(objective, None, False)
        fit = self._solve_around(objective, triangle, _Sums(*sums))
        return np.append(fit.b, fit.w)

    def _null_model(self, objective: Objective) -> tuple[np.ndarray, scipy.sparse.csr_array, bool]:
        """The null model, and scales for steps from it.

        Returns:
          its b and w [1 + d]; parameters [1 + d, m] of centred features of mean square 1; whether all means of features
          are so small that predictions in float32 have about its digits.
        """

        def moments(rows: Rows) -> np.ndarray:
            x, y, weight, _ = values(rows, objective.target)
            squares = np.einsum("i,ij,ij->j", weight, x, x)  # without new memory, which takes longer than the sums
            return np.concatenate([[weight.sum()], weight @ y, weight @ x, squares])

        first, squares = np.split(self._reduced(2 + 2 * self._inputs, moments), [2 + self._inputs])
        weight, total = first[:2]
        _require_weight(weight)
        means = first[2:] / weight * objective.intercept
        spread = np.sqrt(np.maximum(squares / weight - np.square(means), 0))
        np.maximum(objective.spread, spread, out=objective.spread)
        kept = np.flatnonzero(spread > np.sqrt(self._epsilon * squares / weight))
        if self._levels is not None and not objective.l2:
            kept = np.setdiff1d(kept, self._levels.left_out(objective.intercept, self._skipped))
        of_w = scipy.sparse.csr_array((1 / spread[kept], (kept, np.arange(len(kept)))), (self._inputs, len(kept)))
        of_b = np.zeros((1, len(kept)))
        null = 0.0
        if objective.intercept:
            null = self._null_prediction(objective, total / weight)
            of_w = scipy.sparse.hstack([scipy.sparse.csr_array((self._inputs, 1)), of_w])
            of_b = np.append(1.0, -means[kept] / spread[kept])[None]
        with np.errstate(all="ignore"):  # Where all targets are alike, the null model may be infinite.
            information = float(objective.family.terms(np.full((1, 1), null), np.ones((1, 1))).information[0, 0])
        along = scipy.sparse.vstack([scipy.sparse.csr_array(of_b), of_w], format="csr") / np.sqrt(information or 1.0)
        centred = bool((np.abs(means) <= _CENTRED * spread)[kept].all())
        return np.append(null, np.zeros(self._inputs)), along, centred

    def _gradient(self, objective: Objective, theta: np.ndarray, roughly: bool = False) -> tuple[float, np.ndarray]:
        """(the objective, its gradient [1 + d]) at b and w [1 + d], without l1: a pass.

        Args:
          roughly: whether products with features have the precision of these, such as float32; else float64.
        """
        family, l2 = objective.family, objective.l2

        def of(rows: Rows) -> np.ndarray:
            x = rows["x"] if roughly else in_float64(rows["x"])
            _, y, weight, offset = values(rows | {"x": x[:, :0]}, objective.target)
            with np.errstate(all="ignore"):  # A step that was too long is not taken.
                prediction = (x @ theta[1:].astype(x.dtype))[:, None] + theta[0] + offset
                terms = family.terms(prediction, y)
                score, mixed = weight * terms.score[:, 0], not family.separates(prediction - offset, y)
                sums = weight.sum(), mixed, weight @ terms.loss[:, 0], score.sum()
                # Other threads wait for a matmul whose result is small, but not for a dot.
                return np.concatenate([sums, np.dot(score.astype(x.dtype), x)])

        rows_at_once = max(256, min(_SCORED_VALUES // (1 + self._inputs + self._targets), _SCORED_ROWS))
        weight, mixed, loss, *score = self._reduced(3 + len(theta), of, rows_at_once=rows_at_once)
        _require_optimum(objective, mixed)
        gradient = np.append(0.0, l2 * theta[1:]) - np.array(score) / weight
        if not objective.intercept:
            gradient[0] = 0.0
        return loss / weight + l2 / 2 * float(np.square(theta[1:]).sum()), gradient

    def _null_prediction(self, objective: Objective, mean: float) -> float:
        """The b of a model without features; `mean` is that of the values of the target."""
        if self._offset is None or not self._inputs:
            return objective.family.link(mean)
        rows = WithOffset(self._given[0], self._offset, with_features=False, skipped=self._skipped)
        alone = GeneralizedLinearModels(rows, *self._given[1:])
        with alone._sampling(self._every):
            return float(alone.newton(objective.family, target=objective.target)[0].b[0])

    def _constants(self, objective: Objective, null: float, dispersion: float, repeats: bool) -> np.ndarray:
        """(the part of the log-likelihood that no prediction changes, summed loss of the null model), [2].

        Args:
          repeats: whether a weight repeats its row; else it divides the dispersion of the row.
        """
        family = objective.family

        def of(rows: Rows) -> np.ndarray:
            _, y, weight, offset = values(rows | {"x": rows["x"][:, :0]}, objective.target)
            of_row = weight[:, None]
            constant = of_row * family.constant(y, dispersion) if repeats else family.constant(y, dispersion / of_row)
            return np.append(constant.sum(), weight @ family.terms(null + offset, y).loss)

        return self._reduced(2, of)


def _unit_hessian(objective: Objective, at: Point) -> tuple[np.ndarray, bool]:
    """(parameters [1 + d, m] for which the Hessian at a point is the identity, `centred` as of `_null_model`)."""
    fit, sums = at.detail
    along, kept = fit.along, fit.inverse.kept
    found = np.zeros((1 + len(fit.w), along.shape[1]))
    found[[*[0] * objective.intercept, *(1 + kept)]] = along * np.sqrt(sums.weight)
    return found, bool((np.abs(fit.triangle.means[kept]) <= _CENTRED * objective.spread[kept]).all())


def _is_determined(fit: Fit, spread: np.ndarray) -> bool:
    """Whether the information in each feature, beside others, is not tiny in comparison with that at other points.

    If it is, the point may be at rest by rounding alone, far from where it began, and there may be no optimum.

    Args:
      spread: as in `Objective`.
    """
    lengths = np.abs(np.diagonal(fit.inverse.r)) * fit.inverse.lengths / np.sqrt(fit.triangle.weight)
    return bool((lengths > _DETERMINED * spread[fit.inverse.kept]).all())


def _require_weight(weight: float) -> None:
    if not weight > 0:
        raise _WeightlessError("there is no row with a weight to fit; give one row at least a weight")


def _require_optimum(objective: Objective, mixed: float) -> None:
    """Refuses a model that separates all rows: the larger its weights, the less its loss (Albert and Anderson 1984)."""
    if mixed == 0 and not (objective.l1 or objective.l2):
        raise _SeparatedError(
            "no optimum: the features separate the targets, so that the loss decreases as the weights grow; give a "
            f"penalty, such as {spell('l2', 0.001)}"
        )
