"""Passes over all rows, on the host in float64: each is a sum over blocks, combined over shards in a fixed order."""

import collections
import concurrent.futures
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dpreg.data.parts import hold_shards
from dpreg.data.pipeline import host_bytes
from dpreg.data.sampler import Sampler
from dpreg.data.sources import Rows, Source
from dpreg.distributed import devices, presence, processes, watchdog
from dpreg.errors import InputError
from dpreg.spelling import spell
from dpreg.step.reduce import tree_sum

_DECOMPOSED_VALUES = 1 << 21  # of a block of rows that is decomposed at once
_COPIES = 5  # of the sums of a shard and of a block of rows, that are there at once
_THREADS = min(8, devices.cores())


class Passes:
    """Reads all rows of a source, and reduces them to the same bits on any number of devices and processes.

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
        self._sampler = Sampler(len(source), num_shards, num_shards, shuffle=False)
        shards = np.arange(mesh.size * -(-num_shards // mesh.size)).reshape(mesh.size, -1)
        self._own = shards[[device.process_index == jax.process_index() for device in mesh.devices.flat]]

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
