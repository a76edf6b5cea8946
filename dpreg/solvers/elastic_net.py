"""The elastic net in float64, from the R factor of the rows: exact solutions, their path, and its cross-validation.

The objective is the mean squared loss + l1 sum |w| + l2 / 2 sum w^2 (Zou and Hastie 2005). For fixed signs of the
weights that are not 0 it is quadratic, and a Cholesky decomposition gives its minimum. An active-set method changes
which weights are not 0, until the conditions of an optimum hold. It is the feature-sign search of Lee, Battle, Raina
and Ng (2006), in which several weights may enter at once. Each step decreases the objective, so it ends.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import scipy

from dpreg.config import Config
from dpreg.data.sampler import Sampler
from dpreg.errors import InputError, NoOptimumError
from dpreg.solvers.blas import one_blas_thread
from dpreg.solvers.fit import Fit, Inverse
from dpreg.solvers.tsqr import RFactor
from dpreg.spelling import spell

STRENGTHS = 100  # of a path, as of scikit-learn's `LassoCV`
WEAKEST = 1e-3  # the last strength of a path, as a share of the first
RIDGE_STRENGTHS = 1e3, 1e-6  # the first and the last with l1_ratio=0, in mean variances of the features
_TOLERANCE = 1e-13  # of the gradient, in lengths of a column times that of the target
_WELL_CONDITIONED = 1e-3  # the least distance of a column from others for a Cholesky decomposition of their products
_DEPENDENT = 1e-11  # a column of length 1 that is nearer than this to combinations of others is one
_LEAST_STEPS = 100  # allowed for any number of columns


def solve(
    triangle: RFactor,
    l1: float = Config.l1,
    l2: float = Config.l2,
    intercept: bool = Config.intercept,
    start: np.ndarray | None = None,
) -> Fit:
    """The least mean squared loss + l1 sum |w| + l2 / 2 sum w^2 of one target, with a free b, or with b = 0.

    With l1, `Fit.kept` are the columns whose weights are not 0.

    Args:
      triangle: of rows with one target; with l1=0 they may have several.
      start: [d] weights near the solution.

    Raises:
      InputError: when no row has a weight, or no optimum was found.
    """
    return ElasticNet(triangle, intercept).solve(l1, l2, start) if l1 else triangle.solve(l2, intercept)


def solve_targets(
    triangle: RFactor, l1: float = Config.l1, l2: float = Config.l2, intercept: bool = Config.intercept
) -> list[Fit]:
    """The fits as of `solve`: one of all targets, or with l1 one for each target."""
    if not l1:
        return [triangle.solve(l2, intercept)]
    each = (select_target(triangle, target) for target in range(len(triangle.origin) - triangle.num_inputs))
    return [solve(of_target, l1, l2, intercept) for of_target in each]


def select_target(triangle: RFactor, target: int) -> RFactor:
    """The R factor of the same rows with one of their targets, numbered from 0."""
    d = triangle.num_inputs
    columns = [*range(1 + d), 1 + d + target]
    return dataclasses.replace(triangle, r=triangle.r[:, columns], origin=triangle.origin[[*range(d), d + target]])


class ElasticNet:
    """Solves elastic nets of the same rows with one target, for any strengths; each search begins at the last solution.

    Args:
      triangle: of the rows; intercept: whether b is free.

    Raises:
      InputError: when no row has a weight.
    """

    def __init__(self, triangle: RFactor, intercept: bool = Config.intercept):
        if not triangle.weight > 0:
            raise InputError("there is no row with a weight to fit; give one row at least a weight")
        self._triangle, self._intercept, d = triangle, intercept, triangle.num_inputs
        below = triangle.below(intercept)
        spread = np.sqrt(np.square(below[:, 1 : 1 + d]).sum(axis=0))
        self._varying = np.flatnonzero(spread > triangle.rounding(intercept))
        self._spread = spread[self._varying]
        # Columns of length 1: their weights are `u`, and their penalties differ.
        self._x, self._y = below[:, 1 + self._varying] / self._spread, below[:, 1 + d]
        self._gram, self._xy = self._x.T @ self._x, self._x.T @ self._y
        self._tolerance = _TOLERANCE * float(np.linalg.norm(self._y))
        self._u = np.zeros(len(self._varying))
        self._last = np.zeros(0, int), np.zeros((0, 0)), self._u  # order, R and l2 of a Cholesky decomposition

    def solve(self, l1: float, l2: float = Config.l2, start: np.ndarray | None = None) -> Fit:
        """The fit for an l1 above 0.

        Args:
          start: [d] weights near the solution; by default the last one.

        Raises:
          InputError: when no optimum was found.
        """
        w = self.weights(l1, l2, start)
        kept = np.flatnonzero(self._u)
        _, ridge = self._penalties(l1, l2)
        r = self._factor(kept, ridge)[0] if len(kept) else np.eye(0)
        inverse = Inverse(self._varying[kept], r, self._spread[kept])
        return self._triangle.make_fit(w[:, None], inverse, l2, self._intercept, l1)

    def weights(self, l1: float, l2: float = Config.l2, start: np.ndarray | None = None) -> np.ndarray:
        """The weights [d] of `solve`."""
        u = self._u if start is None else start[self._varying] * self._spread
        self._u = self._minimum(*self._penalties(l1, l2), u)
        w = np.zeros(self._triangle.num_inputs)
        w[self._varying] = self._u / self._spread
        return w

    def _penalties(self, l1: float, l2: float) -> tuple[np.ndarray, np.ndarray]:
        weight = self._triangle.weight
        return l1 * weight / self._spread, l2 * weight / np.square(self._spread)

    def _minimum(self, l1: np.ndarray, l2: np.ndarray, u: np.ndarray) -> np.ndarray:
        """The u of least |y - x u|^2 / 2 + sum l1 |u| + sum l2 u^2 / 2, from a start u; all [k]."""
        solved = False  # whether u is the minimum for its signs and its zeros
        for number in range(_LEAST_STEPS + 10 * len(u)):
            descent = self._descent(u, l2)
            inside = np.flatnonzero(u)
            solved = solved or not len(inside)
            excess = np.abs(descent) - l1
            excess[inside] = 0
            entering = np.flatnonzero(excess > self._tolerance)
            if solved and not len(entering):
                return u
            if number and not solved:  # from here on, more weights enter only where that of their signs is a minimum
                entering = entering[:0]
            entering = entering[np.argsort(-excess[entering], kind="stable")]
            signs = np.sign(np.where(u != 0, u, descent))
            step = self._step(u, inside, entering, signs * l1, l2, solved)
            if step is None:
                return u
            u, solved = step
        raise NoOptimumError(f"no optimum was found; give another {spell('l1')}, or some {spell('l2')}")

    def _descent(self, u: np.ndarray, l2: np.ndarray) -> np.ndarray:
        """The negative gradient of the smooth part of the objective, [k]."""
        descent: np.ndarray = self._x.T @ (self._y - self._x @ u) - l2 * u
        return descent

    def _step(
        self, u: np.ndarray, inside: np.ndarray, entering: np.ndarray, l1: np.ndarray, l2: np.ndarray, solved: bool
    ) -> tuple[np.ndarray, bool] | None:
        """(the next u, whether it is the minimum for its signs); None if only rounding would change u.

        Args:
          inside: the numbers of weights that are not 0; entering: of those that may become so, the worst first.
          l1: with the signs of the weights.
          solved: as in `_minimum`.
        """
        worst = entering[:1] if solved else entering[:0]  # which certainly decreases the objective if alone
        known = self._last[0]  # its columns keep their order up to the first that is no longer inside
        known = known[np.logical_and.accumulate(np.isin(known, inside))]
        inside = np.concatenate([known, np.setdiff1d(inside, known)])
        while True:
            order = np.concatenate([inside, entering])
            r, q = self._factor(order, l2)
            wrong = np.abs(np.diagonal(r)[len(inside) :]) <= _DEPENDENT
            if wrong.any() and len(entering) == len(worst) == 1:
                return self._exchange(u, inside, int(entering[0]), l1, r)
            if not wrong.any():
                least = self._least(order, r, q, l1, l2)
                wrong = least[entering] * l1[entering] <= 0
                if not wrong.any():
                    return self._search(u, least, order, r, l1)
                if len(entering) == len(worst) == 1:
                    return None
            entering = entering[~wrong] if not wrong.all() else worst

    def _factor(self, order: np.ndarray, l2: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The upper triangle R [k, k] of x'x + diag(l2) = R'R for some columns, in that order.

        Its diagonal is the distance of each column from the combinations of those before it. If one is small, R is that
        of a QR decomposition of x over diag(sqrt(l2)), and is returned with Q.
        """
        last, r_of_last, l2_of_last = self._last
        shared = min(len(last), len(order))
        same = np.logical_and.accumulate(last[:shared] == order[:shared])
        known = int(same.sum()) if np.array_equal(l2, l2_of_last) else 0  # columns of the last decomposition
        old, new, r = order[:known], order[known:], np.zeros((len(order), len(order)))
        r[:known, :known] = r_of_last[:known, :known]
        rest, failed = self._gram[np.ix_(new, new)], 0
        rest[np.diag_indices_from(rest)] += l2[new]
        if known and len(new):
            r[:known, known:] = scipy.linalg.solve_triangular(
                r[:known, :known], self._gram[np.ix_(old, new)], trans="T"
            )
            rest -= r[:known, known:].T @ r[:known, known:]
        if len(new):
            r[known:, known:], failed = scipy.linalg.lapack.dpotrf(rest.T, overwrite_a=True)
        if failed or (np.diagonal(r) < _WELL_CONDITIONED).any():
            q, r = np.linalg.qr(np.concatenate([self._x[:, order], np.diag(np.sqrt(l2[order]))]))
            return r, q
        self._last = order, r, l2
        return r, None

    def _least(
        self, order: np.ndarray, r: np.ndarray, q: np.ndarray | None, l1: np.ndarray, l2: np.ndarray
    ) -> np.ndarray:
        """The minimum u [k] for weights of these signs, and 0 for all others, from the R and Q of their columns."""
        u = np.zeros(len(self._spread))
        if q is not None:
            penalty = scipy.linalg.solve_triangular(r, l1[order], trans="T")
            for _ in range(2):
                residual = np.concatenate([self._y - self._x @ u, -(np.sqrt(l2) * u)[order]])
                u[order] += scipy.linalg.solve_triangular(r, q.T @ residual - penalty)
            return u
        u[order] = scipy.linalg.cho_solve((r, False), (self._xy - l1)[order], check_finite=False)
        # One step of refinement gives the digits of a QR decomposition (corrected seminormal equations, Bjorck 1987).
        u[order] += scipy.linalg.cho_solve((r, False), (self._descent(u, l2) - l1)[order], check_finite=False)
        return u

    def _search(
        self, u: np.ndarray, least: np.ndarray, order: np.ndarray, r: np.ndarray, l1: np.ndarray
    ) -> tuple[np.ndarray, bool]:
        """The best of `least` and of the points on the line to it from u where a weight becomes 0."""
        step = least - u
        crossing = np.flatnonzero(u * least < 0)
        if not len(crossing):
            return least, True
        lengths = np.append(u[crossing] / (u - least)[crossing], 1.0)
        # For the signs of u the objective is a parabola with its minimum at 1; each crossed 0 adds twice its penalty.
        curvature = float(np.square(r @ step[order]).sum())
        beyond = np.maximum((u[crossing, None] + step[crossing, None] * lengths) * -np.sign(u[crossing, None]), 0)
        change = curvature * (np.square(lengths) / 2 - lengths) + 2 * np.abs(l1[crossing]) @ beyond
        best = int(np.argmin(change))
        following = u + lengths[best] * step if best < len(crossing) else least
        following[crossing[lengths[:-1] == lengths[best]]] = 0.0
        return following, False

    def _exchange(
        self, u: np.ndarray, inside: np.ndarray, entering: int, l1: np.ndarray, r: np.ndarray
    ) -> tuple[np.ndarray, bool] | None:
        """The next u where the column that enters is a combination of those inside, for one of which it is exchanged.

        The predictions remain, and the penalty decreases, until a weight inside becomes 0.
        """
        k, step = len(inside), np.zeros_like(u)
        step[entering] = np.sign(l1[entering])
        step[inside] = -step[entering] * scipy.linalg.solve_triangular(r[:k, :k], r[:k, k])
        shrinking = inside[u[inside] * step[inside] < 0]
        if not len(shrinking):
            return None
        lengths = -u[shrinking] / step[shrinking]
        first = int(np.argmin(lengths))
        following = u + lengths[first] * step
        following[shrinking[first]] = 0.0
        return following, False


@dataclasses.dataclass(frozen=True)
class Path:
    """Elastic nets of decreasing strength, and their loss on held-out folds.

    The penalty of a strength s is s (l1_ratio sum |w| + (1 - l1_ratio) / 2 sum w^2).

    Attributes:
      strengths: [s], the strongest first.
      l1_ratio: the share of l1.
      w, b: [d, s] and [s], fitted to all rows.
      fold_losses: [K, s] the mean loss of each fold, of a fit to all others.
      fold_weights: [K] the sum of the weights of each fold's rows.
    """

    strengths: np.ndarray
    l1_ratio: float
    w: np.ndarray
    b: np.ndarray
    fold_losses: np.ndarray
    fold_weights: np.ndarray

    @property
    def losses(self) -> np.ndarray:
        """The mean held-out loss of all rows, [s]."""
        return np.asarray(np.average(self.fold_losses, axis=0, weights=self.fold_weights))

    @property
    def standard_errors(self) -> np.ndarray:
        """The standard errors of `losses`, [s], from the variance between folds (Friedman et al. 2010)."""
        variance = np.average(np.square(self.fold_losses - self.losses), axis=0, weights=self.fold_weights)
        return np.asarray(np.sqrt(variance / (len(self.fold_losses) - 1)))

    @property
    def best(self) -> int:
        """The number of the strength of least held-out loss, from 0."""
        return int(np.argmin(self.losses))

    @property
    def best_within_error(self) -> int:
        """The number of the greatest strength with a loss within one standard error of the least (Breiman 1984)."""
        return int(np.argmax(self.losses <= self.losses[self.best] + self.standard_errors[self.best]))

    def penalties(self, number: int) -> tuple[float, float]:
        """L1 and l2 of a strength, by its number."""
        strength = float(self.strengths[number])
        return strength * self.l1_ratio, strength * (1 - self.l1_ratio)


def require_folds(folds: int, number: int, num_targets: int, what: str) -> None:
    """Raises InputError for more folds than there are rows or groups, and for several targets.

    Args:
      number: of rows or groups; what: "rows" or "groups".
    """
    if number < folds:
        rows = f"there are {number:,} {what} to fit"
        raise InputError(f"{spell('folds', folds)}: {rows}; use so many folds at most, or give more {what}")
    if num_targets > 1:
        one = f"it chooses one penalty for one target, and there are {num_targets}"
        raise InputError(f"{spell('folds', folds)}: {one}; give one")


def fold_starts(folds: int, num_rows: int, num_targets: int) -> list[int]:
    """The first row of each of some contiguous folds, which are divided like shards; rows of a table are shuffled.

    Raises:
      InputError: for more folds than rows, and for several targets.
    """
    require_folds(folds, num_rows, num_targets, "rows")
    starts: list[int] = Sampler(num_rows, folds, folds, shuffle=False).shard_start(np.arange(folds)).tolist()
    return starts


def cross_validate(
    whole: RFactor,
    folds: Sequence[RFactor],
    l1_ratio: float = Config.l1_ratio,
    intercept: bool = Config.intercept,
    heartbeat: Callable[[], None] = lambda: None,
) -> Path:
    """The path of elastic nets for one target, with the losses of its folds.

    Args:
      whole: of all rows.
      folds: for one fold after the other, those of the rows of all other folds, and of the rows of the fold.
      l1_ratio: the share of l1 in the penalty, from 0 to 1.
      intercept: whether b is free.
      heartbeat: called after each strength.

    Raises:
      InputError: when no feature varies with the target, or a fold or the others have no row with a weight.
    """

    def path(triangle: RFactor) -> tuple[np.ndarray, np.ndarray]:
        w = _weights(triangle, strengths, l1_ratio, intercept, heartbeat)
        return w, triangle.intercept(w) if intercept else np.zeros(len(strengths))

    losses, weights = [], []
    with one_blas_thread():
        strengths = _strengths(whole, l1_ratio, intercept)
        for number, (others, own) in enumerate(zip(folds[::2], folds[1::2], strict=True)):
            if not (others.weight > 0 and own.weight > 0):
                raise InputError(f"fold {number} or all others have no row with a weight; use other folds")
            losses.append(own.squares(*path(others)) / 2 / own.weight)
            weights.append(own.weight)
        return Path(strengths, l1_ratio, *path(whole), np.array(losses), np.array(weights))


def _strengths(triangle: RFactor, l1_ratio: float, intercept: bool) -> np.ndarray:
    """The strengths of a path, in a geometric sequence.

    The first is the least for which all weights are 0. With l1_ratio=0 there is none; it is then many times the
    features' variance.
    """
    below, d = triangle.below(intercept), triangle.num_inputs
    x, y = below[:, 1 : 1 + d], below[:, 1 + d]
    strongest = float(np.abs(x.T @ y).max(initial=0.0)) / triangle.weight
    if not strongest > 0:
        raise InputError("no feature varies with the target, so there is no penalty to choose; leave out the folds")
    if l1_ratio:
        return np.asarray(strongest / l1_ratio * np.geomspace(1, WEAKEST, STRENGTHS))
    return np.asarray(float(np.square(x).sum()) / d / triangle.weight * np.geomspace(*RIDGE_STRENGTHS, STRENGTHS))


def _weights(
    triangle: RFactor, strengths: np.ndarray, l1_ratio: float, intercept: bool, heartbeat: Callable[[], None]
) -> np.ndarray:
    """The weights of all strengths, [d, s]."""
    if l1_ratio:
        problem, found = ElasticNet(triangle, intercept), []
        for strength in strengths.tolist():
            found.append(problem.weights(strength * l1_ratio, strength * (1 - l1_ratio)))
            heartbeat()
        return np.stack(found, axis=1)
    below, d = triangle.below(intercept), triangle.num_inputs
    u, s, v = np.linalg.svd(below[:, 1 : 1 + d], full_matrices=False)
    along = (s * (u.T @ below[:, 1 + d]))[:, None] / (np.square(s)[:, None] + strengths * triangle.weight)
    return np.asarray(v.T @ along)
