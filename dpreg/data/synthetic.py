"""Synthetic regression data whose true parameters are known."""

import collections
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike, DTypeLike

from dpreg.config import Config, check_settings
from dpreg.data.sources import RegressionData, Rows
from dpreg.errors import InputError
from dpreg.tracing import make_key, pinned_settings

# Rows are drawn in one compiled shape without ragged ends: the compiler may give the remainder of a vector loop
# other bits, and a row must not depend on those drawn with it.
_CHUNK, _LANES = 1024, 16
_UNDER_WAY = 16  # chunks that are drawn while one is waited for
_ROWS_KEY = 2  # of the seed's random key: the part for rows, apart from those for parameters and dropout


@functools.partial(jax.jit, static_argnames="width")
def _normals(indices: Array, seed: Array, width: int) -> Array:
    """Standard normal numbers, [rows, width] float32: a function of seed and index."""
    key = jax.random.fold_in(make_key(seed), _ROWS_KEY)
    return jax.vmap(lambda index: jax.random.normal(jax.random.fold_in(key, index), (width,), jnp.float32))(indices)


@dataclasses.dataclass(frozen=True)
class SyntheticSource:
    """Rows of y = x w + b + e with x ~ N(0, I) and e ~ N(0, noise^2), each a function of (seed, its index).

    Nothing is stored: a row is generated when it is asked for, so any number of rows costs no memory.

    Args:
      w: [d, t] float32; b: [t] float32; noise: standard deviation of e.
      num_rows: rows of this source.
      first: the index of its first row, so that training and validation rows come from one sequence.
      seed: the sequence.
      dtype: of the rows; x and e are drawn as float32, whatever it is.
    """

    w: np.ndarray
    b: np.ndarray
    noise: float
    num_rows: int
    first: int = 0
    seed: int = Config.seed
    dtype: DTypeLike = np.float32

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, indices: np.ndarray) -> Rows:
        with pinned_settings():
            return self._drawn(indices)

    def _drawn(self, indices: np.ndarray) -> Rows:
        count, (num_inputs, num_targets) = len(indices), self.w.shape
        width = -(-(num_inputs + num_targets) // _LANES) * _LANES
        padded = np.zeros(-(-count // _CHUNK) * _CHUNK, np.uint32)
        padded[:count] = np.asarray(indices, np.uint32) + np.uint32(self.first)
        x, y = np.empty((len(padded), num_inputs), self.dtype), np.empty((len(padded), num_targets), self.dtype)
        chunks = (slice(start, start + _CHUNK) for start in range(0, count, _CHUNK))
        calls = ((chunk, _normals(padded[chunk], np.uint32(self.seed), width)) for chunk in chunks)
        under_way = collections.deque(itertools.islice(calls, _UNDER_WAY))
        while under_way:
            chunk, call = under_way.popleft()
            under_way.extend(itertools.islice(calls, 1))
            drawn = np.asarray(call)
            inputs, e = drawn[:, :num_inputs], drawn[:, num_inputs : num_inputs + num_targets]
            x[chunk], y[chunk] = inputs, self._targets(inputs, e)
        return {"x": x[:count], "y": y[:count], "weight": np.ones(count, self.dtype)}

    def _targets(self, x: np.ndarray, e: np.ndarray) -> np.ndarray:
        """Computed in float64, inputs one by one: the order of a matmul may depend on the rows."""
        y = self.b + self.noise * e.astype(np.float64)
        for column, weights in zip(x.T, self.w.astype(np.float64), strict=True):
            y += column[:, None] * weights
        return y

    def fingerprint(self) -> str:
        """Of what the rows are made from."""
        what = (self.w.tolist(), self.b.tolist(), self.noise, self.num_rows, self.first, self.seed)
        return f"{what} {np.dtype(self.dtype)}"


class SyntheticRegressionData(RegressionData):
    """Synthetic data for linear regression, y = x w + b + noise (D2L section 3.3.1).

    Args:
      w: [d] true weights, or [d, t] for t targets.
      b: true bias, or [t].
      noise: standard deviation of the noise.
      num_train, num_val: rows to fit, rows held out.
      batch_size: rows of one global batch.
      seed: another seed is another sample.
      dtype: of the rows: float32, or float64 for runs of that precision.

    Attributes:
      w, b: the truth, as given.

    >>> data = SyntheticRegressionData(w=[2, -3.4], b=4.2, noise=0)
    >>> rows = data.train[np.arange(100)]
    >>> np.abs(rows["x"] @ data.w + data.b - rows["y"][:, 0]).max() < 1e-5
    np.True_
    """

    def __init__(
        self,
        w: ArrayLike,
        b: ArrayLike,
        noise: float = Config.noise,
        num_train: int = Config.num_train,
        num_val: int = Config.num_val,
        batch_size: int = Config.batch_size,
        seed: int = Config.seed,
        dtype: DTypeLike = np.float32,
    ):
        check_settings(noise=noise, num_train=num_train, num_val=num_val, seed=seed)
        with np.errstate(over="ignore"):
            self.w, self.b, deviation = (np.asarray(value, dtype) for value in (w, b, noise))
        for name, value in (("w", self.w), ("b", self.b), ("noise", deviation)):
            if not np.isfinite(value).all():
                raise InputError(f"{name} holds numbers that are not finite as {np.dtype(dtype)}; use smaller ones")
        weights = self.w.reshape(len(self.w), -1)
        bias = np.broadcast_to(self.b.ravel(), (weights.shape[1],))
        source = functools.partial(SyntheticSource, weights, bias, float(noise), seed=seed, dtype=dtype)
        super().__init__(source(num_train), source(num_val, first=num_train) if num_val else None, batch_size)
