"""The libraries of linear algebra on one thread, and the threads that use them."""

import functools
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import scipy
import threadpoolctl

from dpreg.distributed import devices

THREADS = min(8, devices.cores())  # that compute blocks of rows, or tiles of a matrix


def one_blas_thread() -> AbstractContextManager[Any]:
    """Linear algebra on one thread: blocks and tiles have threads, and the bits must not depend on their number."""
    context: AbstractContextManager[Any] = _blas().limit(limits=1, user_api="blas")
    return context


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    """The libraries of linear algebra of this process, those of SciPy included."""
    scipy.linalg.lapack.dpotrf(np.eye(2))
    return threadpoolctl.ThreadpoolController()
