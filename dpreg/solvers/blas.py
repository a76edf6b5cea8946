"""The libraries of linear algebra on one thread, and the threads that use them."""

import collections
import concurrent.futures
import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import scipy
import threadpoolctl

from dpreg.distributed import devices

THREADS = min(8, devices.cores())  # that compute blocks of rows, or tiles of a matrix

Item = TypeVar("Item")
Result = TypeVar("Result")


class Threads:
    """Threads that compute with the calling one, which would only wait for them."""

    def __init__(self) -> None:
        self._others = concurrent.futures.ThreadPoolExecutor(max(1, THREADS - 1))

    def each(self, work: Callable[[Item], object], items: Sequence[Item]) -> None:
        """Calls a function for each of some items, in any order."""
        collections.deque(self.map(work, items, len(items)), 0)

    def map(self, of: Callable[[Item], Result], items: Iterable[Item], ahead: int = THREADS) -> Iterator[Result]:
        """Yields of(item) for each item, in order. The calling thread reads the items, so many ahead of a result."""
        ready = collections.deque[tuple[Item, concurrent.futures.Future[Result]]]()  # which no thread has begun
        waiting = collections.deque[concurrent.futures.Future[Result]]()
        others: list[concurrent.futures.Future[None]] = []

        def compute(enough: Callable[[], bool]) -> None:
            while ready and not enough():
                try:
                    item, future = ready.popleft()
                except IndexError:  # Another thread was faster.
                    return
                try:
                    future.set_result(of(item))
                except BaseException as error:
                    future.set_exception(error)
                    if not isinstance(error, Exception):  # such as Ctrl-C
                        raise

        def first() -> Result:
            compute(waiting[0].done)
            return waiting.popleft().result()

        try:
            for item in items:
                waiting.append(concurrent.futures.Future())
                ready.append((item, waiting[-1]))
                others = [other for other in others if not other.done()]
                if len(ready) > 1 and len(others) < THREADS - 1:
                    others.append(self._others.submit(compute, lambda: False))
                if len(waiting) > ahead:
                    yield first()
            while waiting:
                yield first()
        finally:
            ready.clear()


class _Scratch(threading.local):
    """Memory of each thread; and how many contexts of `one_blas_thread` the thread is in."""

    def __init__(self) -> None:
        self.values, self.depth = np.empty(0), 0


_scratch = _Scratch()


def scratch(*shape: int) -> np.ndarray:
    """A float64 array of any values, in memory that the next call of this thread gets again: for a block of rows.

    The system takes longer to hand out new memory for a block than a thread takes to sum its rows. It is freed at the
    end of the thread, or of `one_blas_thread`.
    """
    size = math.prod(shape)
    if len(_scratch.values) < size:
        _scratch.values = np.empty(size)
    return _scratch.values[:size].reshape(shape)


def in_float64(x: np.ndarray) -> np.ndarray:
    """The values x in float64: x itself, or `scratch` of this thread."""
    if x.dtype == np.float64:
        return x
    found = scratch(*x.shape)
    found[...] = x
    return found


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Linear algebra on one thread: blocks and tiles have threads, and the bits must not depend on their number."""
    with _blas().limit(limits=1, user_api="blas"):
        _scratch.depth += 1
        try:
            yield
        finally:
            _scratch.depth -= 1
            if not _scratch.depth:
                _scratch.values = np.empty(0)


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    """The libraries of linear algebra of this process, those of SciPy included."""
    scipy.linalg.lapack.dpotrf(np.eye(2))
    return threadpoolctl.ThreadpoolController()
