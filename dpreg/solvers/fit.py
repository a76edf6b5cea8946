"""An exact linear fit: its parameters, and the covariance of their errors."""

import dataclasses
import functools
from typing import TYPE_CHECKING

import numpy as np
import scipy

from dpreg.config import Config
from dpreg.solvers import tiles
from dpreg.solvers.blas import one_blas_thread
from dpreg.solvers.sandwich import Sandwich

if TYPE_CHECKING:
    from dpreg.solvers.tsqr import RFactor

_EPSILON = float(np.finfo(np.float64).eps)
WIDE = 256  # for more columns decompositions with pivoting, or of singular values, are slow


@dataclasses.dataclass(frozen=True)
class Inverse:
    """The inverse of x'x, and of a penalty, for some of the columns of x.

    The columns are centred if there is an intercept.

    Attributes:
      kept: [k] the numbers of the columns, in the order of `r`.
      r: [k, k] upper triangle: R'R is that matrix for columns of length 1.
      lengths: [k] of the columns.
    """

    kept: np.ndarray
    r: np.ndarray
    lengths: np.ndarray

    def times(self, columns: np.ndarray) -> np.ndarray:
        """The inverse times columns [k, p]."""
        scaled = scipy.linalg.solve_triangular(self.r, columns / self.lengths[:, None], trans="T")
        return np.asarray(scipy.linalg.solve_triangular(self.r, scaled) / self.lengths[:, None])

    @functools.cached_property
    def root(self) -> np.ndarray:
        """[k, k] whose product with its transpose is the inverse. It costs as much as R, and only errors need it."""
        with one_blas_thread():
            return np.asarray(tiles.inverse(self.r) / self.lengths[:, None])


@dataclasses.dataclass(frozen=True)
class Fit:
    """An exact linear fit.

    Attributes:
      triangle: of the rows.
      w, b: [d, t] and [t] float64.
      kept: the columns of x that the fit uses; the others are combinations of them, or constant, and have weight 0.
      l1, l2: the penalties. With l1, which has one target, weights that it makes 0 are not `kept`.
      intercept: whether b was free; else it is 0.
      left_out: the columns of x that were left out on purpose, such as base levels.
      given: the columns whose w was given, an offset's.
      infinite: the columns whose best w is not finite; their w is far from 0, and the fit is without their rows.
      dispersion: the variance of a row of weight 1; None if it is that of the residuals.
      known_variance: whether the dispersion is known; else it is estimated.
      deviance, null_deviance, log_likelihood: of a generalised linear model, see `dpreg.solvers.inference.Summary`.
      sandwich: for the errors of the parameters; None where all rows have errors of one variance.
    """

    triangle: "RFactor"
    w: np.ndarray
    b: np.ndarray
    kept: tuple[int, ...]
    l2: float
    intercept: bool
    inverse: Inverse
    l1: float = Config.l1
    left_out: tuple[int, ...] = ()
    infinite: tuple[int, ...] = ()
    given: tuple[int, ...] = ()
    dispersion: float | None = None
    known_variance: bool = False
    deviance: float | None = None
    null_deviance: float | None = None
    log_likelihood: float | None = None
    sandwich: Sandwich | None = None

    def with_offset(self, column: int) -> "Fit":
        """The fit of rows with one more column of x, whose w is 1.

        Its column of the triangle is 0, since the targets of this fit are less the offset.
        """
        triangle, at = self.triangle, 1 + column
        r = np.insert(np.insert(triangle.r, at, 0, axis=0), at, 0, axis=1)
        lengths = None if triangle.lengths is None else np.insert(triangle.lengths, column, 0)
        origin = np.insert(triangle.origin, column, 0)

        def moved(columns: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(each + (each >= column) for each in columns)

        return dataclasses.replace(
            self,
            triangle=dataclasses.replace(
                triangle, r=r, origin=origin, num_inputs=triangle.num_inputs + 1, lengths=lengths
            ),
            w=np.insert(self.w, column, 1, axis=0),
            kept=moved(self.kept),
            inverse=dataclasses.replace(self.inverse, kept=self.inverse.kept + (self.inverse.kept >= column)),
            left_out=moved(self.left_out),
            infinite=moved(self.infinite),
            given=(column,),
        )

    def refined(self, of_w: np.ndarray, of_b: np.ndarray) -> "Fit":
        """The fit after one step of iterative refinement, which corrects most of the rounding errors.

        Args:
          of_w: [d, t] the sum over rows of weight (x - `means`) (y - x w - b), in more digits than the fit has.
          of_b: [t] that of weight (y - x w - b).
        """
        gradient = of_w - self.triangle.weight * (self.l1 * np.sign(self.w) + self.l2 * self.w)
        step, kept = np.zeros_like(self.w), self.inverse.kept
        step[kept] = self.inverse.times(gradient[kept])
        more = of_b / self.triangle.weight * self.intercept - self.means @ step
        return dataclasses.replace(self, w=self.w + step, b=self.b + more)

    def in_units(self, mean: np.ndarray, scale: np.ndarray) -> "Fit":
        """The fit of the columns of x and y times `scale` plus `mean`, both [d + t]; the penalty is not rescaled."""
        d = len(self.w)
        w = self.w / scale[:d, None] * scale[d:]
        inverse = dataclasses.replace(self.inverse, lengths=self.inverse.lengths * scale[self.inverse.kept])
        triangle, sandwich = self.triangle.in_units(mean, scale), self.sandwich
        if sandwich is not None:
            sandwich = sandwich._replace(scores=sandwich.scores * np.square(scale[d:])[:, None, None])
        if self.intercept:  # without adding to b, which may be large
            b = triangle.intercept(w) + (self.b - self.triangle.intercept(self.w)) * scale[d:]
        else:
            b = self.b * scale[d:] + mean[d:] - mean[:d] @ w
        return dataclasses.replace(self, triangle=triangle, w=w, b=b, inverse=inverse, sandwich=sandwich)

    @property
    def means(self) -> np.ndarray:
        """The means of the columns of x, [d]; zeros without an intercept."""
        return self.triangle.means[: len(self.w)] * self.intercept

    @property
    def loss(self) -> float:
        """The mean squared loss, without the penalty."""
        return self.triangle.loss(self.w, self.b)

    def shortest(self) -> tuple[np.ndarray, np.ndarray]:
        """The w [d, t] of least norm with the same predictions, and its b [t]: equal columns share their weight."""
        w = self.w if self.is_penalized else self.shared(self.w)
        return w, self.b + self.means @ (self.w - w)

    def shared(self, w: np.ndarray) -> np.ndarray:
        """The weights [d, p] of the least norm, in the units of the columns, that predict what w [d, p] does.

        Args:
          w: 0 but for the columns `kept`.
        """
        x, kept = self.triangle.below(self.intercept)[:, 1 : 1 + len(w)], list(self.kept)
        spread, rounding = np.sqrt(np.square(x).sum(axis=0)), self.triangle.rounding(self.intercept)
        others = np.setdiff1d(np.flatnonzero(spread > rounding), [*kept, *self.left_out])
        if not len(others):
            return w
        # The other columns as combinations of those kept, all of length 1; coefficients within rounding become 0.
        q, r = np.linalg.qr(x[:, kept] / spread[kept])
        inverse = scipy.linalg.solve_triangular(r, np.eye(len(kept)))
        combined = inverse @ (q.T @ (x[:, others] / spread[others]))
        uncertain = np.sqrt(np.square(inverse).sum(axis=1))[:, None] * (rounding[others] / spread[others])
        combined[np.abs(combined) <= uncertain] = 0
        combined *= spread[others] / spread[kept][:, None]
        # If the others have weights v, those kept have w - combined v. Minimise the norm of both.
        q, r = np.linalg.qr(np.concatenate([combined, np.eye(len(others))]))
        shared = np.zeros_like(w)
        shared[others] = scipy.linalg.solve_triangular(r, q[: len(kept)].T @ w[kept])
        shared[kept] = w[kept] - combined @ shared[others]
        # If columns have very different lengths, the terms of the least norm may be so large that they cancel.
        changed, size = (np.sqrt(np.square(x @ of).sum(axis=0)) for of in (shared - w, w))
        return np.where(changed <= np.sqrt(_EPSILON) * size, shared, w)

    @property
    def is_penalized(self) -> bool:
        """Whether there is a penalty: standard errors are unknown then."""
        return bool(self.l1 or self.l2)

    @property
    def degrees_of_freedom(self) -> float:
        """Rows less parameters; with l1 less those that are not 0 (Zou, Hastie and Tibshirani 2007)."""
        return self.triangle.rows - len(self.kept) - self.intercept

    @property
    def residual_deviation(self) -> np.ndarray:
        """The root of the dispersion, [t]; by default sqrt(sum of squared residuals / degrees of freedom)."""
        if self.dispersion is not None:
            return np.full(self.b.shape, np.sqrt(self.dispersion))
        return np.sqrt(self.triangle.squares(self.w, self.b) / max(self.degrees_of_freedom, 1))

    @property
    def total_squares(self) -> np.ndarray:
        """The sums of weighted squares of the targets, around their means if there is an intercept, [t]."""
        targets = self.triangle.below(self.intercept)[:, 1 + self.triangle.num_inputs :]
        return np.asarray(np.square(targets).sum(axis=0))

    @property
    def r2(self) -> np.ndarray:
        """The explained share of `total_squares`, [t]; NaN where that is 0."""
        explained: np.ndarray = 1 - self.triangle.squares(self.w, self.b) / np.where(
            self.total_squares > 0, self.total_squares, np.nan
        )
        return explained

    @property
    def along(self) -> np.ndarray:
        """[m, m]: b, where it is free, and w[`inverse.kept`] are this times uncorrelated parameters.

        The features of those are `directions`, whose weighted products sum to the identity over all rows.
        """
        root = self.inverse.root
        if not self.intercept:
            return root
        of_b = np.append(1 / self.triangle.r[0, 0], -self.means[self.inverse.kept] @ root)  # b is the mean of y - x w
        return np.vstack([of_b, np.column_stack([np.zeros(len(root)), root])])

    def directions(self, x: np.ndarray) -> np.ndarray:
        """The features [n, m] of uncorrelated parameters, of rows x [n, d]."""
        found: np.ndarray = (x[:, self.inverse.kept] - self.means[self.inverse.kept]) @ self.inverse.root
        if self.intercept:
            found = np.concatenate([np.full((len(x), 1), 1 / self.triangle.r[0, 0]), found], axis=1)
        return found

    @property
    def has_errors(self) -> bool:
        """Whether the errors of the parameters are known: without a penalty, and with degrees of freedom left."""
        return not self.is_penalized and (
            self.degrees_of_freedom >= 1 or (self.known_variance and self.sandwich is None)
        )

    def covariance(self, target: int) -> np.ndarray:
        """[m, m] of b, where it is free, and of w[`kept`], in that order."""
        with one_blas_thread():
            if self.sandwich is None:
                root = self.covariance_root(target)
                return np.asarray(root @ root.T)
            along = self._along_in_order
            return np.asarray(along @ self.sandwich.scores[target] @ along.T)

    def covariance_root(self, target: int) -> np.ndarray:
        """[m, m] whose product with its transpose is the covariance. What is computed from it keeps more digits."""
        if self.sandwich is None:
            return np.asarray(self._along_in_order * self.residual_deviation[target])
        scores = self.sandwich.scores[target]
        if not np.isfinite(scores).all():
            return np.full(scores.shape, np.nan)
        with one_blas_thread():
            values, vectors = np.linalg.eigh(scores)
            return np.asarray(self._along_in_order @ (vectors * np.sqrt(np.maximum(values, 0))))

    @property
    def _along_in_order(self) -> np.ndarray:
        order = np.argsort(self.inverse.kept)
        return self.along[[0, *(1 + order)] if self.intercept else order]

    @property
    def standard_errors(self) -> tuple[np.ndarray, np.ndarray]:
        """The standard errors of w [d, t] and b [t]; NaN for what is not fitted, and without `has_errors`."""
        w, b = np.full(self.w.shape, np.nan), np.full(self.b.shape, np.nan)
        if not self.has_errors:
            return w, b
        along = self.along
        if self.sandwich is None:
            errors = np.sqrt(np.square(along).sum(axis=1))[:, None] * self.residual_deviation
        else:
            errors = np.sqrt([((along @ scores) * along).sum(axis=1) for scores in self.sandwich.scores]).T
        if self.intercept:
            b, errors = errors[0], errors[1:]
        w[self.inverse.kept] = errors
        return w, b

    @property
    def degrees_of_test(self) -> float | None:
        """The degrees of freedom of the statistics' t distribution; None where it is normal: for a known variance."""
        if self.known_variance:
            return None
        return max(self.sandwich.degrees_of_freedom if self.sandwich else self.degrees_of_freedom, 1)

    @property
    def p_values(self) -> tuple[np.ndarray, np.ndarray]:
        """The p-values of w [d, t] and b [t] for the hypothesis that they are 0; NaN where the standard error is."""

        def p(estimate: np.ndarray, error: np.ndarray) -> np.ndarray:
            with np.errstate(divide="ignore", invalid="ignore"):
                t = -np.abs(estimate) / error
            if self.degrees_of_test is None:
                return np.asarray(2 * scipy.special.ndtr(t))
            return np.asarray(2 * scipy.special.stdtr(self.degrees_of_test, t))

        of_w, of_b = self.standard_errors
        return p(self.w, of_w), p(self.b, of_b)

    @property
    def condition_number(self) -> float:
        """The condition number of the columns used, centred (with an intercept) and scaled to one length."""
        x = self.triangle.below(self.intercept)[:, 1 : 1 + self.triangle.num_inputs][:, self.inverse.kept]
        if not self.kept:
            return 1.0
        length = np.sqrt(np.square(x).sum(axis=0))
        if len(self.kept) <= WIDE or self.l2:
            return float(np.linalg.cond(x / length))
        both = x / length, self.inverse.root * length[:, None]
        norms = (scipy.sparse.linalg.svds(a, 1, v0=np.ones(a.shape[1]), return_singular_vectors=False) for a in both)
        return float(np.prod([*norms]))
