"""The pipeline from a source to the devices: shuffle, batch, repeat, shard; then blocks of steps."""

import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpreg.config import Config, check_settings
from dpreg.data.parts import hold_shards
from dpreg.data.prefetch import prefetch
from dpreg.data.sampler import Sampler, row_tag
from dpreg.data.sources import Rows, Source
from dpreg.errors import InputError

PRECISIONS = {  # what features are, on the devices; and targets, weights, and what is computed
    "float32": (np.float32, np.float32),
    "bfloat16": (jnp.bfloat16, np.float32),
    "float64": (np.float64, np.float64),
}

# Of a block. To be transferred, larger ones were slower and smaller ones are dominated by the call; rows that lie on
# the devices are only to be gone through in less than a second (on chips: all that fit), and their numbers to take
# little memory.
_BLOCK_BYTES, _RESIDENT_BLOCK_BYTES_OF_CPU, _RESIDENT_BLOCK_ROWS = 16 << 20, 1 << 30, 1 << 22
# Signals are handled between blocks. Several processes need some more blocks until all have received one, and their
# steps are slow enough for the overhead of a call to be small.
_BLOCK_STEPS, _BLOCK_STEPS_AMONG_PROCESSES = 1 << 12, 1 << 8
# Of several epochs: so many that the call weighs little, few enough for one that takes a part of them.
_BLOCK_STEPS_ACROSS_EPOCHS = 1 << 9
_TAG_ROWS = 1 << 18  # at a time: they stay in cache
# Of a device's memory: rows up to this size are kept there. CPU devices have the host's own, where rows lie already.
RESIDENT_FRACTION, _RESIDENT_FRACTION_OF_HOST = 1 / 4, 1 / 32
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

Batch = dict[str, Array]


class Block(NamedTuple):
    """The batches of `num_steps` consecutive steps, from `first_step` on.

    `data` is what lies on the devices: with placement "host" the batches themselves,
    `[K, devices, slots, shard_batch, ...]`; with "device" all rows of the run's shards,
    `[devices, slots, rows, ...]`, from which the compiled call gathers.

    >>> import dpreg
    >>> trainer = dpreg.Trainer(max_epochs=3)
    >>> trainer.prepare_data(dpreg.SyntheticRegressionData(w=[2, -3.4], b=4.2))
    >>> [(block.first_step, block.num_steps) for block in trainer.train]
    [(0, 32), (32, 32), (64, 32)]
    """

    first_step: int
    num_steps: int
    data: Any


@dataclasses.dataclass(frozen=True)
class CastSource:
    """A source whose rows are as they will be on the devices, in a precision."""

    source: Source
    precision: str

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: np.ndarray) -> Rows:
        of_features, of_rest = PRECISIONS[self.precision]
        rows = self.source[indices]
        return {name: v.astype(of_features if name == "x" else of_rest, copy=False) for name, v in rows.items()}

    def fingerprint(self) -> str:
        """Of the source's rows."""
        return self.source.fingerprint()


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Rows of a source on their way to the devices, in the manner of tf.data.

    Batch sizes are global and sharding comes last, so the batches do not depend on the devices:

        dataset = Dataset(source).shuffle(seed).batch(32).repeat(3).shard(mesh, num_shards=8)
        for block in dataset.prefetch(2): ...

    It is random access: a block is a function of its first step. Each device, and so each process, asks the
    source for the rows of its own shards only.

    Attributes:
      source: the rows.
      seed, global_batch: the arguments of `shuffle` and `batch`; epochs, across: as `repeat` was.
      mesh, num_shards: as `shard` was; placement, steps_per_block: as `place` was.
      prefetched, tagged, precision: as `prefetch`, `tag` and `cast` were.

    >>> from dpreg.data.sources import ArraySource
    >>> from dpreg.distributed.devices import data_mesh
    >>> source = ArraySource(x=np.arange(1000), y=np.arange(1000))
    >>> dataset = Dataset(source).shuffle(seed=0).batch(32).repeat(3).shard(data_mesh(8), num_shards=8)
    >>> dataset.num_steps
    96
    """

    source: Source
    seed: int | None = None
    global_batch: int = 1
    epochs: int = 1
    across: bool = False
    mesh: Mesh | None = None
    num_shards: int = 1
    placement: str = Config.placement
    prefetched: int = 0
    tagged: bool = False
    precision: str = Config.precision
    steps_per_block: int | None = None

    def __post_init__(self) -> None:
        check_settings(max_epochs=self.epochs, num_shards=self.num_shards, batch_size=self.global_batch)
        check_settings(seed=self.seed or 0, placement=self.placement, precision=self.precision)

    def shuffle(self, seed: int) -> "Dataset":
        """Each epoch in an order of its own, a function of (seed, epoch, shard). Without: the source's order."""
        return dataclasses.replace(self, seed=seed)

    def batch(self, global_batch: int) -> "Dataset":
        """Rows of one step, over all devices and processes."""
        return dataclasses.replace(self, global_batch=global_batch)

    def repeat(self, epochs: int, across: bool = False) -> "Dataset":
        """How often every row is used, and whether blocks may be as long as several short epochs."""
        return dataclasses.replace(self, epochs=epochs, across=across)

    def shard(self, mesh: Mesh, num_shards: int) -> "Dataset":
        """Cuts the rows into logical shards and gives each device of the mesh a contiguous range of them."""
        source = hold_shards(self.source, mesh, num_shards)
        return dataclasses.replace(self, source=source, mesh=mesh, num_shards=num_shards)

    def place(self, placement: str, steps_per_block: int | None = None) -> "Dataset":
        """Where the rows wait: on the "device", on the "host", or ("auto") on the device where they fit."""
        return dataclasses.replace(self, placement=placement, steps_per_block=steps_per_block)

    def prefetch(self, blocks: int) -> "Dataset":
        """Lets a background thread gather this many blocks ahead, where that helps (not on CPU devices)."""
        return dataclasses.replace(self, prefetched=blocks)

    def tag(self, tagged: bool = True) -> "Dataset":
        """Lets each row carry a tag, by which those can be counted that a step used: see `tags`."""
        return dataclasses.replace(self, tagged=tagged)

    def cast(self, precision: str) -> "Dataset":
        """What rows are on the devices: "float32", "float64", or "bfloat16" for their features."""
        return dataclasses.replace(self, precision=precision)

    def __iter__(self) -> Iterator[Block]:
        return self.blocks(0, self.num_steps)

    @functools.cached_property
    def sampler(self) -> Sampler:
        """The order of the rows."""
        return Sampler(len(self.source), self.num_shards, self.global_batch, self.seed is not None)

    @functools.cached_property
    def tags(self) -> np.ndarray:
        """What an epoch has to use: how many rows, and the sum of their tags: [2] uint32, whatever their order."""
        rows = len(self.source)
        sums = [row_tag(np.arange(i, min(i + _TAG_ROWS, rows))).sum(dtype=np.uint32) for i in range(0, rows, _TAG_ROWS)]
        return np.array([rows, np.array(sums).sum(dtype=np.uint32)], np.uint32)

    @property
    def num_steps(self) -> int:
        """Steps of all epochs."""
        return self.epochs * self.sampler.steps_per_epoch

    @property
    def slots(self) -> int:
        """Slots for shards on a device: the last devices may carry fewer."""
        return -(-self.num_shards // self._mesh.size)

    @functools.cached_property
    def row_bytes(self) -> int:
        """Bytes of one row: features, targets and weight."""
        return sum(column.nbytes for column in self._read(np.zeros(1, np.int32)).values())

    def _read(self, indices: np.ndarray) -> Rows:
        """Rows of the source as they are on the devices."""
        return CastSource(self.source, self.precision)[indices]

    @functools.cached_property
    def block_steps(self) -> int:
        """Steps of one block, K: chosen by bytes. 2 at least, since K = 1 would be compiled to other bits."""
        rows = _BLOCK_BYTES // self.row_bytes
        if self.resolved_placement == "device":
            rows = _RESIDENT_BLOCK_ROWS
            if self._mesh.devices.flat[0].platform == "cpu":
                rows = min(_RESIDENT_BLOCK_BYTES_OF_CPU // self.row_bytes, rows)
        steps = self.steps_per_block or rows // self.global_batch
        epoch, most = self.sampler.steps_per_epoch, _BLOCK_STEPS
        if self._mesh.is_multi_process:
            most = _BLOCK_STEPS_AMONG_PROCESSES
        most = max(1, min(steps, most))
        if self.across and (epochs := min(most, _BLOCK_STEPS_ACROSS_EPOCHS) // epoch) > 1:
            return max(2, min(epochs, self.epochs) * epoch)
        return max(2, -(-epoch // -(-epoch // most)))  # evenly, since all blocks are gathered whole

    @property
    def resolved_placement(self) -> str:
        """What "auto" became: "device" or "host"."""
        return self._chosen_placement[0]

    @property
    def placement_reason(self) -> str:
        """Why, in words; empty where "auto" was not asked for."""
        return self._chosen_placement[1]

    @property
    def resident_bytes(self) -> int:
        """Bytes on a device with placement "device"."""
        return self.slots * self._shard_rows * self.row_bytes

    @property
    def _shard_rows(self) -> int:
        """Rows that a shard takes on a device: its runs, filled up with padding, and one of padding alone."""
        return (self.sampler.shard_runs + 1) * self.sampler.run

    @functools.cached_property
    def _chosen_placement(self) -> tuple[str, str]:
        if self.placement != "auto":
            return self.placement, ""
        share = self.resident_bytes
        most = _resident_bytes(self._mesh)
        chosen = "device" if share <= most else "host"
        return chosen, f"a device's rows take {share / 1e6:,.1f} MB of the {most / 1e6:,.1f} MB that may stay on it"

    @functools.cached_property
    def data(self) -> Batch | None:
        """What stays on the devices for the whole run: all rows with placement "device", else nothing.

        `[devices, slots, rows, ...]`: behind the rows of each shard lie rows of weight 0, its padding.
        """
        if self.resolved_placement != "device":
            return None
        every = np.arange(self._shard_rows)
        return self._assemble(0, lambda shards: np.minimum(every, self.sampler.shard_size(shards)[:, None]))

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What `Block.data` are, with their sharding and without their values."""
        lead: tuple[int, ...] = (self.block_steps, self._mesh.size, self.slots, self.sampler.shard_batch)
        if self.resolved_placement == "device":
            lead = (self._mesh.size, self.slots, self._shard_rows)
        columns = self._read(np.zeros(1, np.int32)) | ({"tag": np.zeros(1, np.uint32)} if self.tagged else {})
        return {
            name: jax.ShapeDtypeStruct((*lead, *v.shape[1:]), v.dtype, sharding=self._along(self.device_axis))
            for name, v in columns.items()
        }

    @property
    def device_axis(self) -> int:
        """The axis of a block's data that devices lie along."""
        return 0 if self.resolved_placement == "device" else 1

    @functools.cached_property
    def shard_ranges(self) -> tuple[Array, Array]:
        """For each device its first shard and how many it carries: two [devices] int32 arrays."""
        first = np.arange(self._mesh.size, dtype=np.int32) * self.slots
        count = np.clip(self.num_shards - first, 0, self.slots).astype(np.int32)
        return self._put(first.shape, 0, lambda d: first[d : d + 1]), self._put(
            count.shape, 0, lambda d: count[d : d + 1]
        )

    def steps_at_once(self, most: int | None = None) -> int:
        """Steps of a block; of rows that lie on the devices so many at most."""
        return min(self.block_steps, most) if most and self.resolved_placement == "device" else self.block_steps

    def blocks(self, start: int, stop: int, most: int | None = None) -> Iterator[Block]:
        """The blocks of steps [start, stop), each of `steps_at_once`."""
        steps = self.steps_at_once(most)
        firsts = range(start, stop, steps)
        if self.data is not None:
            made: Iterator[Batch] = itertools.repeat(self.data, len(firsts))
        elif self.prefetched and self._mesh.devices.flat[0].platform != "cpu":
            made = prefetch(map(self._gathered, firsts), self.prefetched)
        else:
            made = map(self._gathered, firsts)
        for first, data in zip(firsts, made, strict=True):
            yield Block(first, min(steps, stop - first), data)

    def _gathered(self, first_step: int) -> Batch:
        """The batches of a block, [K, devices, slots, shard_batch, ...]."""
        steps = np.arange(first_step, first_step + self.block_steps)[:, None]
        return self._assemble(1, lambda shards: self.sampler.positions(steps, shards[None], self.seed or 0))

    def _assemble(self, axis: int, positions_of: Callable[[np.ndarray], np.ndarray]) -> Batch:
        """Global arrays whose part on each device is gathered from the source for that device alone.

        Args:
          axis: where the axis of devices goes.
          positions_of: for shard numbers [slots], which of their rows: [..., slots, rows], as `Sampler.positions`.
        """
        sampler = self.sampler

        @functools.cache  # one gather for all columns
        def part(device: int) -> Rows:
            shards = np.arange(device * self.slots, (device + 1) * self.slots)
            positions, size = positions_of(shards), sampler.shard_size(shards)[:, None]
            start = sampler.shard_start(shards)[:, None]
            padding = (positions >= size).ravel()
            # Padding is a row of the device's own without weight: any model takes it, and no other is read.
            indices = np.minimum(start + np.minimum(positions, np.maximum(size - 1, 0)), sampler.num_rows - 1)
            rows = self._read(indices.ravel())
            rows["weight"] = np.where(padding, rows["weight"].dtype.type(0), rows["weight"])
            if self.tagged:
                rows["tag"] = np.where(padding, np.uint32(0), row_tag(indices.ravel()))
            shape = (*positions.shape[:axis], 1, *positions.shape[axis:])
            return {name: column.reshape(*shape, *column.shape[1:]) for name, column in rows.items()}

        first = next(i for i, d in enumerate(self._mesh.devices.flat) if d.process_index == jax.process_index())

        def whole(name: str) -> Array:
            shape = list(part(first)[name].shape)
            shape[axis] = self._mesh.size
            return self._put(tuple(shape), axis, lambda device: part(device)[name])

        return {name: whole(name) for name in ("x", "y", "weight", *(["tag"] if self.tagged else []))}

    def _put(self, shape: tuple[int, ...], axis: int, part: Callable[[int], np.ndarray]) -> Array:
        """A global array of which `part(d)` is what device d holds; devices lie along `axis`."""

        def local(index: Any) -> np.ndarray:
            return part(index[axis].start or 0)

        return jax.make_array_from_callback(shape, self._along(axis), local)

    def _along(self, axis: int) -> NamedSharding:
        """Devices along an axis."""
        return NamedSharding(self._mesh, PartitionSpec(*[None] * axis, "data"))

    @property
    def _mesh(self) -> Mesh:
        if self.mesh is None:
            raise InputError("the dataset is not sharded; call .shard(mesh, num_shards) before iterating")
        return self.mesh


def _resident_bytes(mesh: Mesh) -> int:
    """How many bytes of rows may stay on a device."""
    device = mesh.local_devices[0]
    stats = device.memory_stats() or {}
    if device.platform != "cpu" and "bytes_limit" in stats:
        return int(stats["bytes_limit"] * RESIDENT_FRACTION)
    return int(_host_bytes() * _RESIDENT_FRACTION_OF_HOST / len(mesh.local_devices))


def _host_bytes() -> int:
    """The memory of this machine, or of the container that this process is in."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in _CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # there is none, or it is "max"
            sizes.append(int(pathlib.Path(limit).read_text(encoding="ascii")))
    return min(sizes)
