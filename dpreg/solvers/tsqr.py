"""Exact linear least squares in float64, in one pass over the rows, by a QR decomposition of blocks.

The upper triangular factor R of the decomposition of sqrt(weight) [1, x, y] determines the squared loss of every linear
model on the rows. The factors of two sets of rows are combined by decomposing one on top of the other (Golub 1965; TSQR
of Demmel et al. 2012). No sums of squares are formed, so no digits are lost as in the normal equations.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy  # its modules are slow to import: scipy imports each when it is first used

from dpreg.config import Config
from dpreg.errors import InputError
from dpreg.solvers import tiles
from dpreg.solvers.blas import one_blas_thread
from dpreg.solvers.fit import WIDE, Fit, Inverse

_EPSILON = float(np.finfo(np.float64).eps)
_WELL_CONDITIONED = 1e-4  # the least reciprocal condition number of x'x, or of R, for which no pivoting is needed
_FAR = 8.0  # a column is centred if its mean is more than this many mean absolute deviations from 0


@dataclasses.dataclass(frozen=True)
class RFactor:
    """The R factor of rows [n, d] with targets [n, t].

    Attributes:
      r: [1 + d + t, 1 + d + t] upper triangle, float64, of columns less `origin`.
      origin: [d + t] near the means of columns of x and y that are far from 0 for how little they vary, else 0: such
        columns keep their digits.
      num_inputs: d.
      rows: those with a weight, or where weights are counts, their sum; weight: the sum of all weights.
      epsilon: of the values of x, the share of one that rounding it may have changed.
      lengths: [d] of the columns of x, before they were about another mean; None: as they are.
      left_out: whether there is an intercept -> the columns of x that `solve` leaves out where there is no penalty, as
        combinations of others; None for none.
    """

    r: np.ndarray
    origin: np.ndarray
    num_inputs: int
    rows: float
    weight: float
    epsilon: float = _EPSILON
    lengths: np.ndarray | None = None
    left_out: Callable[[bool], tuple[int, ...]] | None = None

    @classmethod
    def none(cls, num_inputs: int, num_targets: int) -> "RFactor":
        """The R factor of no rows."""
        columns = num_inputs + num_targets
        return cls(np.zeros((1 + columns, 1 + columns)), np.zeros(columns), num_inputs, 0, 0.0)

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> "RFactor":
        """The R factor of rows: x [n, d], y [n, t] and weight [n]."""
        weight, columns = weight.astype(np.float64), np.concatenate([x, y], axis=1).astype(np.float64, copy=False)
        total = float(weight.sum())
        mean = np.einsum("i,ij->j", weight, columns) / (total or 1.0)
        if len(columns):  # centring a constant column must give exactly 0
            mean = np.where((columns == columns[0]).all(axis=0), columns[0], mean)
        distance = np.einsum("i,ij->j", weight, np.abs(columns - mean)) / (total or 1.0)
        # For such columns almost every value is within a factor 2 of the mean, where a difference is exact.
        origin = np.where(np.abs(mean) > _FAR * distance, mean, 0.0)
        root = np.sqrt(weight)[:, None]
        whole = np.concatenate([root, root * (columns - origin)], axis=1)
        whole = np.concatenate([whole, np.zeros((max(0, whole.shape[1] - len(whole)), whole.shape[1]))])
        return cls(_upper(whole), origin, x.shape[1], int((weight > 0).sum()), total)

    def packed(self) -> np.ndarray:
        """This factor as one vector of float64."""
        return np.concatenate([self.r.ravel(), self.origin, [self.rows, self.weight]])

    @classmethod
    def unpacked(cls, packed: np.ndarray, num_inputs: int, num_targets: int, epsilon: float = _EPSILON) -> "RFactor":
        """The factor that `packed` made a vector of."""
        size = 1 + num_inputs + num_targets
        r, origin = packed[: size**2].reshape(size, size), packed[size**2 : -2]
        return cls(r, origin, num_inputs, int(packed[-2]), float(packed[-1]), epsilon)

    def __add__(self, other: "RFactor") -> "RFactor":
        """The R factor of the rows of both."""
        if not (self.weight and other.weight):
            return self if self.weight else other
        origin = np.where(other.origin != 0, self.origin, 0.0)  # keep an origin only if both have one
        r = _upper(np.concatenate([self.about(origin), other.about(origin)]))
        epsilon = max(self.epsilon, other.epsilon)
        return RFactor(r, origin, self.num_inputs, self.rows + other.rows, self.weight + other.weight, epsilon)

    def about(self, origin: np.ndarray | float) -> np.ndarray:
        """The matrix `r` for columns less another origin [d + t]."""
        r = self.r.copy()
        r[0, 1:] += r[0, 0] * (self.origin - origin)
        return r

    def below(self, intercept: bool) -> np.ndarray:
        """The rows of `r` that determine w: those of centred columns with an intercept, else of columns about 0."""
        return self.r[1:] if intercept else self.about(0.0)

    def with_counts(self) -> "RFactor":
        """The same R where the weights of rows are numbers of equal rows."""
        return dataclasses.replace(self, rows=self.weight)

    @property
    def means(self) -> np.ndarray:
        """The weighted means of the columns of x and y, [d + t]."""
        means: np.ndarray = self.r[0, 1:] / self.r[0, 0] + self.origin
        return means

    def intercept(self, w: np.ndarray) -> np.ndarray:
        """The b [t] of least loss for w [d, t]."""
        d, own = self.num_inputs, self.r[0, 1:] / self.r[0, 0]
        best: np.ndarray = (own[d:] - own[:d] @ w) + (self.origin[d:] - self.origin[:d] @ w)
        return best

    def in_units(self, mean: np.ndarray, scale: np.ndarray) -> "RFactor":
        """The R factor of the columns of x and y times `scale` plus `mean`, both [d + t]."""
        return self._scaled(scale, self.origin * scale + mean)

    def standardized(self, mean: np.ndarray, scale: np.ndarray) -> "RFactor":
        """The R factor of the columns of x and y less `mean`, over `scale`, both [d + t]."""
        return self._scaled(1 / scale, (self.origin - mean) / scale)

    def _scaled(self, factor: np.ndarray, origin: np.ndarray) -> "RFactor":
        r = self.r * np.concatenate([[1.0], factor])
        return dataclasses.replace(self, r=r, origin=origin, lengths=self._lengths * np.abs(factor[: self.num_inputs]))

    @property
    def _lengths(self) -> np.ndarray:
        return _lengths_of(self.about(0.0)[:, 1 : 1 + self.num_inputs]) if self.lengths is None else self.lengths

    def squares(self, w: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The sums of weight (x w + b - y)^2 for w [d, t] and b [t]: [t]. For one target, w may be many: [d, s]."""
        t = len(self.origin) - self.num_inputs
        about_means = self.r[1:, 1:] @ np.concatenate([w, -np.resize(np.eye(t), (t, w.shape[1]))])
        squares: np.ndarray = np.square(about_means).sum(axis=0) + np.square(self.r[0, 0] * (b - self.intercept(w)))
        return squares

    def loss(self, w: np.ndarray, b: np.ndarray) -> float:
        """The mean squared loss: half of `squares`, over the sum of weights."""
        return float(self.squares(w, b).sum() / 2 / self.weight)

    def rounding(self, intercept: bool) -> np.ndarray:
        """The length of the rounding errors of each column of x, in its values and in the decomposition, [d].

        A column that is no longer is constant; what is no longer of it beside other columns is their combination.
        """
        below, whole = (part[:, 1 : 1 + self.num_inputs] for part in (self.below(intercept), self.r))
        spread = _lengths_of(below)
        decomposed = _lengths_of(whole) if intercept else spread
        # At most a quarter of a column's variation counts as rounding, even if it is of one unit in the last place.
        of_values = np.minimum(2 * self.epsilon * self._lengths, spread / 4)
        rounding: np.ndarray = np.maximum(of_values, max(10, len(self.r)) * _EPSILON * decomposed)
        return rounding

    def solve(self, l2: float = Config.l2, intercept: bool = Config.intercept) -> Fit:
        """The least mean squared loss + l2 / 2 sum w^2, with a free b, or with b = 0.

        A column that is, to rounding, a combination of those that matter more, or constant, gets the weight 0.

        Raises:
          InputError: when no row has a weight.
        """
        if not self.weight > 0:
            raise InputError("there is no row with a weight to fit; give one row at least a weight")
        d, rest = self.num_inputs, self.below(intercept)
        x, y = rest[:, 1 : 1 + d], rest[:, 1 + d :]
        spread, rounding = _lengths_of(x), self.rounding(intercept)
        left_out = () if l2 or self.left_out is None else self.left_out(intercept)
        kept = np.setdiff1d(np.flatnonzero(spread > rounding), left_out)
        with one_blas_thread():
            scaled = (x if len(kept) == d else x[:, kept]) / spread[kept]
            problem = scaled, y, np.sqrt(l2 * self.weight) / spread[kept]
            found = _decompose_wide(*problem) if len(kept) > WIDE else None
            order, r, targets = found or _decompose(*problem, rounding[kept] / spread[kept])
            kept, w = kept[order], np.zeros((d, y.shape[1]))
            w[kept] = scipy.linalg.solve_triangular(r, targets, check_finite=False) / spread[kept, None]
        fit = self.make_fit(w, Inverse(kept, r, spread[kept]), l2, intercept)
        return dataclasses.replace(fit, left_out=left_out)

    def make_fit(self, w: np.ndarray, inverse: Inverse, l2: float, intercept: bool, l1: float = Config.l1) -> Fit:
        """The fit of weights w [d, t] that are 0 but for the columns `inverse.kept`, with its b."""
        b, kept = self.intercept(w) if intercept else np.zeros(w.shape[1]), tuple(np.sort(inverse.kept).tolist())
        return Fit(self, w, b, kept, l2, intercept, inverse, l1)


def _decompose(
    x: np.ndarray, y: np.ndarray, ridge: np.ndarray, rounding: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A QR decomposition with pivoting of the independent columns of x over diag(ridge), whose targets are 0.

    Args:
      x: [n, d] of columns of length 1; y: [n, t]; ridge: [d].
      rounding: [d] a column is independent if its distance from the combinations of those before it is longer.

    Returns:
      (the numbers of the columns in their order [k], R [k, k], Q'y [k, t]).
    """
    kept = np.arange(x.shape[1])
    if ridge.any():
        x = np.concatenate([x, np.diag(ridge)])
        y = np.concatenate([y, np.zeros((len(ridge), y.shape[1]))])
    while True:
        q, r, order = scipy.linalg.qr(x[:, kept], mode="economic", pivoting=True)
        diagonal = np.concatenate([np.abs(np.diag(r)), np.zeros(max(0, len(kept) - len(r)))])
        own = diagonal > rounding[kept[order]]
        if own.all():
            return kept[order], r, q.T @ y
        kept = np.sort(kept[order[own]])


def _decompose_wide(
    x: np.ndarray, y: np.ndarray, ridge: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """As `_decompose`, of all columns without pivoting, by a Cholesky decomposition; None if that is too inexact."""
    lapack, d = scipy.linalg.lapack, x.shape[1]
    # Of R, LAPACK is given the transpose, a lower triangle whose values it takes without a copy.
    if not ridge.any() and len(x) >= d and not scipy.linalg.bandwidth(x)[0]:  # x is R already, without products
        r, targets = x[:d], y[:d]
        reciprocal = float(lapack.dtrcon(r.T, norm="I", uplo="L")[0])
    else:
        gram = tiles.gram(x)
        gram[np.diag_indices_from(gram)] += np.square(ridge)
        size = tiles.norm(gram)
        if not tiles.cholesky(gram):
            return None
        r, reciprocal = gram, float(lapack.dpocon(gram.T, size, uplo="L")[0])
        targets = np.asarray(scipy.linalg.solve_triangular(r, x.T @ y, trans="T", check_finite=False))
    return (np.arange(d), r, targets) if reciprocal > _WELL_CONDITIONED else None


def _lengths_of(columns: np.ndarray) -> np.ndarray:
    lengths: np.ndarray = np.sqrt(np.einsum("ij,ij->j", columns, columns))
    return lengths


def _upper(rows: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.qr(rows, "r"))
