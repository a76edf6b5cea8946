"""The duration of a sum over devices: measured, fitted by a latency and a bandwidth, and predicted."""

import dataclasses
import math
import time

import jax
import numpy as np
import scipy
from jax import lax
from jax.sharding import PartitionSpec

from dpreg.distributed import devices, processes
from dpreg.step.reduce import mean_over_devices

_SIZES = (24, 4096, 65_536, 1 << 20, 4 << 20)  # bytes of the sums that are timed
_REPEATED_BYTES, _MAX_REPEATS, _ROUNDS = 32 << 20, 200, 5


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A model of the duration of a sum over devices: latency + size / bandwidth.

    Attributes:
      devices: the number of devices.
      latency: seconds.
      bandwidth: bytes/s; infinite if larger sums took no longer.
      error: the largest relative error of the model on the measurements.
      seconds: the measured duration by size in bytes.
    """

    devices: int
    latency: float
    bandwidth: float
    error: float
    seconds: dict[int, float]

    @classmethod
    def fit(cls, count: int, seconds: dict[int, float]) -> "Exchange":
        """Fits the model to measurements by non-negative least squares of the relative errors."""
        size, measured = np.array(list(seconds)), np.array(list(seconds.values()))
        design = np.stack([np.ones(len(size)), size], axis=1) / measured[:, None]
        latency, seconds_per_byte = scipy.optimize.nnls(design, np.ones(len(size)))[0]
        error = np.abs((latency + seconds_per_byte * size) / measured - 1).max()
        depends_on_size = seconds_per_byte * size.max() > 1e-9 * latency  # beyond rounding
        bandwidth = 1 / seconds_per_byte if depends_on_size else float("inf")
        return cls(count, float(latency), float(bandwidth), float(error), seconds)

    def predict(self, size: float, count: float) -> float:
        """The seconds of a sum of `size` bytes over `count` devices.

        It assumes that the latency grows with the logarithm of `count`, as in a tree, and that each of n devices moves
        (1 - 1 / n) of the bytes, as in a ring. (Small sums between CPUs move more: they are sent to all processes.)
        """
        if count <= 1:
            return 0.0
        share = (1 - 1 / count) / (1 - 1 / self.devices)
        return self.latency * math.log2(count) / math.log2(self.devices) + share * size / self.bandwidth


def measure_exchange(count: int) -> dict[int, float]:
    """The seconds of one sum over `count` devices, by its size in bytes: the best round of a loop of sums."""
    mesh = devices.data_mesh(jax.device_count(), num_devices=count // jax.process_count())
    seconds = {}
    for size in _SIZES:
        repeats = min(_MAX_REPEATS, _REPEATED_BYTES // size)

        def sums(x: jax.Array, one: jax.Array, times: jax.Array) -> jax.Array:
            last: jax.Array = lax.fori_loop(0, times, lambda _, total: mean_over_devices(total, mesh) * one, x)
            return last

        everywhere = PartitionSpec()
        mapped = jax.shard_map(sums, mesh=mesh, in_specs=(everywhere,) * 3, out_specs=everywhere, check_vma=False)
        args = devices.replicated((np.ones(size // 4, np.float32), np.float32(1), np.int32(repeats)), mesh)
        compiled = jax.jit(mapped).lower(*args).compile()
        processes.allgather_text()
        times = []
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            jax.block_until_ready(compiled(*args))
            times.append((time.perf_counter() - began) / repeats)
        seconds[size] = min(times)
    return seconds
