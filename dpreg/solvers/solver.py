"""Exact solutions of linear models over all shards, devices and processes."""

import collections
import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy
import threadpoolctl
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dpreg.config import Config
from dpreg.data.parts import hold_shards
from dpreg.data.pipeline import host_bytes
from dpreg.data.sampler import Sampler
from dpreg.data.sources import Rows, Source
from dpreg.distributed import devices, presence, processes, watchdog
from dpreg.errors import InputError
from dpreg.solvers import gram, robust, softmax
from dpreg.solvers.basis import Basis
from dpreg.solvers.glm import FAMILIES, Family
from dpreg.solvers.newton import Point, minimum
from dpreg.solvers.tsqr import Fit, RFactor
from dpreg.spelling import spell
from dpreg.step.reduce import tree_sum

_DECOMPOSED_VALUES = 1 << 21  # of a block of rows that is decomposed at once
_MULTIPLIED_VALUES = 1 << 18  # of a block whose products are summed at once: it stays in a core's cache
_COPIES = 5  # of the sums of a shard and of a block of rows, that are there at once
_THREADS = min(8, devices.cores())

# Of a block of rows: x [n, d], y [n, t] and weight [n] of a problem of least squares, and sums [k] of something else.
Problem = Callable[[Rows], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    """The libraries of linear algebra of this process, those of SciPy included."""
    scipy.linalg.lapack.dpotrf(np.eye(2))
    return threadpoolctl.ThreadpoolController()


def _one_blas_thread() -> AbstractContextManager[Any]:
    """Linear algebra on one thread: blocks of rows have threads, and the bits must not depend on their number."""
    context: AbstractContextManager[Any] = _blas().limit(limits=1, user_api="blas")
    return context


class Solution(NamedTuple):
    """A linear model of the least loss.

    Attributes:
      w, b: [d, p] and [p] float64.
      loss: the mean loss, without the penalty.
      fit: what the standard errors come from, where they are known.
    """

    w: np.ndarray
    b: np.ndarray
    loss: float
    fit: Fit | None = None


class Solver:
    """Solves linear models on all rows of a source, to the same bits on any number of devices and processes.

    Each process reads the rows of the logical shards of its devices, and reduces them on the host in float64, which
    most accelerators lack. The results of the shards are gathered, and combined in a fixed tree. All processes have to
    call the same methods.

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
        self._careful = False  # once sums of products did not hold enough digits
        self._sampler = Sampler(len(source), num_shards, num_shards, shuffle=False)
        shards = np.arange(mesh.size * -(-num_shards // mesh.size)).reshape(mesh.size, -1)
        self._own = shards[[device.process_index == jax.process_index() for device in mesh.devices.flat]]

    def triangle(self) -> RFactor:
        """The R of all rows: one pass where sums of products hold enough digits of it, else two."""
        with _one_blas_thread():
            return self._factor(lambda rows: (rows["x"], rows["y"], rows["weight"], np.zeros(0)), self._targets)[0]

    def solve(self, config: Config) -> Solution:
        """The least mean loss of a linear model, with the loss, the penalty and the intercept of the config.

        Raises:
          InputError: for what has no such solver, or no optimum.
        """
        if not config.has_exact_solution:
            raise InputError(f"{spell('loss', config.loss)}: such a model has no exact solution; see {spell('solver')}")
        with _one_blas_thread():
            return self._solve(config)

    def _solve(self, config: Config) -> Solution:
        loss, l2 = config.loss, config.l2
        if loss == "squared":
            fit = self.least_squares(l2, config.intercept, refine=config.precision == "float64")
            return Solution(fit.w, fit.b, fit.loss, fit)
        if loss in FAMILIES:
            found = [self.newton(FAMILIES[loss], l2, config.intercept, t) for t in range(self._targets)]
            w, b = (np.concatenate([getattr(fit, name) for fit, _ in found], axis=-1) for name in ("w", "b"))
            return Solution(w, b, sum(each for _, each in found), found[0][0] if len(found) == 1 else None)
        if loss == "softmax":
            return self.softmax(config.num_classes, l2)
        return self.robust(robust.slopes_of(loss, config.huber_delta, config.quantile), l2)

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

    def newton(
        self, family: Family, l2: float = Config.l2, intercept: bool = Config.intercept, target: int = 0
    ) -> tuple[Fit, float]:
        """(the linear model of least mean loss + l2 / 2 sum w^2, that mean loss), by Newton's method.

        Each step is a pass, and a problem of least squares.

        Args:
          target: the number of the target, from 0.

        Raises:
          InputError: when there is no optimum, such as for classes that a plane separates.
        """
        triangle, (_, weight, _, total) = self._around(family, None, target)
        if not weight > 0:
            raise InputError("there is no row with a weight to fit; give one row at least a weight")
        x = triangle.below(intercept)[:, 1 : 1 + self._inputs]
        spread = np.sqrt(np.square(x).sum(axis=0) / triangle.weight)
        first = triangle.solve(l2 * weight / triangle.weight, intercept)

        def evaluated(theta: np.ndarray) -> Point:
            triangle, (loss, weight, pearson, _) = self._around(family, theta, target)
            if not np.isfinite(loss):
                return Point(np.inf, np.zeros_like(theta), 0.0, 0.0)
            fit = triangle.solve(l2 * weight / triangle.weight, intercept)
            step = np.append(fit.b, fit.w) - theta
            along = np.square(triangle.about(0.0)[:, : step.size] @ step).sum() / weight
            return Point(
                loss / weight + l2 / 2 * float(np.square(theta[1:]).sum()),
                step,
                decrement=float(along + l2 * np.square(step[1:]).sum()),
                moved=float(np.max(np.abs(step[1:]) * spread, initial=0.0)),
                detail=(fit, loss / weight, pearson),
            )

        start = np.append(first.b, first.w)
        null = family.link(total / weight) if intercept else 0.0
        theta, (*_, (fit, loss, pearson)) = minimum(evaluated, start, np.append(null, np.zeros_like(first.w)))
        dispersion = pearson / max(fit.degrees_of_freedom, 1) if family.dispersed else 1.0

        def likelihood(rows: Rows) -> np.ndarray:
            x, y, weight = (rows[name].astype(np.float64) for name in ("x", "y", "weight"))
            y = y[:, target : target + 1]
            of_rows = family.log_likelihood(x @ theta[1:, None] + theta[0], y, dispersion or 1.0)
            of_null = family.loss(np.full_like(y, null), y)
            return np.asarray(weight @ np.concatenate([of_rows, of_null], axis=1))

        log_likelihood, of_null = self._reduced(2, likelihood)
        return dataclasses.replace(
            fit,
            l2=l2,
            dispersion=dispersion,
            known_variance=not family.dispersed,
            deviance=2 * loss * weight,
            null_deviance=2 * of_null if intercept else None,
            log_likelihood=log_likelihood,
        ), loss

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

    def _around(self, family: Family, theta: np.ndarray | None, target: int) -> tuple[RFactor, np.ndarray]:
        """The problem of Newton's next step from b and w [1 + d], and the sums of `Family.working`."""

        def problem(rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
            x, y, weight = (rows[name].astype(np.float64) for name in ("x", "y", "weight"))
            y = y[:, target : target + 1]
            prediction = family.start(y) if theta is None else x @ theta[1:, None] + theta[0]
            return x, *family.working(y, weight, prediction)

        return self._factor(problem, 1, 4)

    def _factor(self, problem: Problem, targets: int, others: int = 0) -> tuple[RFactor, np.ndarray]:
        """The R of a problem of least squares over all rows, and the sums [others] of what else it gives."""
        columns = 1 + self._inputs + targets
        if not self._careful:

            def multiplied(rows: Rows) -> np.ndarray:
                *of_rows, also = problem(rows)
                return np.concatenate([also, gram.products(*of_rows)])

            size = others + columns + columns**2
            sums = self._reduced(size, multiplied, rows_at_once=max(1024, _MULTIPLIED_VALUES // columns))
            found = gram.factor(sums[others:], self._inputs, self._epsilon)
            if found is not None or not np.isfinite(sums[:others]).all():  # or else no next step is taken
                return found or RFactor.none(self._inputs, targets), sums[:others]
            self._careful = True

        def unpacked(packed: np.ndarray) -> RFactor:
            return RFactor.unpacked(packed, self._inputs, targets, self._epsilon)

        def decomposed(rows: Rows) -> np.ndarray:
            *of_rows, also = problem(rows)
            return np.concatenate([also, RFactor.of(*of_rows).packed()])

        def add(one: np.ndarray, other: np.ndarray) -> np.ndarray:
            both = unpacked(one[others:]) + unpacked(other[others:])
            return np.concatenate([one[:others] + other[:others], both.packed()])

        size = others + columns**2 + columns + 1
        sums = self._reduced(size, decomposed, add)
        return unpacked(sums[others:]), sums[:others]

    def _reduced(
        self,
        size: int,
        of: Callable[[Rows], np.ndarray],
        add: Callable[[np.ndarray, np.ndarray], np.ndarray] = np.add,
        rows_at_once: int | None = None,
    ) -> np.ndarray:
        """[size] float64: what `of` gives for blocks of rows, combined by `add` over all rows in a fixed order.

        Args:
          rows_at_once: the rows of a block; by default so many that combining two results costs no more than one.
        """
        self.passes += 1
        found = dict[int, np.ndarray]()  # by the number of the shard; of one without rows nothing
        columns = 1 + self._inputs + self._targets
        at_once = rows_at_once or max(256, 2 * columns, _DECOMPOSED_VALUES // columns)
        held = self._own.size if jax.process_count() == 1 else 3 * self._sampler.num_shards
        blocks = _THREADS * _COPIES * at_once * columns
        needed, available = 8 * (size * (held + _THREADS + _COPIES) + blocks), host_bytes()
        if needed > available:
            raise InputError(
                f"an exact solution for {self._inputs:,} features needs {needed / 1e9:,.1f} GB of memory, and this "
                f"machine has {available / 1e9:,.1f}; use {spell('solver', 'sgd')}, or fewer features"
            )
        waiting = collections.deque[tuple[int, concurrent.futures.Future[np.ndarray]]]()

        def finish() -> None:
            shard, part = waiting.popleft()
            found[shard] = add(found[shard], part.result()) if shard in found else part.result()
            self._heartbeat()

        with presence.at_work("solving"), concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            for shard in self._own.ravel().tolist():
                start, rows = (int(at(shard)) for at in (self._sampler.shard_start, self._sampler.shard_size))
                for first in range(start, start + rows, at_once):
                    block = self._source[np.arange(first, min(first + at_once, start + rows))]
                    counted = block["weight"] > 0  # the values of other rows may be anything
                    if not counted.all():
                        block = {name: column[counted] for name, column in block.items()}
                    waiting.append((shard, pool.submit(of, block)))
                    if len(waiting) > _THREADS:
                        finish()
            while waiting:
                finish()
        processes.allgather_text(heartbeat=self._heartbeat)  # before a collective, which times out while others work
        used = range(min(self._sampler.num_shards, len(self._source)))  # those with rows
        every = found if jax.process_count() == 1 else self._from_all_processes(found, size)
        whole: np.ndarray = tree_sum([every[shard] for shard in used], add)
        return whole

    def _from_all_processes(self, found: Mapping[int, np.ndarray], size: int) -> np.ndarray:
        """[shards, size] float64 of all processes."""
        own = np.array([found.get(shard, np.full(size, np.nan)) for shard in self._own.ravel().tolist()])
        presence.begin_call()
        with watchdog.watched():  # as words: JAX would make float32 of the values
            words = multihost_utils.process_allgather(own.view(np.uint32), tiled=True)
        return np.ascontiguousarray(words).view(np.float64)
