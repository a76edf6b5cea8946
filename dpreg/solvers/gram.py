"""Linear least squares from sums of products: less exact than a QR decomposition, and several times as fast.

The Cholesky factor of these sums is the R of the QR decomposition, except for the rounding of the sums, whose effect
grows with the square of the condition number (Golub and Van Loan 2013, section 5.3). It is used only where that number
is small.
"""

import numpy as np
import scipy

from dpreg.solvers.tsqr import RFactor

_OFFSET = 1e-2  # the least share of a column's mean square that its variance may be
_SMALLEST = 1e-280  # the least sum of squares that has all its digits
_INDEPENDENT = 1e-2  # the least share of a column's variance that other columns may leave unexplained
_WELL_CONDITIONED = 1e-2  # times 1 / sqrt(d), the least reciprocal condition number of the features' products
_UNEXPLAINED = 1e-3  # the least such share of a target


def products(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The sums over rows of the products of sqrt(weight) [1, x, y], [m + m m] float64 with m = 1 + d + t.

    The first m are the number of rows with a weight, and 1 for each column that is not 0 in all rows, else 0.

    Args:
      x: [n, d]; y: [n, t]; weight: [n], the rows.
    """
    columns = np.empty((len(x), 1 + x.shape[1] + y.shape[1]))
    columns[:, 0], columns[:, 1 : 1 + x.shape[1]], columns[:, 1 + x.shape[1] :] = 1, x, y
    if not (weight == 1).all():
        columns *= np.sqrt(weight, dtype=np.float64)[:, None]
    head = np.asarray(columns.any(axis=0), np.float64)
    head[0] = np.count_nonzero(weight)
    return np.concatenate([head, (columns.T @ columns).ravel()])


def factor(sums: np.ndarray, num_inputs: int, epsilon: float) -> RFactor | None:
    """The RFactor of the rows of `products`; None where their sums do not hold enough digits of it.

    Args:
      sums: those of all rows.
      num_inputs: d.
      epsilon: as in `RFactor`.
    """
    size = int((np.sqrt(4 * len(sums) + 1) - 1) / 2 + 0.5)  # m + m m = len(sums)
    gram, rows = sums[size:].reshape(size, size), int(sums[0])
    weight, d = float(gram[0, 0]), num_inputs
    if not (weight > 0 and np.isfinite(gram).all()):
        return None
    mean, raw = gram[0, 1:] / weight, np.diagonal(gram)[1:]
    centred = gram[1:, 1:] - np.outer(mean, gram[0, 1:])
    variance = np.diagonal(centred)
    varies = sums[1:size] > 0
    if (variance[varies] < np.maximum(_OFFSET * raw[varies], _SMALLEST)).any():
        return None
    scale = np.where(varies, np.sqrt(np.maximum(variance, 0)), 1.0)
    unit = centred / np.outer(scale, scale)
    of_x, order = _cholesky(unit[:d, :d])
    rank = len(of_x)
    # What rounding the values of a combination of other columns leaves of it, as `RFactor.rounding` has it.
    if rank < d and (np.diagonal(unit)[:d] - np.square(of_x).sum(axis=0) > np.square(2 * epsilon)).any():
        return None
    independent = of_x[:, order[:rank]]
    of_y = scipy.linalg.solve_triangular(independent, unit[order[:rank], d:], trans="T") if rank else unit[:0, d:]
    rest = unit[d:, d:] - of_y.T @ of_y
    if (np.diagonal(rest)[varies[d:]] < _UNEXPLAINED).any():
        return None
    rest[np.diag_indices_from(rest)] += ~varies[d:]  # a target that is 0 in every row
    try:
        of_rest = np.linalg.cholesky(rest).T
    except np.linalg.LinAlgError:  # a target is a combination of others
        return None
    whole = np.zeros((size, size))
    whole[0] = np.concatenate([[np.sqrt(weight)], np.sqrt(weight) * mean])
    whole[1 : 1 + rank, 1:] = np.concatenate([of_x, of_y], axis=1) * scale
    whole[1 + d :, 1 + d :] = of_rest * np.where(varies[d:], scale[d:], 0.0)
    return RFactor(whole, np.zeros(size - 1), d, rows, weight, epsilon)


def _cholesky(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(R [k, d] with R'R = gram, k independent columns first and the others after them), by Cholesky decomposition.

    Args:
      gram: [d, d], with a diagonal of 1, or of 0 for columns of zeros.
    """
    d = len(gram)
    if not d:
        return gram, np.zeros(0, int)
    r, failed = scipy.linalg.lapack.dpotrf(gram)
    if not failed and scipy.linalg.lapack.dpocon(r, np.abs(gram).sum(axis=0).max())[0] > _WELL_CONDITIONED / np.sqrt(d):
        return r, np.arange(d)
    r, order, rank, _ = scipy.linalg.lapack.dpstrf(gram, tol=_INDEPENDENT)
    found = np.zeros((rank, d))
    found[:, order - 1] = np.triu(r)[:rank]
    return found, order - 1
