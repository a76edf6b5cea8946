"""Exact solutions of linear models over all shards, devices and processes."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from dpreg.config import Config
from dpreg.config.model import GLM_LOSSES
from dpreg.data.sources import Rows
from dpreg.errors import InputError, NoOptimumError
from dpreg.solvers import elastic_net, robust, sandwich, softmax
from dpreg.solvers.basis import Basis
from dpreg.solvers.blas import one_blas_thread
from dpreg.solvers.factors import Factors
from dpreg.solvers.fit import Fit
from dpreg.solvers.glm import FAR, Family, family_of, infinite_levels, slopes_of_shape
from dpreg.solvers.groups import assign_folds
from dpreg.solvers.newton import Point, minimum
from dpreg.solvers.offset import WithOffset, values
from dpreg.solvers.solution import Solution
from dpreg.solvers.tsqr import RFactor
from dpreg.spelling import spell

_LEAST_ALPHA, _ALPHA_AT_REST, _MOST_ALPHAS = 1e-8, 1e-10, 50  # of negative binomial models


class Solver(Factors):
    """Solves linear models on all rows of a source, to the same bits on any number of devices and processes.

    Args:
      source, mesh, num_shards, heartbeat: see `Passes`; offset, levels: see `Factors`. The offset is no feature of a
        `Fit`, but one of a `Solution`.
    """

    def solve(self, config: Config) -> Solution:
        """The least mean loss of a linear model, with the loss, the penalty and the intercept of the config.

        Raises:
          InputError: for what has no such solver, or no optimum.
        """
        if not config.has_exact_solution:
            raise InputError(f"{spell('loss', config.loss)}: such a model has no exact solution; see {spell('solver')}")
        with one_blas_thread():
            if config.loss == "negative_binomial" and config.negative_binomial_alpha is None:
                config = dataclasses.replace(config, negative_binomial_alpha=(alpha := self._alpha(config)))
                solution = self._solve(config)._replace(alpha=alpha)
            else:
                solution = self._solve(config)
        if (at := self._offset) is None:
            return solution
        infinite = tuple(feature + (feature >= at) for feature in solution.infinite)
        fit = solution.fit and solution.fit.with_offset(at)
        return solution._replace(w=np.insert(solution.w, at, 1, axis=0), fit=fit, infinite=infinite)

    def _solve(self, config: Config) -> Solution:
        loss, l1, l2, counts = config.loss, config.l1, config.l2, config.kind_of_weights == "frequency"
        if loss == "squared":
            return self._solve_least_squares(config)
        if loss in GLM_LOSSES:
            if config.covariance is not None and self._targets > 1:
                covariance = spell("covariance", config.covariance)
                raise InputError(
                    f"{covariance}: {spell('loss', loss)} has it for one target; name one, or leave it out"
                )
            family = family_of(config)
            found = [self.newton(family, l2, config.intercept, t, counts, l1) for t in range(self._targets)]
            w, b = (np.concatenate([getattr(fit, name) for fit, _ in found], axis=-1) for name in ("w", "b"))
            fit_of_one = self._with_covariance(found[0][0], config, family) if len(found) == 1 else None
            infinite = tuple(sorted({level for fit, _ in found for level in fit.infinite}))
            return Solution(w, b, sum(each for _, each in found), fit_of_one, infinite=infinite)
        if loss == "softmax":
            return self.softmax(config.num_classes, l2)
        return self.robust(robust.slopes_of(loss, config.huber_delta, config.quantile), l2)

    def _solve_least_squares(self, config: Config) -> Solution:
        l1, l2, intercept, path = config.l1, config.l2, config.intercept, None
        if config.folds:
            triangle, *folds = self._triangles_of_folds(config.folds)
            path = elastic_net.cross_validate(triangle, folds, config.l1_ratio, intercept, self._heartbeat)
            l1, l2 = path.penalties(path.best)
        else:
            triangle = self.triangle()
        if config.kind_of_weights == "frequency":
            triangle = triangle.with_counts()
        fits = elastic_net.solve_targets(triangle, l1, l2, intercept)
        if config.precision == "float64":
            fits = self._refined(fits)
        w, b = (np.concatenate([getattr(fit, name) for fit in fits], axis=-1) for name in ("w", "b"))
        fit_of_one = self._with_covariance(fits[0], config) if len(fits) == 1 else None
        return Solution(w, b, sum(fit.loss for fit in fits), fit_of_one, path=path)

    def _triangles_of_folds(self, folds: int) -> list[RFactor]:
        if self._groups is None:
            return self.fold_triangles(elastic_net.fold_starts(folds, len(self._source), self._targets))
        elastic_net.require_folds(folds, len(np.unique(self._groups)), self._targets, "groups")
        return self.group_triangles(assign_folds(self._groups, folds))

    def sums(self, size: int, of: Callable[[Rows], np.ndarray]) -> np.ndarray:
        """[size] float64: the sums over all rows of what `of` returns for blocks of them."""
        with one_blas_thread():
            return self._reduced(size, of)

    def least_squares(
        self, l2: float = Config.l2, intercept: bool = Config.intercept, refine: bool = False, counts: bool = False
    ) -> Fit:
        """The least mean squared loss + l2 / 2 sum w^2: one pass, or two.

        Args:
          refine: whether to win back, in another pass, the digits that rounding has taken from the decomposition: of
            use where rows are float64.
          counts: whether a weight is a number of equal rows.
        """
        triangle = self.triangle()
        fit = (triangle.with_counts() if counts else triangle).solve(l2, intercept)
        return self._refined([fit])[0] if refine else fit

    def _refined(self, fits: Sequence[Fit]) -> list[Fit]:
        """The fits, of one or of all targets each, after a step of refinement in extended precision: a pass."""
        w, b = (np.concatenate([getattr(fit, name) for fit in fits], axis=-1) for name in ("w", "b"))
        w, b, means = (each.astype(np.longdouble) for each in (w, b, fits[0].means))

        def gradient(rows: Rows) -> np.ndarray:
            x, y, weight, offset = (each.astype(np.longdouble) for each in values(rows))
            left = (y - offset - x @ w - b) * weight[:, None]
            return np.concatenate([left.sum(axis=0)[None], (x - means).T @ left]).astype(np.float64).ravel()

        of_fits = np.split(self._reduced(w.size + b.size, gradient).reshape(1 + len(w), -1), len(fits), axis=1)
        return [fit.refined(own[1:], own[0]) for fit, own in zip(fits, of_fits, strict=True)]

    def newton(
        self,
        family: Family,
        l2: float = Config.l2,
        intercept: bool = Config.intercept,
        target: int = 0,
        counts: bool = False,
        l1: float = Config.l1,
    ) -> tuple[Fit, float]:
        """(the linear model of least mean loss + l1 sum |w| + l2 / 2 sum w^2, that mean loss), by Newton's method.

        Each step is a pass, and a problem of least squares; with l1 an elastic net (Lee, Sun and Saunders 2014).

        Without a penalty, a level of a category whose targets are all alike, such as 0, may have no finite weight. The
        loss of its rows then tends to its least value, 0, as the weight grows, whatever the other weights are. Those
        are the optimum for the other rows, and the level gets a weight of `FAR`.

        Args:
          target: the number of the target, from 0.
          counts: whether a weight is a number of equal rows; else of several with one mean.

        Raises:
          InputError: when there is no optimum, such as for classes that a plane separates.
        """
        levels = self._levels.features if self._levels and not (l1 or l2) else ()
        infinite = infinite_levels(family, levels, target, self._reduced)
        if not infinite:
            return self._newton(family, l2, intercept, target, counts, l1)
        total = self._sum_weights()
        with self._skipping(infinite):
            share = self._sum_weights() / total
            if not share:
                raise NoOptimumError(
                    "no optimum: each row has a level of a category whose targets are all alike; give some "
                    f"{spell('l2', 0.001)}"
                )
            fit, loss = self._newton(family, l2, intercept, target, counts, l1)
        w = fit.w.copy()
        w[list(infinite), 0] = [sign * FAR for sign in infinite.values()]
        return dataclasses.replace(fit, w=w, infinite=tuple(infinite)), loss * share

    def _newton(
        self, family: Family, l2: float, intercept: bool, target: int, counts: bool, l1: float
    ) -> tuple[Fit, float]:
        """The result of `newton` for the rows that are not skipped."""
        around = functools.partial(self._around, family, target, l1 > 0)
        triangle, (_, weight, _, total) = around(None)
        if not weight > 0:
            raise InputError("there is no row with a weight to fit; give one row at least a weight")
        x = triangle.below(intercept)[:, 1 : 1 + self._inputs]
        spread = np.sqrt(np.square(x).sum(axis=0) / triangle.weight)

        def solved(triangle: RFactor, start: np.ndarray | None = None) -> Fit:
            unit = weight / triangle.weight
            return elastic_net.solve(triangle, l1 * unit, l2 * unit, intercept, start)

        first = solved(triangle)

        def evaluated(theta: np.ndarray) -> Point:
            triangle, (loss, weight, pearson, _) = around(theta)
            if not np.isfinite(loss):
                return Point(np.inf, np.zeros_like(theta), 0.0, 0.0)
            fit = solved(triangle, theta[1:])
            step = np.append(fit.b, fit.w) - theta
            along = np.square(triangle.about(0.0)[:, : step.size] @ step).sum() / weight
            return Point(
                loss / weight + float(l1 * np.abs(theta[1:]).sum() + l2 / 2 * np.square(theta[1:]).sum()),
                step,
                decrement=float(along + l2 * np.square(step[1:]).sum()),
                moved=float(np.max(np.abs(step[1:]) * spread, initial=0.0)),
                detail=(fit, loss / weight, pearson),
            )

        start = np.append(first.b, first.w)
        null = self._null_prediction(family, target, total / weight) if intercept else 0.0
        theta, (*_, (fit, loss, pearson)) = minimum(evaluated, start, np.append(null, np.zeros_like(first.w)))
        if counts:
            fit = dataclasses.replace(fit, triangle=dataclasses.replace(fit.triangle, rows=weight))
        dispersion = pearson / max(fit.degrees_of_freedom, 1) if family.dispersed else 1.0
        of_dispersion = (dispersion or 1.0, counts or not family.dispersed)
        log_likelihood, of_null = self._likelihoods(family, target, theta, null, *of_dispersion)
        return dataclasses.replace(
            fit,
            l1=l1,
            l2=l2,
            dispersion=dispersion,
            known_variance=not family.dispersed,
            deviance=2 * loss * weight,
            null_deviance=2 * of_null if intercept else None,
            log_likelihood=log_likelihood,
        ), loss

    def _null_prediction(self, family: Family, target: int, mean: float) -> float:
        """The b of a model without features for a target; `mean` is that of its values."""
        if self._offset is None or not self._inputs:
            return family.link(mean)
        rows = WithOffset(self._given[0], self._offset, with_features=False, skipped=self._skipped)
        return float(Solver(rows, *self._given[1:]).newton(family, target=target)[0].b[0])

    def _likelihoods(
        self, family: Family, target: int, theta: np.ndarray, null: float, dispersion: float, repeats: bool
    ) -> np.ndarray:
        """(log-likelihood of b and w [1 + d], summed loss of the null model), [2].

        Args:
          repeats: whether a weight repeats its row; else it divides the dispersion of the row.
        """

        def of(rows: Rows) -> np.ndarray:
            x, y, weight, offset = values(rows, target)
            prediction, of_row = x @ theta[1:, None] + theta[0] + offset, weight[:, None]
            if repeats:
                of_rows = of_row * family.log_likelihood(prediction, y, dispersion)
            else:
                of_rows = family.log_likelihood(prediction, y, dispersion / of_row)
            of_null = of_row * family.loss(null + offset, y)
            return np.asarray(np.concatenate([of_rows, of_null], axis=1).sum(axis=0))

        return self._reduced(2, of)

    def _with_covariance(self, fit: Fit, config: Config, family: Family | None = None) -> Fit:
        """The fit with the covariance of its parameters that the config asks for, which takes another pass."""
        kind, counts = config.covariance_type, config.kind_of_weights == "frequency"
        if kind == "classic":
            return fit

        def reduce(size: int, of: Callable[[Rows], np.ndarray]) -> np.ndarray:
            return self._reduced(size, of, rows_at_once=self._rows_at_once(size))

        with self._skipping(fit.infinite):
            return dataclasses.replace(
                fit, sandwich=sandwich.estimate(kind, fit, family, counts, self._num_groups, reduce)
            )

    def _alpha(self, config: Config) -> float:
        """The most likely alpha of a negative binomial model, in turns with its coefficients (Lawless 1987).

        Raises:
          InputError: when there are several targets, or counts vary no more than those of Poisson.
        """
        if self._targets > 1:
            raise InputError(
                f"{spell('loss', config.loss)}: several targets may differ in alpha; give one target, or "
                f"{spell('negative_binomial_alpha')}"
            )
        alpha = 1.0
        for _ in range(_MOST_ALPHAS):
            family = family_of(dataclasses.replace(config, negative_binomial_alpha=alpha))
            fit, _ = self.newton(family, config.l2, config.intercept, l1=config.l1)
            before = alpha
            for _ in range(_MOST_ALPHAS):

                def slopes(rows: Rows, fit: Fit = fit, alpha: float = alpha) -> np.ndarray:
                    x, y, weight, offset = values(rows)
                    return np.asarray(weight @ slopes_of_shape(x @ fit.w + fit.b + offset, y, alpha))

                with self._skipping(fit.infinite):
                    slope, curvature = self._reduced(2, slopes)
                step = slope / -curvature if curvature < 0 else np.sign(slope)
                alpha *= float(np.exp(-np.clip(step, -1, 1)))
                if alpha < _LEAST_ALPHA:
                    raise InputError(
                        f"{spell('loss', config.loss)}: the targets vary no more than Poisson counts of the same "
                        f"means; use {spell('loss', 'poisson')}"
                    )
                if abs(step) < _ALPHA_AT_REST:
                    break
            if abs(np.log(alpha / before)) < _ALPHA_AT_REST:
                break
        return alpha

    def softmax(self, num_classes: int, l2: float = Config.l2) -> Solution:
        """The W [d, C] and b [C] of least mean cross-entropy of the labels + l2 / 2 sum w^2, by Newton's method.

        With a penalty, the features have mean squares of about 1.

        Raises:
          InputError: when there are several targets, or no optimum was found.
        """
        if self._targets > 1:
            raise InputError(f"labels are one target, and there are {self._targets}; give one")
        basis = self._basis(l2)

        def sums_at(theta: np.ndarray) -> np.ndarray:
            def of(rows: Rows) -> np.ndarray:
                y, weight = (rows[name].astype(np.float64) for name in ("y", "weight"))
                return softmax.sums(basis.features(rows["x"]), y, weight, theta)

            return self._reduced(2 + theta.size + theta.size**2, of)

        theta = softmax.minimum(sums_at, (1 + basis.size, num_classes), l2)
        weight, loss, *_ = sums_at(theta)
        return Solution(*basis.parameters(theta), loss / weight)

    def robust(self, slopes: robust.Slopes, l2: float = Config.l2) -> Solution:
        """The W [d, t] and b [t] of least mean loss + l2 / 2 sum w^2, of a loss with such slopes, by Newton's method.

        With a penalty, the features have mean squares of about 1.

        Raises:
          InputError: when no optimum was found.
        """
        basis = self._basis(l2)
        fit, size, found, mean_loss = basis.fit, 1 + basis.size, [], 0.0
        for target in range(self._targets):
            column = basis.triangle.about(0.0)[:, 1 + self._inputs + target]
            length = float(np.sqrt(np.square(column).sum() / basis.triangle.weight))

            def sums_at(theta: np.ndarray, width: float, target: int = target) -> np.ndarray:
                def of(rows: Rows) -> np.ndarray:
                    y, weight = (rows[name].astype(np.float64) for name in ("y", "weight"))
                    x = basis.features(rows["x"])
                    return robust.sums(x, y[:, target : target + 1], weight, theta, slopes, width)

                return self._reduced(4 + size + size**2, of)

            start = basis.theta(fit.w[:, target], fit.b[target])
            theta = robust.minimum(sums_at, start, slopes, l2, length)
            weight, smoothed, loss, *_ = sums_at(theta, slopes.width or 1.0)
            mean_loss += (smoothed if slopes.width else loss) / weight
            found.append(theta)
        return Solution(*basis.parameters(np.stack(found, axis=1)), mean_loss)

    def _basis(self, l2: float) -> Basis:
        """Features to solve for: with a penalty those there are, else uncorrelated ones of mean square 1."""
        triangle = self.triangle()
        fit = triangle.solve(l2)
        if l2:
            return Basis(fit, np.arange(self._inputs), np.eye(self._inputs))
        return Basis(fit, fit.inverse.kept, fit.inverse.root * np.sqrt(triangle.weight))

    def _around(
        self, family: Family, target: int, observed: bool, theta: np.ndarray | None
    ) -> tuple[RFactor, np.ndarray]:
        """The problem of Newton's next step from b and w [1 + d], and the sums of `Family.working`."""

        def problem(rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
            x, y, weight, offset = values(rows, target)
            prediction = family.start(y) if theta is None else x @ theta[1:, None] + theta[0] + offset
            response, information, sums = family.working(y, weight, prediction, observed)
            return x, response - offset, information, sums

        return self._factor(problem, 1, 4)
