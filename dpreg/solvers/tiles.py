"""Products, Cholesky factors and inverses of large matrices, by tiles that several threads compute.

The tiles depend on the size of a matrix alone, and one thread computes each of them, so that the bits do not depend on
the number of threads (Buttari, Langou, Kurzak and Dongarra 2009). A matrix of one tile is computed as a whole. Where
linear algebra uses several threads, call these functions within `one_blas_thread`.
"""

import numpy as np
import scipy

from dpreg.solvers import blas

_TILE = 256  # rows and columns of a tile


def tiles(start: int, stop: int) -> list[slice]:
    """The tiles of the rows, or the columns, from `start` to `stop`."""
    return [slice(first, min(first + _TILE, stop)) for first in range(start, stop, _TILE)]


def packed_size(size: int) -> int:
    """The number of values that `unpacked` takes for a matrix [size, size]."""
    return sum((own.stop - own.start) * (size - own.start) for own in tiles(0, size))


def unpacked(packed: np.ndarray, size: int) -> list[tuple[slice, np.ndarray]]:
    """The tiles on and above the diagonal of a symmetric matrix [size, size], which are packed into one vector.

    Returns:
      for each tile of rows: (the rows, their values from the column `rows.start` on), as views.
    """
    found, first = [], 0
    for own in tiles(0, size):
        shape = own.stop - own.start, size - own.start
        found.append((own, packed[first : first + shape[0] * shape[1]].reshape(shape)))
        first += shape[0] * shape[1]
    return found


def products(x: np.ndarray, packed: np.ndarray) -> None:
    """Writes x'x to `packed`, see `unpacked`, for x [n, d] float64, on the calling thread."""
    for own, values in unpacked(packed, x.shape[1]):
        _multiply(x, own, values)


def gram(x: np.ndarray) -> np.ndarray:
    """The tiles on and above the diagonal of x'x [d, d], for x [n, d] float64; the others are 0."""
    found = np.zeros((x.shape[1], x.shape[1]))
    blas.Threads().each(lambda own: _multiply(x, own, found[own, own.start :]), tiles(0, len(found)))
    return found


def _multiply(x: np.ndarray, own: slice, values: np.ndarray) -> None:
    """Writes the rows `own` of x'x, from the diagonal on, to `values`."""
    left, width = x[:, own].T, own.stop - own.start
    np.matmul(left, x[:, own], out=values[:, :width])  # symmetric, so that it costs half of what others do
    np.matmul(left, x[:, own.stop :], out=values[:, width:])


def cholesky(gram: np.ndarray) -> bool:
    """Writes the upper triangle R with R'R = gram [d, d] float64 to `gram`. Tiles below its diagonal are not read.

    Returns:
      whether the matrix is positive definite; if not, its values are lost.
    """
    threads = blas.Threads()
    return all(_eliminate(own, gram, threads) for own in tiles(0, len(gram)))


def _eliminate(own: slice, r: np.ndarray, threads: blas.Threads) -> bool:
    """One step of `cholesky`: writes the rows `own` of R, and below them what is left of the matrix.

    Returns:
      whether that is possible.
    """
    diagonal, failed = scipy.linalg.lapack.dpotrf(r[own, own])
    if failed:
        return False
    left = scipy.linalg.lapack.dtrtri(diagonal)[0].T
    r[own, own] = diagonal

    def finish(columns: slice) -> None:
        r[own, columns] = left @ r[own, columns]

    def update(rows: slice) -> None:
        r[rows, rows.start :] -= r[own, rows].T @ r[own, rows.start :]

    for work in (finish, update):
        threads.each(work, tiles(own.stop, len(r)))
    return True


def inverse(r: np.ndarray) -> np.ndarray:
    """The inverse of an upper triangle [d, d] float64 without a 0 on its diagonal."""
    found, threads = np.zeros(r.shape), blas.Threads()
    for own in tiles(0, len(r)):
        _fill_columns(own, r, found, threads)
    return found


def _fill_columns(own: slice, r: np.ndarray, found: np.ndarray, threads: blas.Threads) -> None:
    """One step of `inverse`: writes the columns `own` of it to `found`, which has those before them."""
    found[own, own] = diagonal = scipy.linalg.lapack.dtrtri(r[own, own])[0]

    def fill(rows: slice) -> None:
        between = slice(rows.start, own.start)
        found[rows, own] = found[rows, between] @ r[between, own] @ -diagonal

    threads.each(fill, tiles(0, own.start))


def norm(gram: np.ndarray) -> float:
    """The largest sum of absolute values of a column of a symmetric matrix, of which the upper triangle is read."""
    sums = np.zeros(len(gram))
    for own in tiles(0, len(gram)):
        sizes = np.triu(np.abs(gram[own, own.start :]))
        sums[own.start :] += sizes.sum(axis=0)
        sums[own] += sizes.sum(axis=1) - np.diagonal(sizes)
    return float(sums.max(initial=0.0))
