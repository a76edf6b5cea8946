"""Linear least squares from sums of products: less exact than a QR decomposition, and several times as fast.

The Cholesky factor of these sums is the R of the QR decomposition, except for the rounding of the sums, whose effect
grows with the square of the condition number (Golub and Van Loan 2013, section 5.3). It is used only where that number
is small.
"""

import numpy as np
import scipy

from dpreg.solvers import blas, tiles
from dpreg.solvers.tsqr import RFactor

_OFFSET = 1e-2  # the least share of a column's mean square that its variance may be
_SMALLEST = 1e-280  # the least sum of squares that has all its digits
_INDEPENDENT = 1e-2  # the least share of a column's variance that other columns may leave unexplained
_WELL_CONDITIONED = 1e-2  # times 1 / sqrt(d), the least reciprocal condition number of the features' products
_UNEXPLAINED = 1e-3  # the least such share of a target


def size(columns: int) -> int:
    """The number of sums for 1 + d + t columns, m: those of `products`, without others."""
    return columns + tiles.packed_size(columns)


def columns_of(x: np.ndarray, targets: int) -> np.ndarray:
    """[n, 1 + d + t] float64: 1, x [n, d], and targets of any values, in `blas.scratch`."""
    columns = blas.scratch(len(x), 1 + x.shape[1] + targets)
    columns[:, 0], columns[:, 1 : 1 + x.shape[1]] = 1, x
    return columns


def products(columns: np.ndarray, weight: np.ndarray, others: np.ndarray | None = None) -> np.ndarray:
    """The sums over rows of the products of m columns times sqrt(weight), float64.

    The first m values are the number of rows with a weight, and 1 for each column that is not 0 in all rows, else 0.
    The products follow, as `tiles.unpacked` has them.

    Args:
      columns: [n, m] those of 1, x and y, which are weighted in place; weight: [n].
      others: [k] sums of something else, which are put before these.
    """
    if not (weight == 1).all():
        columns *= np.sqrt(weight, dtype=np.float64)[:, None]
    m, k = columns.shape[1], 0 if others is None else len(others)
    sums = np.empty(k + size(m))
    sums[:k], head, packed = 0 if others is None else others, sums[k : k + m], sums[k + m :]
    tiles.products(columns, packed)
    head[:] = _diagonal(packed, m) != 0
    small = head == 0  # or the squares of all values are 0, but not the values
    head[small] = columns[:, small].any(axis=0)
    head[0] = np.count_nonzero(weight)
    return sums


def _diagonal(packed: np.ndarray, columns: int) -> np.ndarray:
    return np.concatenate([np.diagonal(values) for _, values in tiles.unpacked(packed, columns)])


def factor(sums: np.ndarray, num_inputs: int, num_targets: int, epsilon: float) -> RFactor | None:
    """The RFactor of the rows of `products`; None where their sums do not hold enough digits of it.

    Args:
      sums: those of all rows, without others.
      num_inputs, num_targets: d and t.
      epsilon: as in `RFactor`.
    """
    d, m = num_inputs, 1 + num_inputs + num_targets
    head, packed = sums[:m], sums[m:]
    first = tiles.unpacked(packed, m)[0][1][0]  # the products with 1
    weight, rows = float(first[0]), int(head[0])
    if not (weight > 0 and np.isfinite(packed).all()):
        return None
    mean, raw, varies = first / weight, _diagonal(packed, m), head > 0
    variance = raw - mean * first
    varies[0] = False  # the constant
    if (variance[varies] < np.maximum(_OFFSET * raw[varies], _SMALLEST)).any():
        return None
    scale = np.where(varies, np.sqrt(np.maximum(variance, 0)), 1.0)
    whole = np.zeros((m, m))  # Large, so that all steps use its memory.
    _correlate(packed, first, mean, scale, whole)
    unit, rank = whole[1:, 1:], d
    independent: slice | np.ndarray = slice(0, d)
    of_x, of_y = unit[:d, :d], unit[:d, d:]
    if not _decompose(of_x):
        _correlate(packed, first, mean, scale, whole)
        found, independent = _decompose_with_pivots(of_x)
        rank = len(found)
        # What rounding the values of a combination of other columns leaves of it, as `RFactor.rounding` has it.
        if (np.diagonal(of_x) - np.square(found).sum(axis=0) > np.square(2 * epsilon)).any():
            return None
        of_x[:rank], of_x[rank:] = found, 0
        of_y[:rank], of_y[rank:] = of_y[independent], 0
    mean, scale, varies = mean[1:], scale[1:], varies[1:]
    if rank:
        r = of_x[:rank, independent]
        of_y[:rank] = scipy.linalg.solve_triangular(r, of_y[:rank], trans="T", check_finite=False)
    rest = unit[d:, d:]
    rest -= of_y.T @ of_y
    if (np.diagonal(rest)[varies[d:]] < _UNEXPLAINED).any():
        return None
    rest[np.diag_indices_from(rest)] += ~varies[d:]  # a target that is 0 in every row
    try:
        rest[:] = scipy.linalg.cholesky(rest, check_finite=False)
    except np.linalg.LinAlgError:  # a target is a combination of others
        return None
    whole[0] = np.sqrt(weight) * np.append(1.0, mean)
    unit[:d] *= scale
    rest *= np.where(varies[d:], scale[d:], 0.0)
    return RFactor(whole, np.zeros(m - 1), d, rows, weight, epsilon)


def _correlate(packed: np.ndarray, first: np.ndarray, mean: np.ndarray, scale: np.ndarray, unit: np.ndarray) -> None:
    """Writes the products of centred columns of length 1 to the upper triangle of `unit` [m, m].

    Args:
      packed: the products; first: [m] those with the constant, the column 0.
      mean, scale: [m] of each column.
    """
    of_tile = {own.start: values for own, values in tiles.unpacked(packed, len(first))}

    def fill(own: slice) -> None:
        after = slice(own.start, None)
        centred = of_tile[own.start] - np.outer(mean[own], first[after])
        np.divide(centred, np.outer(scale[own], scale[after]), out=unit[own, after])
        unit[own, own] = np.triu(unit[own, own])

    blas.Threads().each(fill, tiles.tiles(0, len(first)))


def _decompose(gram: np.ndarray) -> bool:
    """Writes R with R'R = gram [d, d] to `gram`, see `tiles.cholesky`; returns whether its columns are independent."""
    size, d = tiles.norm(gram), len(gram)
    if not tiles.cholesky(gram):
        return False
    # As a lower triangle, which LAPACK takes without a copy.
    reciprocal = scipy.linalg.lapack.dpocon(gram.T, size, uplo="L")[0] if d else 1.0
    return bool(reciprocal > _WELL_CONDITIONED / np.sqrt(d or 1))


def _decompose_with_pivots(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(R [k, d] with R'R = gram, the numbers of k independent columns), by Cholesky decomposition with pivoting.

    Args:
      gram: [d, d], with a diagonal of 1, or of 0 for columns of zeros; its upper triangle is read.
    """
    r, order, rank, _ = scipy.linalg.lapack.dpstrf(gram, tol=_INDEPENDENT)
    found = np.zeros((rank, len(gram)))
    found[:, order - 1] = np.triu(r)[:rank]
    return found, order[:rank] - 1
