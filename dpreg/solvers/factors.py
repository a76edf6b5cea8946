"""The R factors of problems of least squares over all rows."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from dpreg.data.sources import Rows, Source
from dpreg.solvers.blas import one_blas_thread
from dpreg.solvers.groups import WithGroups
from dpreg.solvers.offset import WithOffset, values
from dpreg.solvers.passes import Passes
from dpreg.solvers.reductions import Problem, Reduction, decompose, factor_folds, split_folds, sum_products
from dpreg.solvers.tsqr import RFactor
from dpreg.tables.levels import BaseLevels


class Factors(Passes):
    """Passes over all rows that give R factors.

    Args:
      source, mesh, num_shards, heartbeat: see `Passes`.
      offset: the number of a column of x whose weight is 1, for squared loss and those of `FAMILIES`; or None.
      levels: the base levels of categories, which get no weight where there is no penalty; of the features without the
        offset.
      groups: [n] the number of the group of each row, from 0; or None.
    """

    def __init__(
        self,
        source: Source,
        mesh: Mesh,
        num_shards: int,
        heartbeat: Callable[[], None] = lambda: None,
        offset: int | None = None,
        levels: BaseLevels | None = None,
        groups: np.ndarray | None = None,
    ):
        self._given, self._offset = (source, mesh, num_shards, heartbeat), offset
        self._groups, self._num_groups = groups, 0
        if groups is not None:
            self._num_groups, source = int(groups.max()) + 1, WithGroups(source, groups)
        super().__init__(source if offset is None else WithOffset(source, offset), mesh, num_shards, heartbeat)
        self._careful = False  # once sums of products did not hold enough digits
        self._levels = levels

    def triangle(self) -> RFactor:
        """The R of all rows: one pass where sums of products hold enough digits of it, else two."""
        with one_blas_thread():
            return self._factor(self._least_squares_problem, self._targets)[0]

    def _least_squares_problem(self, rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        y = rows["y"] if self._offset is None else rows["y"].astype(np.float64) - values(rows)[3]
        return y, rows["weight"], np.zeros(0)

    def fold_triangles(self, starts: Sequence[int]) -> list[RFactor]:
        """The R of all rows; then for each fold that of all other rows, and that of its rows: one pass, or two.

        Args:
          starts: the first row of each fold, ascending from 0; a fold ends where the next one begins.
        """
        return self._triangles(lambda way: self._reduced_ranges(starts, way.size, way.of, way.add, way.rows_at_once))

    def group_triangles(self, fold_of: np.ndarray) -> list[RFactor]:
        """As `fold_triangles`, for folds of whole groups.

        Args:
          fold_of: the number of the fold of each group, from 0.
        """

        def reduced(way: Reduction) -> Sequence[np.ndarray]:
            split = split_folds(way, fold_of)
            found = self._reduced(split.size, split.of, split.add, split.rows_at_once)
            return np.split(found, split.size // way.size)

        return self._triangles(reduced)

    def _triangles(self, reduced: Callable[[Reduction], Sequence[np.ndarray]]) -> list[RFactor]:
        with one_blas_thread():
            while True:
                way = self._reduction(self._least_squares_problem, self._targets)
                if (found := factor_folds(way, reduced(way))) is not None:
                    return found
                self._careful = True

    def _factor(self, problem: Problem, targets: int, others: int = 0) -> tuple[RFactor, np.ndarray]:
        """The R of a problem of least squares over all rows, and the sums [others] of what else it gives."""
        while True:
            way = self._reduction(problem, targets, others)
            found = self._reduced(way.size, way.of, way.add, way.rows_at_once)
            triangle, sums = way.factor(found[others:]), found[:others]
            if triangle is not None or not np.isfinite(sums).all():  # or else no next step is taken
                triangle = triangle or RFactor.none(self._inputs, targets)
                levels, skipped = self._levels, self._skipped
                left_out = None if levels is None else functools.partial(levels.left_out, infinite=skipped)
                return dataclasses.replace(triangle, left_out=left_out), sums
            self._careful = True

    def _reduction(self, problem: Problem, targets: int, others: int = 0) -> Reduction:
        reduction = decompose if self._careful else sum_products
        return reduction(problem, self._inputs, targets, others, self._epsilon)
