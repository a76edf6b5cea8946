"""Passes over all rows, on the host in float64: each is a sum over blocks, combined over shards in a fixed order."""

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dpreg.data.parts import hold_shards
from dpreg.data.pipeline import host_bytes
from dpreg.data.sampler import Sampler
from dpreg.data.sources import Rows, Source, read_range
from dpreg.distributed import presence, processes, watchdog
from dpreg.errors import InputError
from dpreg.solvers import blas
from dpreg.spelling import spell
from dpreg.step.reduce import tree_sum

_DECOMPOSED_VALUES = 1 << 21  # of a block of rows that is decomposed at once
_COPIES = 5  # of the sums of a shard and of a block of rows, that are there at once


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
        self._skipped, self._every = tuple[int, ...](), 1
        self._threads = blas.Threads()  # of all passes: they take time to start
        sampler, numbers = Sampler(len(source), num_shards, num_shards, shuffle=False), np.arange(num_shards)
        starts, sizes = sampler.shard_start(numbers).tolist(), sampler.shard_size(numbers).tolist()
        self._shards, self._available = [*zip(starts, sizes, strict=True)], host_bytes()
        shards = np.arange(mesh.size * -(-num_shards // mesh.size)).reshape(mesh.size, -1)
        self._own = shards[[device.process_index == jax.process_index() for device in mesh.devices.flat]]

    @contextlib.contextmanager
    def _skipping(self, features: Iterable[int]) -> Iterator[None]:
        """A context in which passes skip the rows where one of some features is not 0."""
        before, self._skipped = self._skipped, tuple(features)
        try:
            yield
        finally:
            self._skipped = before

    @contextlib.contextmanager
    def _sampling(self, every: int) -> Iterator[None]:
        """A context in which passes read the first rows of each shard alone, one of so many that they would read."""
        before, self._every = self._every, self._every * every
        try:
            yield
        finally:
            self._every = before

    def _sum_weights(self) -> float:
        """The sum of the weights of the rows that are not skipped."""
        return float(self._reduced(1, lambda rows: rows["weight"].sum(dtype=np.float64, keepdims=True))[0])

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
        return self._reduced_ranges((0,), size, of, add, rows_at_once)[0]

    def _reduced_ranges(
        self,
        starts: Sequence[int],
        size: int,
        of: Callable[[Rows], np.ndarray],
        add: Callable[[np.ndarray, np.ndarray], np.ndarray],
        rows_at_once: int | None,
    ) -> list[np.ndarray]:
        """As `_reduced`, a result for each of some contiguous ranges of all rows, in one pass.

        The result of no rows is 0: `of` is called only for blocks with some.

        Args:
          starts: the first row of each range, ascending from 0; each has rows, and ends where the next one begins.
        """
        self.passes += 1
        if add is np.add:  # in place: results may be large, and new memory takes longer than a sum
            add = operator.iadd
        columns, at_once = 1 + self._inputs + self._targets, rows_at_once or self._rows_at_once()
        pieces = [self._pieces(shard, starts) for shard in range(len(self._shards))]
        most = max(map(len, pieces))  # ranges that one shard has rows of
        self._require_memory(size, most, len(starts), blas.THREADS * _COPIES * at_once * columns)
        found = dict[tuple[int, int], np.ndarray]()  # by the shard and the range; of those without rows nothing
        shards = self._own[self._own < len(pieces)].tolist()
        held = [(shard, *piece) for shard in shards for piece in pieces[shard]]

        def result(block: tuple[tuple[int, int], Rows]) -> tuple[tuple[int, int], np.ndarray]:
            return block[0], of(block[1])

        with presence.at_work("solving"):
            for at, part in self._threads.map(result, self._blocks(held, at_once)):
                found[at] = add(found[at], part) if at in found else part
                self._heartbeat()
        for shard, number, *_ in held:
            found.setdefault((shard, number), np.zeros(size))  # of no rows that count
        processes.allgather_text(heartbeat=self._heartbeat)  # before a collective, which times out while others work
        every = found if jax.process_count() == 1 else self._from_all_processes(found, pieces, most, size)
        ranges: list[list[np.ndarray]] = [[] for _ in starts]
        for shard, own in enumerate(pieces):
            for number, *_ in own:
                ranges[number].append(every[shard, number])
        return [tree_sum(parts, add) for parts in ranges]

    def _blocks(
        self, pieces: Iterable[tuple[int, int, int, int]], at_once: int
    ) -> Iterator[tuple[tuple[int, int], Rows]]:
        """Reads ((shard, number of the range), rows), without rows that do not count, whose values may be anything.

        Args:
          pieces: (shard, number of the range, first row, row after the last) of each; at_once: rows, at most.
        """
        for shard, number, start, stop in pieces:
            for first in range(start, stop, at_once):
                rows = read_range(self._source, first, min(first + at_once, stop))
                if self._skipped or not rows["weight"].min() > 0:
                    counted = (rows["weight"] > 0) & ~rows["x"][:, self._skipped].any(axis=1)
                    rows = {name: column[counted] for name, column in rows.items()}
                if len(rows["weight"]):
                    yield (shard, number), rows

    def _rows_at_once(self, size: int = 0) -> int:
        """The rows of a block, so many that combining results [size] costs no more than reading the block."""
        columns = 1 + self._inputs + self._targets
        return int(max(256, 2 * columns, _DECOMPOSED_VALUES // columns, size // columns))

    def _pieces(self, shard: int, starts: Sequence[int]) -> list[tuple[int, int, int]]:
        """(number of the range, first row, row after the last) of each range that the shard has rows of."""
        first, size = self._shards[shard]
        stop, ends = first + -(-size // self._every), [*starts[1:], len(self._source)]
        cut = ((n, max(first, start), min(stop, end)) for n, (start, end) in enumerate(zip(starts, ends, strict=True)))
        return [(number, start, end) for number, start, end in cut if start < end]

    def _require_memory(self, size: int, pieces: int, ranges: int, blocks: int) -> None:
        """Refuses results that do not fit into memory, before any is computed."""
        held = pieces * (self._own.size if jax.process_count() == 1 else 3 * len(self._shards))
        afterwards = 0 if ranges == 1 else 4 * ranges  # to combine the results of several ranges
        needed = 8 * (size * (held + afterwards + blas.THREADS + _COPIES) + blocks)
        if needed > self._available:
            raise InputError(
                f"an exact solution for {self._inputs:,} features needs {needed / 1e9:,.1f} GB of memory, and this "
                f"machine has {self._available / 1e9:,.1f}; use {spell('solver', 'sgd')}, or fewer features"
            )

    def _from_all_processes(
        self,
        found: Mapping[tuple[int, int], np.ndarray],
        pieces: Sequence[Sequence[tuple[int, int, int]]],
        most: int,
        size: int,
    ) -> dict[tuple[int, int], np.ndarray]:
        """The results of all processes; in the collective, all shards have as many of them as the one with most."""
        own = np.full((self._own.size, most, size), np.nan)
        for at, shard in enumerate(self._own.ravel().tolist()):
            for piece, (number, *_) in enumerate(pieces[shard] if shard < len(pieces) else ()):
                own[at, piece] = found[shard, number]
        presence.begin_call()
        with watchdog.watched():  # as words: JAX would make float32 of the values
            words = multihost_utils.process_allgather(own.view(np.uint32), tiled=True)
        every = np.array(words).view(np.float64)  # a copy, which sums may change in place
        return {
            (shard, number): every[shard, piece]
            for shard, of_shard in enumerate(pieces)
            for piece, (number, *_) in enumerate(of_shard)
        }
