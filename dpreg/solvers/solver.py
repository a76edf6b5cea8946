"""Exact solutions of linear models over all shards, devices and processes."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from dpreg.config import Config
from dpreg.config.model import GLM_LOSSES
from dpreg.data.sources import Rows
from dpreg.errors import InputError
from dpreg.solvers import elastic_net, robust, sandwich, softmax
from dpreg.solvers.basis import Basis
from dpreg.solvers.blas import one_blas_thread
from dpreg.solvers.fit import Fit
from dpreg.solvers.glm import Family, family_of, slopes_of_shape
from dpreg.solvers.groups import assign_folds
from dpreg.solvers.irls import GeneralizedLinearModels
from dpreg.solvers.offset import values
from dpreg.solvers.solution import Solution
from dpreg.solvers.tsqr import RFactor
from dpreg.spelling import spell

# Parameters up to which an exact solution takes seconds. A pass for sums of products costs the square of the parameters
# for each row. Squared loss takes one, a GLM one or two after passes for scores alone, and other losses several.
_WIDEST, _WIDEST_OF_OTHERS = 4096, 1024
_LEAST_ALPHA, _ALPHA_AT_REST, _MOST_ALPHAS = 1e-8, 1e-10, 50  # of negative binomial models


def widest_exact(config: Config) -> int:
    """The number of parameters up to which an exact solution is fast."""
    few_passes = config.loss == "squared" or (config.loss in GLM_LOSSES and not config.l1)
    return _WIDEST if few_passes else _WIDEST_OF_OTHERS


class Solver(GeneralizedLinearModels):
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
            fit_of_one = self.with_covariance(found[0][0], config, family) if len(found) == 1 else None
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
        fit_of_one = self.with_covariance(fits[0], config) if len(fits) == 1 else None
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

    def with_covariance(self, fit: Fit, config: Config, family: Family | None = None) -> Fit:
        """The fit with the covariance of its parameters that the config asks for, which takes another pass.

        Where rows have groups, that is by default the covariance of rows that are correlated within them.

        Args:
          fit: of the rows of this solver.
          family: of a generalised linear model; None for least squares.
        """
        kind, counts = config.covariance_type, config.kind_of_weights == "frequency"
        if self._groups is not None and config.covariance is None and not config.is_penalized:
            kind = "cluster"
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
        alpha, start = 1.0, None
        for _ in range(_MOST_ALPHAS):
            family = family_of(dataclasses.replace(config, negative_binomial_alpha=alpha))
            fit, _ = self.newton(family, config.l2, config.intercept, l1=config.l1, start=start)
            before, start = alpha, np.append(fit.b, fit.w)
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
