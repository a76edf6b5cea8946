"""The pipeline from a source to the devices: shuffle, batch, repeat, shard; then blocks of steps."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import os
import pathlib
import warnings
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
from dpreg.data.sources import Rows, Source, read_range
from dpreg.errors import InputError

PRECISIONS = {  # the dtypes on the devices: of features; and of targets, weights and sums
    "float32": (np.float32, np.float32),
    "bfloat16": (jnp.bfloat16, np.float32),
    "float64": (np.float64, np.float64),
}

# The size of a block. Transfers of larger blocks were slower, and smaller ones are dominated by the call. With rows on
# the devices, a call should take less than a second (on chips: all rows that fit), and the row numbers little memory.
_BLOCK_BYTES, _RESIDENT_BLOCK_BYTES_OF_CPU, _RESIDENT_BLOCK_ROWS = 16 << 20, 1 << 30, 1 << 22
# Signals are handled between blocks. Several processes need a few blocks until all of them know of a signal; their
# steps are slow enough that the overhead of a call is small.
_BLOCK_STEPS, BLOCK_STEPS_AMONG_PROCESSES = 1 << 12, 1 << 8
# A block of several short epochs: enough steps that the overhead of a call is small, and few enough to be interrupted.
_BLOCK_STEPS_ACROSS_EPOCHS = 1 << 11
_TAG_ROWS = 1 << 18  # hashed at a time, so that they stay in cache
# The share of a device's memory up to which all rows are kept there. CPU devices use the host's memory, which holds the
# rows already.
RESIDENT_FRACTION, _RESIDENT_FRACTION_OF_HOST = 1 / 4, 1 / 32
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

Batch = dict[str, Array]


class Block(NamedTuple):
    """The batches of `num_steps` consecutive steps, starting with `first_step`.

    `data` is on the devices. With placement "host" it has the batches themselves, `[K, devices, slots, shard_batch,
    ...]`; with "device" it has all rows of the run's shards, `[devices, slots, rows, ...]`, from which the compiled
    call gathers the batches.

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
    """A source whose rows have the dtypes of a precision, as they are on the devices."""

    source: Source
    precision: str

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: np.ndarray) -> Rows:
        return self._cast(self.source[indices])

    def view(self, rows: slice) -> Rows:
        """Some consecutive rows, which are not to be changed."""
        return self._cast(read_range(self.source, rows.start, rows.stop))

    def _cast(self, rows: Rows) -> Rows:
        of_features, of_rest = PRECISIONS[self.precision]
        return {name: v.astype(of_features if name == "x" else of_rest, copy=False) for name, v in rows.items()}

    def fingerprint(self) -> str:
        """The fingerprint of the source's rows."""
        return self.source.fingerprint()


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A pipeline from a source to the devices, in the style of tf.data.

    Batch sizes are global, so that the batches do not depend on the devices:

        dataset = Dataset(source).shuffle(seed).batch(32).repeat(3).shard(mesh, num_shards=8)
        for block in dataset.prefetch(2): ...

    Each of these methods returns another dataset with some settings changed, in any order. Only `shard` does work: it
    sends rows of `RegressionData.from_parts` to the processes whose devices need them, so all processes must call it.

    It has random access: a block is a function of its first step. Each device, and so each process, reads only the
    rows of its own shards from the source.

    Attributes:
      source: the rows.
      seed, global_batch: the arguments of `shuffle` and `batch`.
      epochs, across: the arguments of `repeat`.
      mesh, num_shards: the arguments of `shard`.
      placement, steps_per_block: the arguments of `place`.
      most_steps: the argument of `limit_steps`.
      prefetched, tagged, precision: the arguments of `prefetch`, `tag` and `cast`.

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
    most_steps: int | None = None

    def __post_init__(self) -> None:
        check_settings(max_epochs=self.epochs, num_shards=self.num_shards, batch_size=self.global_batch)
        check_settings(seed=self.seed or 0, placement=self.placement, precision=self.precision)

    def shuffle(self, seed: int) -> "Dataset":
        """Shuffles each epoch, in an order that depends on (seed, epoch, shard). By default rows keep their order."""
        return dataclasses.replace(self, seed=seed)

    def batch(self, global_batch: int) -> "Dataset":
        """Sets the number of rows of a step, over all devices and processes."""
        return dataclasses.replace(self, global_batch=global_batch)

    def repeat(self, epochs: int, across: bool = False) -> "Dataset":
        """Sets how often every row is used, and whether a block may span several short epochs."""
        return dataclasses.replace(self, epochs=epochs, across=across)

    def shard(self, mesh: Mesh, num_shards: int) -> "Dataset":
        """Splits the rows into logical shards, and assigns a contiguous range of them to each device of the mesh."""
        source = hold_shards(self.source, mesh, num_shards)
        return dataclasses.replace(self, source=source, mesh=mesh, num_shards=num_shards)

    def place(self, placement: str, steps_per_block: int | None = None) -> "Dataset":
        """Sets where the rows are stored: on the "device", on the "host", or ("auto") on the device if they fit."""
        return dataclasses.replace(self, placement=placement, steps_per_block=steps_per_block)

    def limit_steps(self, most: int) -> "Dataset":
        """Limits the steps of a block, as the FLOPs of a model may require. Rows that are on the devices stay there."""
        limited = copy.copy(self)  # with all that is cached; only the steps of a block depend on the limit
        object.__setattr__(limited, "most_steps", most)
        vars(limited).pop("block_steps", None)
        return limited

    def prefetch(self, blocks: int) -> "Dataset":
        """Gathers this many blocks ahead in a background thread, except on CPU devices, where it would not help."""
        return dataclasses.replace(self, prefetched=blocks)

    def tag(self, tagged: bool = True) -> "Dataset":
        """Adds a tag to each row, by which the audit counts the rows that a step used: see `audit_total`."""
        return dataclasses.replace(self, tagged=tagged)

    def cast(self, precision: str) -> "Dataset":
        """Sets the precision of rows on the devices: "float32", "float64", or "bfloat16" for features."""
        return dataclasses.replace(self, precision=precision)

    def __iter__(self) -> Iterator[Block]:
        return self.blocks(0, self.num_steps)

    @functools.cached_property
    def sampler(self) -> Sampler:
        """The order of the rows."""
        return Sampler(len(self.source), self.num_shards, self.global_batch, self.seed is not None)

    @functools.cached_property
    def audit_total(self) -> np.ndarray:
        """What the audit expects of an epoch: the number of rows and the sum of their tags, [2] uint32."""
        rows = len(self.source)
        sums = [row_tag(np.arange(i, min(i + _TAG_ROWS, rows))).sum(dtype=np.uint32) for i in range(0, rows, _TAG_ROWS)]
        return np.array([rows, np.array(sums).sum(dtype=np.uint32)], np.uint32)

    @property
    def tags(self) -> np.ndarray:
        """A former name of `audit_total`, which warns."""
        warnings.warn("Dataset.tags is deprecated; it is audit_total", DeprecationWarning, 2)
        return self.audit_total

    @property
    def num_steps(self) -> int:
        """The number of steps of all epochs."""
        return self.epochs * self.sampler.steps_per_epoch

    @property
    def slots(self) -> int:
        """The number of slots for shards on a device; the last devices may hold fewer shards."""
        return -(-self.num_shards // self._mesh.size)

    @functools.cached_property
    def row_bytes(self) -> int:
        """The bytes of a row: features, targets and weight."""
        return sum(column.nbytes for column in self._read(np.zeros(1, np.int32)).values())

    def _read(self, indices: np.ndarray) -> Rows:
        """Rows of the source as they are on the devices."""
        return CastSource(self.source, self.precision)[indices]

    @functools.cached_property
    def block_steps(self) -> int:
        """The steps of a block, and so of a compiled call, K. At least 2, since K = 1 would compile to other bits.

        `place` gives them, or they are chosen by the bytes of rows. Then `most_steps` limits them, and they are evened
        out over an epoch.
        """
        rows = _BLOCK_BYTES // self.row_bytes
        if self.resolved_placement == "device":
            rows = _RESIDENT_BLOCK_ROWS
            if self._mesh.devices.flat[0].platform == "cpu":
                rows = min(_RESIDENT_BLOCK_BYTES_OF_CPU // self.row_bytes, rows)
        limit = BLOCK_STEPS_AMONG_PROCESSES if self._mesh.is_multi_process else _BLOCK_STEPS
        most = max(1, min(self.steps_per_block or rows // self.global_batch, self.most_steps or limit, limit))
        epoch = self.sampler.steps_per_epoch
        if self.across and (epochs := min(most, _BLOCK_STEPS_ACROSS_EPOCHS) // epoch) > 1:
            return max(2, min(epochs, self.epochs) * epoch)
        return max(2, -(-epoch // -(-epoch // most)))  # of even sizes, since every block is gathered whole

    @property
    def resolved_placement(self) -> str:
        """The placement that "auto" resolves to: "device" or "host"."""
        return self._chosen_placement[0]

    @property
    def placement_reason(self) -> str:
        """The reason for it, in words; empty unless the placement is "auto"."""
        return self._chosen_placement[1]

    @property
    def resident_bytes(self) -> int:
        """The bytes of rows on a device with placement "device"."""
        return self.slots * self._shard_rows * self.row_bytes

    @property
    def _shard_rows(self) -> int:
        """The rows of a shard on a device: its strips, the last one padded, and a strip of padding alone."""
        return (self.sampler.shard_strips + 1) * self.sampler.strip_rows

    @functools.cached_property
    def _chosen_placement(self) -> tuple[str, str]:
        if self.placement != "auto":
            return self.placement, ""
        share = self.resident_bytes
        most = _resident_capacity(self._mesh)
        chosen = "device" if share <= most else "host"
        return chosen, f"a device's rows take {share / 1e6:,.1f} MB of the {most / 1e6:,.1f} MB that may stay on it"

    @functools.cached_property
    def data(self) -> Batch | None:
        """With placement "device", all rows, which stay on the devices for the whole run; otherwise None.

        They are `[devices, slots, rows, ...]`. The rows of each shard are followed by padding, rows of weight 0.
        """
        if self.resolved_placement != "device":
            return None
        every = np.arange(self._shard_rows)
        return self._assemble(0, lambda shards: np.minimum(every, self.sampler.shard_size(shards)[:, None]))

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes, dtypes and shardings of `Block.data`."""
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
        """The axis of a block's data that is sharded over devices."""
        return 0 if self.resolved_placement == "device" else 1

    @functools.cached_property
    def shard_ranges(self) -> tuple[Array, Array]:
        """The first shard and the number of shards of each device: two [devices] int32 arrays."""
        first = np.arange(self._mesh.size, dtype=np.int32) * self.slots
        count = np.clip(self.num_shards - first, 0, self.slots).astype(np.int32)
        return self._put(first.shape, 0, lambda d: first[d : d + 1]), self._put(
            count.shape, 0, lambda d: count[d : d + 1]
        )

    def blocks(self, start: int, stop: int) -> Iterator[Block]:
        """The blocks of steps [start, stop), each of `block_steps` steps; the last may have fewer."""
        firsts = range(start, stop, self.block_steps)
        if self.data is not None:
            made: Iterator[Batch] = itertools.repeat(self.data, len(firsts))
        elif self.prefetched and self._mesh.devices.flat[0].platform != "cpu":
            made = prefetch(map(self._gathered, firsts), self.prefetched)
        else:
            made = map(self._gathered, firsts)
        for first, data in zip(firsts, made, strict=True):
            yield Block(first, min(self.block_steps, stop - first), data)

    def _gathered(self, first_step: int) -> Batch:
        """The batches of a block, [K, devices, slots, shard_batch, ...]."""
        steps = np.arange(first_step, first_step + self.block_steps)[:, None]
        return self._assemble(1, lambda shards: self.sampler.positions(steps, shards[None], self.seed or 0))

    def _assemble(self, axis: int, positions_of: Callable[[np.ndarray], np.ndarray]) -> Batch:
        """Global arrays, for which each device's rows are gathered from the source separately.

        Args:
          axis: the position of the axis of devices.
          positions_of: for shard numbers [slots], the positions of their rows: [..., slots, rows], as
            `Sampler.positions`.
        """
        sampler = self.sampler

        @functools.cache  # one gather for all columns
        def part(device: int) -> Rows:
            shards = np.arange(device * self.slots, (device + 1) * self.slots)
            positions, size = positions_of(shards), sampler.shard_size(shards)[:, None]
            start = sampler.shard_start(shards)[:, None]
            padding = (positions >= size).ravel()
            # Padding repeats, with weight 0, the last row of its shard; in a shard without rows, the last row of all,
            # which every process holds (see `put_together`). Models accept these values, as they are those of rows.
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
        """A global array, sharded over devices along `axis`, where `part(d)` is the data of device d."""

        def local(index: Any) -> np.ndarray:
            return part(index[axis].start or 0)

        return jax.make_array_from_callback(shape, self._along(axis), local)

    def _along(self, axis: int) -> NamedSharding:
        """The sharding over devices along an axis."""
        return NamedSharding(self._mesh, PartitionSpec(*[None] * axis, "data"))

    @property
    def _mesh(self) -> Mesh:
        if self.mesh is None:
            raise InputError("the dataset is not sharded; call .shard(mesh, num_shards) before iterating")
        return self.mesh


def _resident_capacity(mesh: Mesh) -> int:
    """The largest number of bytes of rows to keep on a device."""
    device = mesh.local_devices[0]
    stats = device.memory_stats() or {}
    if device.platform != "cpu" and "bytes_limit" in stats:
        return int(stats["bytes_limit"] * RESIDENT_FRACTION)
    return int(host_bytes() * _RESIDENT_FRACTION_OF_HOST / len(mesh.local_devices))


def host_bytes() -> int:
    """The bytes of memory of this machine, or of the container that this process runs in."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in _CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # there is none, or it is "max"
            sizes.append(int(pathlib.Path(limit).read_text(encoding="ascii")))
    return min(sizes)
