"""Exact solutions of linear models over all shards, devices and processes."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dpreg.config import Config
from dpreg.data.parts import hold_shards
from dpreg.data.sampler import Sampler
from dpreg.data.sources import Rows, Source
from dpreg.distributed import presence, processes, watchdog
from dpreg.errors import InputError
from dpreg.solvers import robust, softmax
from dpreg.solvers.glm import Family
from dpreg.solvers.newton import Point, minimum
from dpreg.solvers.tsqr import Fit, RFactor
from dpreg.spelling import spell
from dpreg.step.reduce import tree_sum

_BLOCK_VALUES = 1 << 21  # reduced at once


class Solver:
    """Solves linear models on all rows of a source, to the same bits on any number of devices and processes.

    Each process reads the rows of the logical shards that its devices carry and reduces them on the host in float64,
    which accelerators have not or hardly; what the shards come to meets, and is put together by a fixed tree. All
    processes have to ask alike.

    Args:
      source: the rows; mesh: the devices; num_shards: the logical shards, L.
      heartbeat: called whenever some rows are done, and while other processes are waited for.

    Attributes:
      passes: over the rows, so far.
    """

    def __init__(self, source: Source, mesh: Mesh, num_shards: int, heartbeat: Callable[[], None] = lambda: None):
        one = source[np.zeros(1, np.int32)]
        self._inputs, self._targets = one["x"].shape[1], one["y"].shape[1]
        self._epsilon = float(np.spacing(np.ones((), one["x"].dtype)))
        self._source, self._heartbeat, self.passes = hold_shards(source, mesh, num_shards), heartbeat, 0
        self._sampler = Sampler(len(source), num_shards, num_shards, shuffle=False)
        shards = np.arange(mesh.size * -(-num_shards // mesh.size)).reshape(mesh.size, -1)
        self._own = shards[[device.process_index == jax.process_index() for device in mesh.devices.flat]]

    def triangle(self) -> RFactor:
        """What all rows come to: one pass."""
        columns = self._inputs + self._targets
        size = (1 + columns) ** 2 + columns + 2

        def of(rows: Rows) -> np.ndarray:
            return RFactor.of(rows["x"], rows["y"], rows["weight"]).packed()

        return self._unpacked(self._reduced(size, of, self._put_together))

    def least_squares(self, l2: float = Config.l2, intercept: bool = Config.intercept, refine: bool = False) -> Fit:
        """The least mean squared loss + l2 / 2 sum w^2: one pass, or two.

        Args:
          refine: whether to win back, in another pass, the digits that rounding has taken from the decomposition: of
            use where rows are float64.
        """
        fit = self.triangle().solve(l2, intercept)
        if not refine:
            return fit
        w, b, means = (values.astype(np.longdouble) for values in (fit.w, fit.b, fit.means))

        def gradient(rows: Rows) -> np.ndarray:
            x, y, weight = (rows[name].astype(np.longdouble) for name in ("x", "y", "weight"))
            left = (y - x @ w - b) * weight[:, None]
            return np.concatenate([left.sum(axis=0)[None], (x - means).T @ left]).astype(np.float64).ravel()

        size = 1 + self._inputs, self._targets
        of_b, *of_w = self._reduced(size[0] * size[1], gradient).reshape(size)
        return fit.refined(np.array(of_w), of_b)

    def newton(self, family: Family, l2: float = Config.l2, intercept: bool = Config.intercept) -> tuple[Fit, float]:
        """(the linear model of least mean loss + l2 / 2 sum w^2, that mean loss), by Newton's method.

        Each step is a pass, and a problem of least squares.

        Raises:
          InputError: when there are several targets, or no optimum, such as for classes that a plane separates.
        """
        if self._targets > 1:
            raise InputError(
                f"{spell('solver', 'irls')}: it is for one target, and there are {self._targets}; name one"
            )
        triangle, _, weight = self._around(family, None)
        if not weight > 0:
            raise InputError("there is no row with a weight to fit; give one row at least a weight")
        x = triangle.below(intercept)[:, 1 : 1 + self._inputs]
        spread = np.sqrt(np.square(x).sum(axis=0) / triangle.weight)
        first = triangle.solve(l2 * weight / triangle.weight, intercept)

        def evaluated(theta: np.ndarray) -> Point:
            triangle, loss, weight = self._around(family, theta)
            fit = triangle.solve(l2 * weight / triangle.weight, intercept)
            step = np.append(fit.b, fit.w) - theta
            along = np.square(triangle.about(0.0)[:, : step.size] @ step).sum() / weight
            return Point(
                loss + l2 / 2 * float(np.square(theta[1:]).sum()),
                step,
                decrement=float(along + l2 * np.square(step[1:]).sum()),
                moved=float(np.max(np.abs(step[1:]) * spread, initial=0.0)),
                detail=(fit, loss),
            )

        start = np.append(first.b, first.w)
        _, (*_, (fit, loss)) = minimum(evaluated, np.zeros_like(start), start)
        return dataclasses.replace(fit, l2=l2, known_variance=True), loss

    def softmax(self, num_classes: int, l2: float = Config.l2) -> tuple[np.ndarray, np.ndarray]:
        """W [d, C] and b [C] of least mean cross-entropy of the labels + l2 / 2 sum w^2, by Newton's method.

        Without a penalty, columns of x have mean squares of about 1, and none is constant or a combination of others.

        Raises:
          InputError: when there are several targets, or no optimum was found.
        """
        if self._targets > 1:
            raise InputError(f"labels are one target, and there are {self._targets}; give one")

        def sums_at(theta: np.ndarray) -> np.ndarray:
            def of(rows: Rows) -> np.ndarray:
                x, y, weight = (rows[name].astype(np.float64) for name in ("x", "y", "weight"))
                return softmax.sums(x, y, weight, theta)

            return self._reduced(2 + theta.size + theta.size**2, of)

        theta = softmax.minimum(sums_at, (1 + self._inputs, num_classes), l2)
        return theta[1:], theta[0]

    def robust(self, slopes: robust.Slopes, l2: float = Config.l2) -> tuple[np.ndarray, np.ndarray]:
        """W [d, 1] and b [1] of least mean loss + l2 / 2 sum w^2, of a loss with such slopes, by Newton's method.

        Features have mean squares of about 1; without a penalty none is constant or a combination of others.

        Raises:
          InputError: when there are several targets, or no optimum was found.
        """
        if self._targets > 1:
            raise InputError(f"loss: it has one target, and there are {self._targets}; name one")
        triangle = self.triangle()
        fit, size = triangle.solve(l2), 1 + self._inputs
        length = float(np.sqrt(np.square(triangle.about(0.0)[:, -1]).sum() / triangle.weight))

        def sums_at(theta: np.ndarray, width: float) -> np.ndarray:
            def of(rows: Rows) -> np.ndarray:
                x, y, weight = (rows[name].astype(np.float64) for name in ("x", "y", "weight"))
                return robust.sums(x, y, weight, theta, slopes, width)

            return self._reduced(4 + size + size**2, of)

        theta = robust.minimum(sums_at, np.append(fit.b, fit.w[:, 0]), slopes, l2, length)
        return theta[1:, None], theta[:1]

    def _around(self, family: Family, theta: np.ndarray | None) -> tuple[RFactor, float, float]:
        """(the problem of Newton's next step from b and w [1 + d], their mean loss, the weight of all rows)."""

        def of(rows: Rows) -> np.ndarray:
            x, y, weight = (rows[name].astype(np.float64) for name in ("x", "y", "weight"))
            prediction = family.start(y) if theta is None else x @ theta[1:, None] + theta[0]
            triangle, loss = family.working(x, y, weight, prediction)
            return np.array([*triangle.packed(), loss, weight.sum()])

        def add(one: np.ndarray, other: np.ndarray) -> np.ndarray:
            return np.concatenate([self._put_together(one[:-2], other[:-2]), one[-2:] + other[-2:]])

        size = of(self._source[np.zeros(1, np.int32)]).size
        *packed, loss, weight = self._reduced(size, of, add)
        return self._unpacked(np.array(packed)), loss / weight if weight > 0 else np.nan, weight

    def _unpacked(self, packed: np.ndarray) -> RFactor:
        return RFactor.unpacked(packed, self._inputs, self._targets, self._epsilon)

    def _put_together(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return (self._unpacked(one) + self._unpacked(other)).packed()

    def _reduced(
        self,
        size: int,
        of: Callable[[Rows], np.ndarray],
        add: Callable[[np.ndarray, np.ndarray], np.ndarray] = np.add,
    ) -> np.ndarray:
        """[size] float64: what `of` gives for blocks of rows, put together by `add` over all rows."""
        self.passes += 1
        found = np.full((*self._own.shape, size), np.nan)
        columns = 1 + self._inputs + self._targets
        at_once = max(256, 2 * columns, _BLOCK_VALUES // columns)  # to put two triangles together costs as much as that
        with presence.at_work("solving"):
            for place, shard in np.ndenumerate(self._own):
                start, rows = (int(of(int(shard))) for of in (self._sampler.shard_start, self._sampler.shard_size))
                for first in range(start, start + rows, at_once):
                    block = self._source[np.arange(first, min(first + at_once, start + rows))]
                    counted = block["weight"] > 0  # the others may be anything
                    part = of({name: column[counted] for name, column in block.items()})
                    found[place] = part if first == start else add(found[place], part)
                    self._heartbeat()
        processes.allgather_text(heartbeat=self._heartbeat)  # before a collective, which waits for nobody long
        # As words: JAX would make float32 of them.
        presence.begin_call()
        with watchdog.watched():
            words = multihost_utils.process_allgather(found.view(np.uint32), tiled=True)
        every = list(np.ascontiguousarray(words).view(np.float64).reshape(-1, size))
        whole: np.ndarray = tree_sum(every[: min(self._sampler.num_shards, len(self._source))], add)  # others: no rows
        return whole
