"""The arguments of a compiled call, and the layout of its rows and of its results.

In shapes, throughout dpreg:

    K       steps of a block and of a compiled call, `block_steps`
    L       logical shards of a run, `num_shards`
    slots   places for shards on a device; the last devices may have empty ones, if L is no multiple of the devices
    b       rows of a batch: those of one shard in a step, `shard_batch`, unless other rows are named
    n       any number of rows
    d, t    features and targets of a row
    p       outputs of a model, which are more than t for some losses
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpreg.data.pipeline import Block, Dataset
from dpreg.data.reader import BatchReader, read_block
from dpreg.distributed.devices import AXIS
from dpreg.step.reduce import PyTree

LOSS, WEIGHT, NORM = range(3)  # columns of the sums of steps: weighted loss sum, weight sum, norm of the mean gradient


class CallArgs(NamedTuple):
    """The run-time arguments of a call, replicated int32 scalars.

    `seed` is that of the order of rows and of dropout.
    `one` is 1 at run time. The compiler does not know its value, so it cannot unroll a loop of `one` iteration.
    """

    first_step: Any
    num_steps: Any
    seed: Any
    one: Any = 1

    def packed(self) -> np.ndarray:
        """All of them in one array, which takes a single transfer."""
        return np.array(self, np.int32)


class ShardRange(NamedTuple):
    """The range of logical shards on each device: [devices] int32 outside a step, scalars inside."""

    first: Any
    count: Any


def example_arguments(dataset: Dataset) -> tuple[Any, ...]:
    """(data, shard range, packed call arguments) of the calls for a dataset, as shapes without values."""
    mesh: Mesh = dataset.mesh  # type: ignore[assignment]  # it is sharded
    shard_range = jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(AXIS)))
    call_args = jax.ShapeDtypeStruct((len(CallArgs._fields),), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    return dataset.shapes, ShardRange(shard_range, shard_range), call_args


def call_arguments(dataset: Dataset, block: Block) -> tuple[Any, ShardRange, np.ndarray]:
    """(data, shard range, packed call arguments) of the call for a block of a dataset."""
    call_args = CallArgs(block.first_step, block.num_steps, dataset.seed or 0)
    return block.data, ShardRange(*dataset.shard_ranges), call_args.packed()


class BatchLayout(NamedTuple):
    """The static shapes and functions by which rows reach the steps.

    Attributes:
      reader: (data, shards [slots], first step, number of steps, seed) -> BatchReader, traced inside the step.
      device_axis: the axis of the data that is sharded over devices.
      block_steps: the steps of a call, K; the last one before a sync point may take fewer.
      slots: slots for shards on a device; the last devices may hold fewer shards.
      num_shards: logical shards of the run, L.
      shard_batch: rows of a shard in each step.
      row_bytes: bytes of a row.
    """

    reader: Callable[[PyTree, Array, Array, Array, Array], BatchReader]
    device_axis: int
    block_steps: int
    slots: int
    num_shards: int
    shard_batch: int
    row_bytes: int


def batch_layout(dataset: Dataset) -> BatchLayout:
    """The layout of the rows of a dataset."""
    return BatchLayout(
        reader=functools.partial(read_block, dataset),
        device_axis=dataset.device_axis,
        block_steps=dataset.block_steps,
        slots=dataset.slots,
        num_shards=dataset.num_shards,
        shard_batch=dataset.sampler.shard_batch,
        row_bytes=dataset.row_bytes,
    )
