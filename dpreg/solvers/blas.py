"""The libraries of linear algebra on one thread, and the threads that use them."""

import functools
import math
import threading
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import scipy
import threadpoolctl

from dpreg.distributed import devices

THREADS = min(8, devices.cores())  # that compute blocks of rows, or tiles of a matrix


class _Memory(threading.local):
    """Memory of each thread, by its use."""

    def __init__(self) -> None:
        self.of = dict[str, np.ndarray]()


_memory = _Memory()


def scratch(use: str, *shape: int) -> np.ndarray:
    """A float64 array of any values, in memory that the next call of this thread for the same use gets again.

    The system takes longer to hand out new memory for a block of rows than a thread takes to sum them.
    """
    size = math.prod(shape)
    if (held := _memory.of.get(use)) is None or len(held) < size:
        _memory.of[use] = held = np.empty(size)
    return held[:size].reshape(shape)


def in_float64(x: np.ndarray) -> np.ndarray:
    """The values x in float64: x itself, or `scratch` of this thread."""
    if x.dtype == np.float64:
        return x
    found = scratch("float64", *x.shape)
    found[...] = x
    return found


def one_blas_thread() -> AbstractContextManager[Any]:
    """Linear algebra on one thread: blocks and tiles have threads, and the bits must not depend on their number."""
    context: AbstractContextManager[Any] = _blas().limit(limits=1, user_api="blas")
    return context


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    """The libraries of linear algebra of this process, those of SciPy included."""
    scipy.linalg.lapack.dpotrf(np.eye(2))
    return threadpoolctl.ThreadpoolController()
